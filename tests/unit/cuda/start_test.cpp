// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The plug-in opened by processes of their own, without a GPU: LibTorch has to learn of CUDA from
// it before it looks.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>

#include "capstan/base/error.h"
#include "capstan/comm/nccl.h"
#include "capstan/device/accelerator.h"
#include "capstan/ops/device_kernels.h"
#include "capstan/ops/lt_api.h"
#include "device/cuda_internal.h"

namespace capstan::device {
namespace {

[[noreturn]] void open_and_exit(const char* path) {
  try {
    open_cuda_plugin(path);
  } catch (const EnvError& error) {
    std::fputs(error.what(), stderr);
    std::_Exit(1);
  }
  const bool has_all = accelerator() && ops::device_kernels() && ops::installed_lt_api() &&
                       comm::installed_nccl_api();
  std::_Exit(has_all ? 0 : 2);
}

TEST(StartCuda, ThePluginInstallsAllItHas) {
  EXPECT_EXIT(open_and_exit(CAPSTAN_TEST_PLUGIN), ::testing::ExitedWithCode(0), "");
}

TEST(StartCuda, PlainOpsMayComeFirst) {
  const auto start = [] {
    (void)at::mm(at::ones({4, 4}), at::ones({4, 4}));
    open_and_exit(CAPSTAN_TEST_PLUGIN);
  };
  EXPECT_EXIT(start(), ::testing::ExitedWithCode(0), "");
}

TEST(StartCuda, ABackwardBeforeItIsRefused) {
  const auto start = [] {
    const at::Tensor x = at::ones({2}).set_requires_grad(true);
    x.mul(2).sum().backward();
    open_and_exit(CAPSTAN_TEST_PLUGIN);
  };
  EXPECT_EXIT(start(), ::testing::ExitedWithCode(1), "start_cuda before the first op");
}

TEST(StartCuda, AnotherLibraryIsRefused) {
  EXPECT_EXIT(open_and_exit("/nonexistent.so"), ::testing::ExitedWithCode(1), "nonexistent");
}

}  // namespace
}  // namespace capstan::device
