// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// libFuzzer entry for the safetensors header and the manifest: bytes are read or refused, nothing
// else.
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "capstan/base/error.h"
#include "capstan/checkpoint/manifest.h"
#include "capstan/checkpoint/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace capstan;
  try {
    (void)checkpoint::parse_safetensors_header(std::as_bytes(std::span(data, size)), "fuzz");
  } catch (const Error&) {
    // refused: what the fuzzer asks for
  }
  try {
    (void)checkpoint::parse_manifest(std::string(reinterpret_cast<const char*>(data), size),
                                     "fuzz");
  } catch (const Error&) {
    // refused
  }
  return 0;
}
