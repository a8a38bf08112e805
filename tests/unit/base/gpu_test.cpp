// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/base/gpu.h"

#include <gtest/gtest.h>

namespace capstan {
namespace {

TEST(Gpu, DenseFlops_AreThoseOfTheVariant) {
  EXPECT_EQ(dense_flops("NVIDIA H100 80GB HBM3", DType::kBf16), 989e12);
  EXPECT_EQ(dense_flops("NVIDIA H100 PCIe", DType::kBf16), 756e12);
  EXPECT_EQ(dense_flops("NVIDIA H100 NVL", DType::kFp16), 835e12);
  EXPECT_EQ(dense_flops("NVIDIA H200", DType::kBf16), 989e12);
  EXPECT_EQ(dense_flops("NVIDIA A100-SXM4-80GB", DType::kFp32), 19.5e12);
  EXPECT_EQ(dense_flops("NVIDIA Imagined", DType::kBf16), std::nullopt);
  EXPECT_EQ(dense_flops("NVIDIA H100 80GB HBM3", DType::kInt64), std::nullopt);
}

TEST(Gpu, CudaVersions_AreSpelledAsUsersKnowThem) {
  EXPECT_EQ(cuda_version_text(13000), "13.0");
  EXPECT_EQ(cuda_version_text(12080), "12.8");
}

TEST(Gpu, KernelsAreForAmpereToHopper) {
  for (const auto& [major, runs] :
       {std::pair{7, false}, {8, true}, {9, true}, {10, false}, {12, false}})
    EXPECT_EQ(has_kernels({.major = major}), runs) << major;
  EXPECT_EQ(capability_text({.name = "NVIDIA T4", .major = 7, .minor = 5}),
            "NVIDIA T4 of compute capability 7.5");
}

// Whatever this machine has, asking is harmless and the answer is whole.
TEST(Gpu, AProbeNamesGpusOrAReason) {
  const GpuProbe& found = probe_gpus();
  EXPECT_EQ(found.gpus.empty(), !found.problem.empty());
  EXPECT_EQ(&found, &probe_gpus());
}

}  // namespace
}  // namespace capstan
