// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Which form of attention runs, as a function of nothing but what decides it. Ops and the log of a
// run ask the same function.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "capstan/ops/path.h"

namespace capstan::ops {

// Plain math (every dtype, mask and device, with all scores in memory); LibTorch's and our kernel
// of CPUs; FlashAttention of GPUs, in rows and in documents, and for fp32 the kernel that ATen
// calls memory-efficient.
enum class AttentionForm {
  kReference,
  kLibTorch,
  kKernel,
  kFlash,
  kFlashDocuments,
  kEfficient,
  kEfficientDocuments
};
[[nodiscard]] std::string_view name_of(AttentionForm form);

struct AttentionCase {
  Path path = Path::kFused;  // as asked for: kFused or kReference
  bool on_cpu = true;
  bool has_flash = false, has_efficient = false;  // of the device
  at::ScalarType dtype = at::ScalarType::Float;
  int64_t head_size = 0, queries = 0, keys = 0;
  int64_t query_offset = 0;               // as in AttentionMask
  std::optional<int64_t> sliding_window;  // keys
  bool documents = false;                 // queries have first keys
  bool has_starts = false;                // and those of documents are known, of keys and queries
};
struct AttentionChoice {
  AttentionForm form = AttentionForm::kReference;
  // Why a device takes the reference, and what would change that; else empty.
  std::string reason, fix;
};
[[nodiscard]] AttentionChoice choose_attention(const AttentionCase& c);

// Whether LibTorch has FlashAttention, or its memory-efficient kernel, for this device.
[[nodiscard]] bool has_flash(const c10::Device& device);
[[nodiscard]] bool has_efficient(const c10::Device& device);

// The keys beside the diagonal that ends at the last key which FlashAttention is to take, negative
// = all, where such a band is what the mask means and leaves every query a key.
struct FlashBand {
  int64_t left = -1, right = 0;
};
[[nodiscard]] std::optional<FlashBand> flash_band(const AttentionCase& c);
// The same of each document, whose queries and keys are those within two chunks of a row, with the
// diagonal that ends at its last key there; right < 0 = all.
[[nodiscard]] std::optional<FlashBand> flash_document_band(const AttentionCase& c);

// What the memory-efficient kernel is to take in its place: a diagonal from the first key or to the
// last, or none, and a window of keys that end there, 0 = all.
enum class Diagonal { kNone, kFromFirst, kToLast };
struct EfficientMask {
  Diagonal diagonal = Diagonal::kNone;
  int64_t window = 0;
};
[[nodiscard]] std::optional<EfficientMask> efficient_mask(const AttentionCase& c);

}  // namespace capstan::ops
