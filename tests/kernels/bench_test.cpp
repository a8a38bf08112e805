// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The cases of capstan_kernels_bench on the emulator, with few rows: launchers take them, nothing
// is read or written beside the memory that they give, and no kernel is left out.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <map>
#include <regex>
#include <set>

#include "../../tools/bench/kernels/cases.h"
#include "../../tools/bench/kernels/timing.h"
#include "capstan/base/file.h"
#include "kernels/device.h"

namespace capstan::bench {
namespace {

std::map<void*, kernels::test::Memory>& memories() {
  static std::map<void*, kernels::test::Memory> held;
  return held;
}

std::set<std::string>& reported() {
  static std::set<std::string> kernels;
  return kernels;
}

}  // namespace

const kernels::Api& api() { return kernels::test::api(); }

DeviceMemory::DeviceMemory(size_t bytes) {
  kernels::test::Memory memory(bytes);
  std::memset(memory.data(), 0, bytes);
  data_ = memory.data();
  memories().emplace(data_, std::move(memory));
}
DeviceMemory::~DeviceMemory() { memories().erase(data_); }
void DeviceMemory::write(const void* from, size_t bytes) { std::memcpy(data_, from, bytes); }

double median_us(const std::function<void(kernels::Stream)>& run) {
  run(nullptr);
  return 1;
}

void report(const std::string& kernel, const std::string& shape, double bytes, double /*us*/) {
  EXPECT_GT(bytes, 0) << kernel << ", " << shape;
  EXPECT_LT(kernel.size(), 24U) << "column of the table";
  EXPECT_LT(shape.size(), 44U) << "column of the table";
  reported().insert(kernel);
}

namespace {

std::set<std::string> launchers() {
  const std::string text =
      read_file(std::string(CAPSTAN_SOURCE_DIR) + "/include/capstan/kernels/api.h");
  static const std::regex kDeclaration("Launcher<\\w+> ([\\w, ]+);"), kName("\\w+");
  std::set<std::string> names;
  for (std::sregex_iterator line(text.begin(), text.end(), kDeclaration), end; line != end;
       ++line) {
    const std::string list = (*line)[1];
    for (std::sregex_iterator name(list.begin(), list.end(), kName); name != end; ++name)
      names.insert(name->str());
  }
  names.erase("copy");  // what the others are compared with
  return names;
}

TEST(KernelBench, EveryKernelIsMeasuredAndTakesItsCase) {
  run_all({.rows = 1024, .width = 16});
  EXPECT_GE(launchers().size(), 30U);
  EXPECT_THAT(reported(), ::testing::ContainerEq(launchers()));
  EXPECT_TRUE(memories().empty());
}

}  // namespace
}  // namespace capstan::bench
