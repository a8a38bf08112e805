// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The emulator itself: kernels that are wrong on purpose.
#include "kernels/simt/simt.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "capstan/base/error.h"
#include "kernels/numbers.cuh"

namespace capstan::kernels::simt {
namespace {

void half_reach_barrier() {
  if (threadIdx.x < 32) __syncthreads();
}
void barriers_at_two_lines() {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}
void odd_lanes_skip_shuffle(int* out) {
  if (threadIdx.x % 2 == 0) out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1, 1);
}
void write_past_shared() { shared_memory<char>()[16] = 1; }
void load_unaligned(const float* from, float* to) { *to = load<4>(from + 1).at[0]; }
void read_neighbour_without_barrier(int* out) {
  __shared__ int shared[64];
  shared[threadIdx.x] = 0;
  __syncthreads();
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  out[threadIdx.x] = shared[(threadIdx.x + 63) % 64];
}
void reverse_with_barrier(int* out) {
  int* const shared = shared_memory<int>();
  shared[threadIdx.x] = static_cast<int>(threadIdx.x + blockIdx.x * blockDim.x);
  __syncthreads();
  out[threadIdx.x + blockIdx.x * blockDim.x] = shared[blockDim.x - 1 - threadIdx.x];
}
void sum_lanes(int* out) {
  int value = static_cast<int>(threadIdx.x % 32);
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  out[threadIdx.x] = value;
}

template <class... A>
std::string fault_of(int64_t shared_bytes, void (*kernel)(A...), A... arguments) {
  try {
    launch("wrong", {1, 64, shared_bytes}, nullptr, kernel, arguments...);
  } catch (const InternalError& error) {
    return error.what();
  }
  return "no fault";
}

TEST(Simt, DivergentBarriersAndShuffles_AreFound) {
  int out[64];
  EXPECT_NE(fault_of(0, half_reach_barrier).find("32 threads wait at a barrier"),
            std::string::npos);
  EXPECT_NE(fault_of(0, barriers_at_two_lines).find("a barrier joins"), std::string::npos);
  EXPECT_NE(fault_of(0, odd_lanes_skip_shuffle, +out).find("at a warp operation"),
            std::string::npos);
  EXPECT_NE(fault_of(16, write_past_shared).find("past its dynamic shared"), std::string::npos);
}

TEST(Simt, UnalignedVectors_AreFound) {
  alignas(16) float from[8] = {};
  float to = 0;
  EXPECT_NE(fault_of(0, load_unaligned, static_cast<const float*>(from), &to).find("not aligned"),
            std::string::npos);
}

TEST(Simt, MissingBarrier_ShowsInSomeOrder) {
  bool differs = false;
  for (uint64_t seed = 0; seed < 3; ++seed) {
    set_order(seed);
    int out[64] = {};
    launch("racy", {1, 64, 0}, nullptr, read_neighbour_without_barrier, +out);
    for (int t = 0; t < 64; ++t) differs |= out[t] != (t + 63) % 64;
  }
  set_order(0);
  EXPECT_TRUE(differs);
}

TEST(Simt, RightKernels_GiveTheSameInAnyOrder) {
  for (uint64_t seed = 0; seed < 5; ++seed) {
    set_order(seed);
    std::vector<int> out(256), sums(64);
    launch("reverse", {2, 128, 128 * sizeof(int)}, nullptr, reverse_with_barrier, out.data());
    for (int t = 0; t < 128; ++t) EXPECT_EQ(out[static_cast<size_t>(t)], 127 - t);
    for (int t = 0; t < 128; ++t) EXPECT_EQ(out[static_cast<size_t>(128 + t)], 255 - t);
    launch("sum", {1, 64, 0}, nullptr, sum_lanes, sums.data());
    EXPECT_EQ(sums, std::vector<int>(64, 496));
  }
  set_order(0);
}

TEST(Simt, AfterAFault_TheNextLaunchRuns) {
  EXPECT_NE(fault_of(0, half_reach_barrier), "no fault");
  std::vector<int> sums(64);
  launch("sum", {1, 64, 0}, nullptr, sum_lanes, sums.data());
  EXPECT_EQ(sums, std::vector<int>(64, 496));
}

TEST(Simt, ImpossibleShapes_AreRefused) {
  const auto shape = [](LaunchShape s) { run_grid("k", s, [] {}); };
  EXPECT_THROW(shape({0, 32, 0}), InternalError);
  EXPECT_THROW(shape({1, 33, 0}), InternalError);
  EXPECT_THROW(shape({1, 2048, 0}), InternalError);
  EXPECT_THROW(shape({1, 32, 1 << 20}), InternalError);
}

// Bits checked against the CUDA headers' own conversion.
TEST(Simt, NarrowFormats_RoundToNearestEvenAndSaturate) {
  EXPECT_EQ(bf16_bits(1.00390625f), 0x3f80);  // half way: even
  EXPECT_EQ(bf16_bits(1.01171875f), 0x3f82);
  EXPECT_EQ(e4m3_bits(1.0f), 0x38);
  EXPECT_EQ(e4m3_bits(1.0625f), 0x38);  // half way: even
  EXPECT_EQ(e4m3_bits(1.1875f), 0x3a);
  EXPECT_EQ(e4m3_bits(1000.0f), 0x7e);
  EXPECT_EQ(e4m3_bits(-0.001953125f), 0x81);  // smallest subnormal
  EXPECT_EQ(e4m3_bits(0.0009765625f), 0x00);  // half of it: even
  EXPECT_EQ(e4m3_bits(0.01562f), 0x08);       // rounds up to the smallest normal number
  EXPECT_EQ(e5m2_bits(1.0f), 0x3c);
  EXPECT_EQ(e5m2_bits(-1e9f), 0xfb);
  EXPECT_EQ(e5m2_bits(1.52587890625e-05f), 0x01);
}

}  // namespace
}  // namespace capstan::kernels::simt
