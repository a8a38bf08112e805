// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Which form of an op runs: our fused kernels, or the plain reference made of ATen calls. Both give
// the same numbers up to rounding; an op's backward takes the form that its forward took.
#pragma once
#include <ATen/core/Tensor.h>

namespace capstan::ops {

enum class Path { kFused, kReference };

// The guard of this thread if there is one, else the environment: CAPSTAN_OPS=fused|reference,
// default fused. Throws EnvError for another value.
[[nodiscard]] Path path();
// For an op on x. Off the CPU the reference form: ATen has it for every device.
[[nodiscard]] inline Path path_of(const at::Tensor& x) {
  return x.is_cpu() ? path() : Path::kReference;
}

// Forces a form for ops called from this thread while it lives.
class PathGuard {
 public:
  explicit PathGuard(Path path);
  ~PathGuard();
  PathGuard(const PathGuard&) = delete;
  PathGuard& operator=(const PathGuard&) = delete;

 private:
  int previous_;
};

}  // namespace capstan::ops
