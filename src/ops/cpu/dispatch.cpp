// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Which compilation of each kernel runs on this processor (device::isa_level, CAPSTAN_ISA).
#include "capstan/device/isa.h"
#include "ops/cpu/attention_kernels.h"
#include "ops/cpu/cross_entropy_kernels.h"
#include "ops/cpu/fp8_kernels.h"
#include "ops/cpu/layer_norm_kernels.h"
#include "ops/cpu/norm_kernels.h"
#include "ops/cpu/product_kernels.h"
#include "ops/cpu/qk_norm_kernels.h"
#include "ops/cpu/rope_kernels.h"
#include "ops/cpu/swiglu_kernels.h"

namespace capstan::ops::cpu {
namespace {

template <class Kernels>
const Kernels& pick(const Kernels& plain, const Kernels& avx2, const Kernels& avx512,
                    const Kernels& avx512bf16) {
  switch (device::isa_level()) {
    case device::Isa::kPlain:
      return plain;
    case device::Isa::kAvx2:
      return avx2;
    case device::Isa::kAvx512:
      return avx512;
    case device::Isa::kAvx512Bf16:
    case device::Isa::kAmx:
      return avx512bf16;
  }
  return plain;
}

}  // namespace

const NormKernels& norm_kernels() {
  static const auto& kernels = pick(norm_plain, norm_avx2, norm_avx512, norm_avx512bf16);
  return kernels;
}

const LayerNormKernels& layer_norm_kernels() {
  static const auto& kernels =
      pick(layer_norm_plain, layer_norm_avx2, layer_norm_avx512, layer_norm_avx512bf16);
  return kernels;
}

const SwigluKernels& swiglu_kernels() {
  static const auto& kernels = pick(swiglu_plain, swiglu_avx2, swiglu_avx512, swiglu_avx512bf16);
  return kernels;
}

const RopeKernels& rope_kernels() {
  static const auto& kernels = pick(rope_plain, rope_avx2, rope_avx512, rope_avx512bf16);
  return kernels;
}

const QkNormKernels& qk_norm_kernels() {
  static const auto& kernels =
      pick(qk_norm_plain, qk_norm_avx2, qk_norm_avx512, qk_norm_avx512bf16);
  return kernels;
}

const CrossEntropyKernels& cross_entropy_kernels() {
  static const auto& kernels =
      pick(cross_entropy_plain, cross_entropy_avx2, cross_entropy_avx512, cross_entropy_avx512bf16);
  return kernels;
}

const Fp8Kernels& fp8_kernels() {
  static const auto& kernels = pick(fp8_plain, fp8_avx2, fp8_avx512, fp8_avx512bf16);
  return kernels;
}

const AttentionKernels& attention_kernels() {
  static const auto& kernels =
      device::isa_level() == device::Isa::kAmx
          ? attention_amx
          : pick(attention_plain, attention_avx2, attention_avx512, attention_avx512bf16);
  return kernels;
}

const ProductKernels* product_kernels() {
  static const bool has_tiles = device::isa_level() == device::Isa::kAmx;
  return has_tiles ? &product_amx : nullptr;
}

}  // namespace capstan::ops::cpu
