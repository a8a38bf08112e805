// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Parts of `data prepare` that tests drive on their own.
#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "capstan/data/prepare.h"
#include "capstan/text/documents.h"
#include "capstan/text/sources.h"

namespace capstan::data {

struct EncodedDocument {
  std::string key;  // relative path, for JSONL with ":line"
  int64_t text_bytes = 0;
  std::vector<int32_t> tokens;  // end-of-document token included
};

struct PipelineOptions {
  std::vector<text::Source> sources;
  text::DocumentOptions documents;
  std::function<std::vector<int32_t>(std::string_view text)> encode;  // called from every worker
  int32_t eos_id = 0;
  int workers = 1;
  int64_t chunk_bytes = int64_t{256} << 10;  // documents that travel together
  int64_t in_flight_bytes = int64_t{64}
                            << 20;  // text read but not yet taken; one chunk may exceed it
};

// One thread reads, `workers` encode, the calling thread takes the documents in source order. Of
// several failures the first in that order is thrown.
text::DocumentCounts run_pipeline(const PipelineOptions& options,
                                  const std::function<void(EncodedDocument&&)>& take);

// What a tokenizer gives to preparing.
struct Encoder {
  std::function<std::vector<int32_t>(std::string_view text)> encode;
  int64_t vocab_size = 0;
  int32_t eos_id = 0;
  std::string fingerprint;
};

// `stage` is told before every operation that changes what readers see.
PrepareReport prepare_with(const PrepareOptions& options, const Encoder& encoder,
                           const std::function<void(std::string_view)>& stage = {});

}  // namespace capstan::data
