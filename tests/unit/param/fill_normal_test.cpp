// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "param/cpu/fill_normal.h"

#include <gtest/gtest.h>

#include <vector>

#include "capstan/base/philox.h"
#include "capstan/device/isa.h"

namespace capstan::param::cpu {
namespace {

std::vector<const FillNormal*> variants() {
  std::vector<const FillNormal*> list = {&plain::kFillNormal};
  if (device::detect_isa() >= device::Isa::kAvx2) list.push_back(&avx2::kFillNormal);
  if (device::detect_isa() >= device::Isa::kAvx512) list.push_back(&avx512::kFillNormal);
  return list;
}

template <class T, class Fill>
void expect_bits_of_philox(const Fill& fill, size_t count, const NormalStream& from) {
  std::vector<T> expected(count), filled(count, T(7));
  philox::fill_normal(std::span<T>(expected), from.seed, from.stream, from.first, from.deviation);
  fill(filled.data(), count, from);
  EXPECT_EQ(filled, expected) << count << " elements from " << from.first;
}

TEST(FillNormal, EveryInstructionSet_HasTheBitsOfPhilox) {
  const NormalStream streams[] = {{42, 7, 0, 0.02},
                                  {0xFFFFFFFFFFFFFFFFull, 1ull << 63, 0xFFFFFFF0ull, 1.0},
                                  {1, 2, (1ull << 40) + 3, 1e-3}};
  for (const FillNormal* fill : variants())
    for (const NormalStream& from : streams)
      for (const size_t count : {0u, 1u, 255u, 256u, 257u, 100000u}) {
        expect_bits_of_philox<float>(fill->f32, count, from);
        expect_bits_of_philox<double>(fill->f64, count, from);
      }
}

}  // namespace
}  // namespace capstan::param::cpu
