// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The device of gpu_*_test.cpp: the first GPU.
#include <gtest/gtest.h>

#include "capstan/base/gpu.h"
#include "capstan/device/cuda.h"

namespace capstan::test {
namespace {

class Gpu : public ::testing::Environment {
 public:
  void SetUp() override {
    if (!probe_gpus().problem.empty()) GTEST_SKIP() << probe_gpus().problem;
    device::start_cuda(0);
  }
};
const auto* const gpu = ::testing::AddGlobalTestEnvironment(new Gpu);

}  // namespace
}  // namespace capstan::test
