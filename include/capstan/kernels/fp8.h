// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Casts to fp8 with scales kept on the device. Legend: N rows, K columns, T dtype of x (fp32,
// bf16).
//   q = fp8(x scale), to nearest even, saturating; NaN stays NaN (0x7f). x is about q
//   inverse_scale.
// Current scaling: amax, fp8_scale, cast_fp8 (or cast_rows_fp8 for a scale per row). Delayed
// scaling: cast_fp8 with the scale of earlier steps and `amax`, which takes the maximum on the way.
#pragma once
#include "capstan/kernels/stream.h"

namespace capstan::kernels {

enum class Fp8 { kE4m3, kE5m2 };  // largest numbers 448 and 57344

// *amax = max(*amax, |x|); NaN does not count. Bytes per element: T read.
struct AmaxArgs {
  DType dtype = DType::kBf16;
  const void* values = nullptr;
  int64_t count = 0;
  float* amax = nullptr;  // not negative
};
void amax(const AmaxArgs& args, Stream stream);

// scale = largest number of the format / amax, 1 where amax is 0 or infinite.
struct Fp8ScaleArgs {
  Fp8 format = Fp8::kE4m3;
  const float* amax = nullptr;
  int64_t count = 0;
  bool power_of_two = false;  // rounds the scale down to one
  float* scale = nullptr;
  float* inverse_scale = nullptr;
};
void fp8_scale(const Fp8ScaleArgs& args, Stream stream);

// Bytes per element: T read, 1 written for each of out and transposed.
struct CastFp8Args {
  DType dtype = DType::kBf16;
  Fp8 format = Fp8::kE4m3;
  int64_t rows = 0, columns = 0;
  const void* x = nullptr;        // T [N, K]
  const float* scale = nullptr;   // one number
  uint8_t* out = nullptr;         // [N, K], or null
  uint8_t* transposed = nullptr;  // [K, N], or null
  float* amax = nullptr;          // of x, as above; or null
};
void cast_fp8(const CastFp8Args& args, Stream stream);

// A scale per row. Bytes per element: 2T read (the second time from the cache), 1 written.
struct CastRowsFp8Args {
  DType dtype = DType::kBf16;
  Fp8 format = Fp8::kE4m3;
  int64_t rows = 0, columns = 0;
  const void* x = nullptr;         // T [N, K]
  uint8_t* out = nullptr;          // [N, K]
  float* inverse_scale = nullptr;  // [N]
};
void cast_rows_fp8(const CastRowsFp8Args& args, Stream stream);

}  // namespace capstan::kernels
