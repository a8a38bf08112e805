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
constexpr int64_t kEfficientHeadStep = 4;  // numbers of fp32 in a load

AttentionForm choose_on_cpu(const AttentionCase& c) {
  if (cpu::element_of(c.dtype)) return AttentionForm::kKernel;
  const bool is_plain_causal =
      c.query_offset == 0 && !c.sliding_window && !c.documents && c.queries == c.keys;
  return is_plain_causal ? AttentionForm::kLibTorch : AttentionForm::kReference;
}

AttentionChoice reference(std::string reason, std::string fix) {
  return {AttentionForm::kReference, std::move(reason), std::move(fix)};
}

bool device_has(const c10::Device& device, const c10::OperatorHandle& op) {
  if (device.is_cpu()) return false;
  return op.hasKernelForDispatchKey(device.is_cuda() ? c10::DispatchKey::CUDA
                                                     : c10::DispatchKey::PrivateUse1);
}

bool is_square(const AttentionCase& c) { return c.query_offset == 0 && c.queries == c.keys; }

// Of a device, once type and heads are right for its kernels.
AttentionChoice choose_by_mask(const AttentionCase& c, AttentionForm rows, AttentionForm documents,
                               bool has_documents, const char* why_not) {
  if (c.documents) {
    if (c.has_starts && has_documents) return {documents, "", ""};
    return reference("documents are separate and rows are in parts",
                     "Set data.documents: joined, or parallel.context.method: all_to_all");
  }
  if (!why_not) return {rows, "", ""};
  return reference(why_not, "Set parallel.context.method: all_to_all");
}

AttentionChoice choose_for_fp32(const AttentionCase& c) {
  if (c.head_size % kEfficientHeadStep != 0)
    return reference(fmt::format("heads of {} numbers, the kernel for fp32 takes multiples of {}",
                                 c.head_size, kEfficientHeadStep),
                     "Set model.head_dim to one");
  // Its loop over keys writes the results, so each query needs one in its document.
  return choose_by_mask(
      c, AttentionForm::kEfficient, AttentionForm::kEfficientDocuments, is_square(c),
      efficient_mask(c) ? nullptr : "a part of a row that a window or a later start cuts");
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
    case AttentionForm::kEfficient:
      return "memory-efficient attention";
    case AttentionForm::kEfficientDocuments:
      return "memory-efficient attention of variable lengths";
  }
  return "unknown";
}

bool has_flash(const c10::Device& device) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("aten::_flash_attention_forward", "");
  return device_has(device, op);
}

bool has_efficient(const c10::Device& device) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("aten::_efficient_attention_forward", "");
  return device_has(device, op);
}

std::optional<FlashBand> flash_band(const AttentionCase& c) {
  const int64_t shift = c.query_offset - (c.keys - c.queries);
  if (shift < 0 || c.query_offset < 0) return std::nullopt;
  if (!c.sliding_window) return FlashBand{-1, shift};
  const int64_t left = *c.sliding_window - 1 - shift;
  if (left < 0) return std::nullopt;
  return FlashBand{left, shift};
}

// In an earlier chunk the one document that goes on has the last keys and the first queries: a
// window from the last key would move with their number.
std::optional<FlashBand> flash_document_band(const AttentionCase& c) {
  if (is_square(c)) return flash_band(c);
  const bool is_cut = c.sliding_window && *c.sliding_window < c.query_offset + c.queries;
  if (c.query_offset < c.keys || is_cut) return std::nullopt;
  return FlashBand{-1, -1};
}

// Its backward measures a window from the first key, so rows with one are whole.
std::optional<EfficientMask> efficient_mask(const AttentionCase& c) {
  const int64_t shift = c.keys - c.queries;
  const bool sees_all = c.query_offset >= c.keys - 1;
  if (c.sliding_window && *c.sliding_window < c.query_offset + c.queries) {
    if (c.query_offset != 0 || shift != 0) return std::nullopt;
    return EfficientMask{Diagonal::kFromFirst, *c.sliding_window};
  }
  if (sees_all) return EfficientMask{};
  if (c.query_offset == 0) return EfficientMask{Diagonal::kFromFirst, 0};
  if (c.query_offset == shift && shift > 0) return EfficientMask{Diagonal::kToLast, 0};
  return std::nullopt;
}

AttentionChoice choose_attention(const AttentionCase& c) {
  if (c.path == Path::kReference) return reference("CAPSTAN_OPS is reference", "Unset it");
  if (c.on_cpu) return {choose_on_cpu(c), "", ""};
  if (c.dtype == at::kFloat && c.has_efficient) return choose_for_fp32(c);
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
  return choose_by_mask(
      c, AttentionForm::kFlash, AttentionForm::kFlashDocuments, flash_document_band(c).has_value(),
      flash_band(c) ? nullptr : "a part of a row has queries that see none of its keys");
}

}  // namespace capstan::ops
