// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Casts to fp8: q = fp8(x scale), as it is and transposed, with the maximum of |x| taken on the
// way. Tiles of 64 x 64 go through shared memory as bytes, so that both outputs are written in
// whole words. Maxima are joined by integer maxima of their bits, which no order changes. Memory
// per element: x read once, one byte written per output. Reference: tests/kernels/fp8_test.cpp.
#include "capstan/kernels/fp8.h"

#include "dispatch.h"
#include "reduce.cuh"

namespace capstan::kernels {
namespace {

constexpr int kTile = 64, kTilePitch = kTile + 4, kCastThreads = 256, kPiece = 8;
constexpr int kWordRows = 16;  // rows that make a word of the transposed output
constexpr float kLargestFloat = 3.402823466e38f;

// The first `count` of N elements, with indices that the compiler knows.
template <class T, int N>
__device__ __forceinline__ Vec<T, N> load_first(const T* from, int count) {
  Vec<T, N> out{};
  CAPSTAN_UNROLL
  for (int j = 0; j < N; ++j)
    if (j < count) out.at[j] = from[j];
  return out;
}
template <class T, int N>
__device__ __forceinline__ void store_first(T* to, const Vec<T, N>& value, int count) {
  CAPSTAN_UNROLL
  for (int j = 0; j < N; ++j)
    if (j < count) to[j] = value.at[j];
}

__host__ __device__ __forceinline__ float largest_of(Fp8 format) {
  return format == Fp8::kE4m3 ? 448.0f : 57344.0f;
}

__device__ __forceinline__ uint8_t fp8_bits(float x, Fp8 format) {
  if (x != x) return 0x7f;
  return format == Fp8::kE4m3 ? e4m3_bits(x) : e5m2_bits(x);
}

__device__ __forceinline__ float size_of_number(float x) { return x < 0 ? -x : x; }

// Bits of floats that are not negative have the order of the floats.
__device__ __forceinline__ void raise(float* amax, float value) {
  if (value > *amax)
    atomicMax(reinterpret_cast<int*>(amax), static_cast<int>(bits_of_float(value)));
}

template <class T>
__global__ void __launch_bounds__(kCastThreads)
    amax_kernel(const T* values, int64_t count, bool is_aligned, float* result) {
  constexpr int kN = kVector<T>;
  __shared__ float part[32];
  const int64_t vectors = is_aligned ? count / kN : 0;
  float top = 0;
  for (int64_t i = first_index(); i < vectors; i += all_threads()) {
    const Vec<T, kN> x = load<kN>(values + i * kN);
    CAPSTAN_UNROLL
    for (int j = 0; j < kN; ++j) top = Max{}(top, size_of_number(widen(x.at[j])));
  }
  for (int64_t i = vectors * kN + first_index(); i < count; i += all_threads())
    top = Max{}(top, size_of_number(widen(values[i])));
  top = block_reduce(top, Max{}, part);
  if (threadIdx.x == 0) raise(result, top);
}

__device__ float scale_of(float amax, Fp8 format, bool power_of_two) {
  if (!(amax > 0) || amax > kLargestFloat) return 1.0f;
  float scale = largest_of(format) / amax;
  if (scale > kLargestFloat) scale = kLargestFloat;
  if (power_of_two) scale = float_of_bits(bits_of_float(scale) & 0x7f800000u);
  return scale > 0 ? scale : 1.0f;
}

__global__ void scale_kernel(const Fp8ScaleArgs a) {
  for (int64_t i = first_index(); i < a.count; i += all_threads()) {
    const float scale = scale_of(a.amax[i], a.format, a.power_of_two);
    a.scale[i] = scale;
    a.inverse_scale[i] = 1.0f / scale;
  }
}

struct CastTile {
  uint8_t at[kTile * kTilePitch];
};
struct CastLayout {
  bool is_aligned, is_transposed_aligned;
  int tiles_per_row;
};

// The tile as bytes, written to `out` on the way; returns the thread's part of the maximum.
template <class T>
__device__ __forceinline__ float read_tile(const CastFp8Args& a, bool is_aligned, int64_t row_0,
                                           int64_t column_0, CastTile& tile) {
  constexpr int kPieces = kTile / kPiece;
  const float scale = *a.scale;
  float top = 0;
  for (int i = static_cast<int>(threadIdx.x); i < kTile * kPieces; i += kCastThreads) {
    const int r = i / kPieces, c = i % kPieces * kPiece;
    const int64_t row = row_0 + r, column = column_0 + c;
    if (row >= a.rows || column >= a.columns) continue;
    const T* const from = static_cast<const T*>(a.x) + row * a.columns + column;
    const int count = static_cast<int>(a.columns - column < kPiece ? a.columns - column : kPiece);
    const Vec<T, kPiece> x = is_aligned ? load<kPiece>(from) : load_first<T, kPiece>(from, count);
    Vec<uint8_t, kPiece> q;
    CAPSTAN_UNROLL
    for (int j = 0; j < kPiece; ++j) {
      const float v = widen(x.at[j]);
      top = Max{}(top, size_of_number(v));
      q.at[j] = fp8_bits(v * scale, a.format);
      tile.at[r * kTilePitch + c + j] = q.at[j];
    }
    if (!a.out) continue;
    uint8_t* const to = a.out + row * a.columns + column;
    if (is_aligned)
      store(to, q);
    else
      store_first(to, q, count);
  }
  return top;
}

__device__ __forceinline__ void write_transposed(const CastFp8Args& a, bool is_aligned,
                                                 int64_t row_0, int64_t column_0,
                                                 const CastTile& tile) {
  constexpr int kWords = kTile / kWordRows;
  for (int i = static_cast<int>(threadIdx.x); i < kTile * kWords; i += kCastThreads) {
    const int c = i / kWords, r = i % kWords * kWordRows;
    const int64_t row = row_0 + r, column = column_0 + c;
    if (row >= a.rows || column >= a.columns) continue;
    Vec<uint8_t, kWordRows> q;
    CAPSTAN_UNROLL
    for (int j = 0; j < kWordRows; ++j) q.at[j] = tile.at[(r + j) * kTilePitch + c];
    uint8_t* const to = a.transposed + column * a.rows + row;
    const int count = static_cast<int>(a.rows - row < kWordRows ? a.rows - row : kWordRows);
    if (is_aligned && count == kWordRows)
      store(to, q);
    else
      store_first(to, q, count);
  }
}

template <class T>
__global__ void __launch_bounds__(kCastThreads)
    cast_kernel(const CastFp8Args a, const CastLayout layout) {
  __shared__ CastTile tile;
  __shared__ float part[32];
  const int64_t row_0 = static_cast<int64_t>(blockIdx.x / layout.tiles_per_row) * kTile;
  const int64_t column_0 = static_cast<int64_t>(blockIdx.x % layout.tiles_per_row) * kTile;
  float top = read_tile<T>(a, layout.is_aligned, row_0, column_0, tile);
  if (a.amax) {
    top = block_reduce(top, Max{}, part);
    if (threadIdx.x == 0) raise(a.amax, top);
  }
  if (!a.transposed) return;
  __syncthreads();
  write_transposed(a, layout.is_transposed_aligned, row_0, column_0, tile);
}

template <class T, int N>
__global__ void cast_rows_kernel(const CastRowsFp8Args a) {
  __shared__ float part[32];
  const int64_t row = blockIdx.x, step = static_cast<int64_t>(blockDim.x) * N;
  const T* const x = static_cast<const T*>(a.x) + row * a.columns;
  float top = 0;
  for (int64_t c = threadIdx.x * N; c < a.columns; c += step) {
    const Vec<T, N> v = load<N>(x + c);
    CAPSTAN_UNROLL
    for (int j = 0; j < N; ++j) top = Max{}(top, size_of_number(widen(v.at[j])));
  }
  const float scale = scale_of(block_reduce(top, Max{}, part), a.format, false);
  if (threadIdx.x == 0) a.inverse_scale[row] = 1.0f / scale;
  for (int64_t c = threadIdx.x * N; c < a.columns; c += step) {
    const Vec<T, N> v = load<N>(x + c);
    Vec<uint8_t, N> q;
    CAPSTAN_UNROLL
    for (int j = 0; j < N; ++j) q.at[j] = fp8_bits(widen(v.at[j]) * scale, a.format);
    store(a.out + row * a.columns + c, q);
  }
}

// visit(Tag<float>) or visit(Tag<Bf16>)
template <class Visit>
void with_narrow(const char* name, DType dtype, const Visit& visit) {
  if (dtype == DType::kFp32) return visit(Tag<float>{});
  if (dtype == DType::kBf16) return visit(Tag<Bf16>{});
  throw_bad_dtype(name, {dtype});
}

}  // namespace

void amax(const AmaxArgs& args, Stream stream) {
  check_sizes("amax", {args.count});
  if (args.count == 0) return;
  check_present("amax", {{"values", args.values}, {"amax", args.amax}});
  with_narrow("amax", args.dtype, [&](auto tag) {
    using T = TypeOf<decltype(tag)>;
    launch("amax", flat_shape(args.count, 4 * kVector<T>), stream, amax_kernel<T>,
           static_cast<const T*>(args.values), args.count, are_aligned({args.values}), args.amax);
  });
}

void fp8_scale(const Fp8ScaleArgs& args, Stream stream) {
  check_sizes("fp8_scale", {args.count});
  if (args.count == 0) return;
  check_present(
      "fp8_scale",
      {{"amax", args.amax}, {"scale", args.scale}, {"inverse_scale", args.inverse_scale}});
  launch("fp8_scale", flat_shape(args.count, 1), stream, scale_kernel, args);
}

void cast_fp8(const CastFp8Args& args, Stream stream) {
  check_sizes("cast_fp8", {args.rows, args.columns});
  if (args.rows == 0 || args.columns == 0) return;
  check_present("cast_fp8", {{"x", args.x}, {"scale", args.scale}});
  const int64_t across = (args.columns + kTile - 1) / kTile, down = (args.rows + kTile - 1) / kTile;
  const CastLayout layout{
      .is_aligned = are_aligned({args.x, args.out}) && args.columns % kPiece == 0,
      .is_transposed_aligned = are_aligned({args.transposed}) && args.rows % kWordRows == 0,
      .tiles_per_row = static_cast<int>(across)};
  with_narrow("cast_fp8", args.dtype, [&](auto tag) {
    launch("cast_fp8", {across * down, kCastThreads, 0}, stream, cast_kernel<TypeOf<decltype(tag)>>,
           args, layout);
  });
}

void cast_rows_fp8(const CastRowsFp8Args& args, Stream stream) {
  check_sizes("cast_rows_fp8", {args.rows, args.columns});
  if (args.rows == 0 || args.columns == 0) return;
  check_present("cast_rows_fp8",
                {{"x", args.x}, {"out", args.out}, {"inverse_scale", args.inverse_scale}});
  with_narrow("cast_rows_fp8", args.dtype, [&](auto tag) {
    using T = TypeOf<decltype(tag)>;
    constexpr int kN = kVector<T>;
    const bool vectors = are_aligned({args.x, args.out}) && args.columns % kN == 0;
    const LaunchShape shape{args.rows, threads_for_row(args.columns, vectors ? 2 * kN : 2, 512), 0};
    launch("cast_rows_fp8", shape, stream,
           vectors ? cast_rows_kernel<T, kN> : cast_rows_kernel<T, 1>, args);
  });
}

}  // namespace capstan::kernels
