// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/ops/path.h"

#include <atomic>

#include "capstan/base/env.h"
#include "capstan/base/error.h"
#include "ops/on_device_internal.h"

namespace capstan::ops {
namespace {

constexpr int kNoGuard = -1;
std::atomic<const kernels::Api*> installed_kernels = nullptr;
thread_local int forced_path = kNoGuard;

Path path_of_environment() {
  const auto value = read_env("CAPSTAN_OPS");
  if (!value || value->empty() || *value == "fused") return Path::kFused;
  if (*value == "reference") return Path::kReference;
  throw EnvError(ErrorText{.module = "ops",
                           .what = "reading CAPSTAN_OPS",
                           .got = "'" + *value + "'",
                           .need = "fused or reference",
                           .why = "it chooses the form of every op",
                           .fix = "Unset it or set one of the two"});
}

}  // namespace

Path path() {
  if (forced_path != kNoGuard) return static_cast<Path>(forced_path);
  static const Path from_environment = path_of_environment();
  return from_environment;
}

Path path_of(const at::Tensor& x) {
  const Path wanted = path();
  if (x.is_cpu() || wanted == Path::kReference) return wanted;
  return device_kernels() && on_device::dtype_of(x) ? Path::kDevice : Path::kReference;
}

const kernels::Api* device_kernels() { return installed_kernels.load(std::memory_order_acquire); }

void install_device_kernels(const kernels::Api* api) {
  installed_kernels.store(api, std::memory_order_release);
}

PathGuard::PathGuard(Path path) : previous_(forced_path) { forced_path = static_cast<int>(path); }
PathGuard::~PathGuard() { forced_path = previous_; }

}  // namespace capstan::ops
