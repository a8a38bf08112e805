// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The device of gpu_*_test.cpp: the fake one.
#include <gtest/gtest.h>

#include "capstan/ops/lt_api.h"
#include "support/fake_device/fake_device.h"
#include "support/fake_device/fake_lt.h"

namespace capstan::test {
namespace {

class FakeGpu : public ::testing::Environment {
 public:
  void SetUp() override {
    install_fake_device();
    ops::install_lt_api(std::make_shared<FakeLt>());
  }
};
const auto* const fake_gpu = ::testing::AddGlobalTestEnvironment(new FakeGpu);

}  // namespace
}  // namespace capstan::test
