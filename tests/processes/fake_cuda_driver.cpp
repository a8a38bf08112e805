// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// An NVIDIA driver for tests: libcuda.so.1 with what the program asks of it, and the GPUs that
// FAKE_GPUS counts (2 without it; "broken": it does not start), of compute capability FAKE_MAJOR.0
// (9 without it).
#include <cstddef>
#include <cstdlib>
#include <cstring>

namespace {

const char* gpus() {
  const char* const text = std::getenv("FAKE_GPUS");
  return text ? text : "2";
}

}  // namespace

extern "C" {

int cuInit(unsigned /*flags*/) { return std::strcmp(gpus(), "broken") == 0 ? 999 : 0; }
int cuDriverGetVersion(int* version) {
  *version = 13000;
  return 0;
}
int cuDeviceGetCount(int* count) {
  *count = std::atoi(gpus());
  return 0;
}
int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return 0;
}
int cuDeviceGetName(char* name, int length, int /*device*/) {
  std::strncpy(name, "NVIDIA Imagined", static_cast<size_t>(length));
  return 0;
}
int cuDeviceTotalMem_v2(size_t* bytes, int /*device*/) {
  *bytes = size_t{80} << 30;
  return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int /*device*/) {
  const char* const major = std::getenv("FAKE_MAJOR");
  *value = attribute == 75 ? (major ? std::atoi(major) : 9) : attribute == 76 ? 0 : 132;
  return 0;
}
int cuGetErrorString(int /*result*/, const char** text) {
  *text = "unknown error";
  return 0;
}
}
