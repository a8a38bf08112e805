// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Normal initial values: out[i] = normal(seed, stream, first + i) x deviation, with the bits of
// philox::fill_normal; bf16 is that fp32 value, rounded. Bytes per element: one write.
#pragma once
#include "capstan/kernels/stream.h"

namespace capstan::kernels {

struct FillNormalArgs {
  DType dtype = DType::kFp32;
  void* out = nullptr;
  int64_t count = 0;
  uint64_t seed = 0, stream = 0, first = 0;
  double deviation = 1;
};
void fill_normal(const FillNormalArgs& args, Stream stream);

}  // namespace capstan::kernels
