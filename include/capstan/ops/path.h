// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Which form of an op runs: our fused kernels (of the CPU or of the device), or the plain reference
// made of ATen calls. All give the same numbers up to rounding; an op's backward takes the form
// that its forward took.
#pragma once
#include <ATen/core/Tensor.h>

namespace capstan::ops {

enum class Path { kFused, kReference, kDevice };

// The guard of this thread if there is one, else the environment: CAPSTAN_OPS=fused|reference,
// default fused. Throws EnvError for another value.
[[nodiscard]] Path path();
// For an op on x: path() on the CPU. Elsewhere fused means the device's kernels, where there are
// any and they know the dtype.
[[nodiscard]] Path path_of(const at::Tensor& x);

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
