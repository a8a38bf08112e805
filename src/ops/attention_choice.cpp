// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/ops/attention_choice.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <fmt/format.h>

#include "ops/cpu/dtypes.h"
#include "ops/on_device_internal.h"

namespace capstan::ops {
namespace {

constexpr int64_t kFlashHeadStep = 8, kFlashHeadSize = 256;

AttentionForm choose_on_cpu(const AttentionCase& c) {
  if (cpu::element_of(c.dtype)) return AttentionForm::kKernel;
  const bool is_plain_causal =
      c.query_offset == 0 && !c.sliding_window && !c.documents && c.queries == c.keys;
  return is_plain_causal ? AttentionForm::kLibTorch : AttentionForm::kReference;
}

AttentionChoice reference(std::string reason, std::string fix) {
  return {AttentionForm::kReference, std::move(reason), std::move(fix)};
}

}  // namespace

std::string_view name_of(AttentionForm form) {
  switch (form) {
    case AttentionForm::kReference:
      return "the reference";
    case AttentionForm::kLibTorch:
      return "LibTorch's kernel";
    case AttentionForm::kKernel:
      return "our kernel";
    case AttentionForm::kFlash:
      return "FlashAttention";
    case AttentionForm::kFlashDocuments:
      return "FlashAttention of variable lengths";
  }
  return "unknown";
}

bool has_flash(const c10::Device& device) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("aten::_flash_attention_forward", "");
  if (device.is_cpu()) return false;
  return op.hasKernelForDispatchKey(device.is_cuda() ? c10::DispatchKey::CUDA
                                                     : c10::DispatchKey::PrivateUse1);
}

std::optional<FlashBand> flash_band(const AttentionCase& c) {
  const int64_t shift = c.query_offset - (c.keys - c.queries);
  if (shift < 0 || c.query_offset < 0) return std::nullopt;
  if (!c.sliding_window) return FlashBand{-1, shift};
  const int64_t left = *c.sliding_window - 1 - shift;
  if (left < 0) return std::nullopt;
  return FlashBand{left, shift};
}

AttentionChoice choose_attention(const AttentionCase& c) {
  if (c.path == Path::kReference) return reference("CAPSTAN_OPS is reference", "Unset it");
  if (c.on_cpu) return {choose_on_cpu(c), "", ""};
  if (!c.has_flash) return reference("LibTorch has no FlashAttention for this device", "");
  if (c.dtype != at::kBFloat16 && c.dtype != at::kHalf)
    return reference(fmt::format("FlashAttention computes in bf16 and fp16, not in {}",
                                 on_device::name_of_type(c.dtype)),
                     "Set precision.compute: bf16");
  if (c.head_size % kFlashHeadStep != 0 || c.head_size > kFlashHeadSize)
    return reference(
        fmt::format("heads of {} numbers, FlashAttention takes multiples of {} up to {}",
                    c.head_size, kFlashHeadStep, kFlashHeadSize),
        "Set model.head_dim to one");
  if (c.documents) {
    if (c.has_starts && c.query_offset == 0 && c.queries == c.keys)
      return {AttentionForm::kFlashDocuments, "", ""};
    return reference("documents are separate and rows are in parts",
                     "Set data.documents: joined, or parallel.context.method: all_to_all");
  }
  if (flash_band(c)) return {AttentionForm::kFlash, "", ""};
  return reference("a part of a row has queries that see none of its keys",
                   "Set parallel.context.method: all_to_all");
}

}  // namespace capstan::ops
