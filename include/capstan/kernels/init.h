// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Normal initial values: out[i] = normal(seed, stream, index of i) x deviation, with the bits of
// philox::fill_normal; bf16 is that fp32 value, rounded. Elements come in runs: element i is number
// i % length of run i / length, runs begin `stride` apart. Bytes per element: one write.
#pragma once
#include "capstan/kernels/stream.h"

namespace capstan::kernels {

struct FillNormalArgs {
  DType dtype = DType::kFp32;
  void* out = nullptr;
  int64_t count = 0;
  uint64_t seed = 0, stream = 0, first = 0;
  int64_t length = 1, stride = 1;  // as they stand: one run
  double deviation = 1;
};
void fill_normal(const FillNormalArgs& args, Stream stream);

}  // namespace capstan::kernels
