// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/device/matmul_peak.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "capstan/base/env.h"
#include "capstan/base/error.h"
#include "capstan/device/threads.h"

namespace capstan::device {
namespace {

at::ScalarType scalar_type_of(DType dtype) {
  switch (dtype) {
    case DType::kFp64:
      return at::kDouble;
    case DType::kFp32:
      return at::kFloat;
    case DType::kBf16:
      return at::kBFloat16;
    case DType::kFp16:
      return at::kHalf;
    default:
      break;
  }
  throw InternalError(ErrorText{.module = "device",
                                .what = "measuring the matmul peak",
                                .got = std::string(name_of(dtype)),
                                .need = "fp64, fp32, bf16 or fp16"});
}

struct Product {  // matrices are M x M
  at::Tensor a_MM, b_MM, out_MM;
  explicit Product(int64_t m, at::ScalarType type)
      : a_MM(at::ones({m, m}, type)),
        b_MM(at::ones({m, m}, type)),
        out_MM(at::empty({m, m}, type)) {}
  double seconds() {
    const int64_t begin = monotonic_ns();
    at::mm_out(out_MM, a_MM, b_MM);
    return static_cast<double>(monotonic_ns() - begin) * 1e-9;
  }
  [[nodiscard]] double gflop() const {
    const auto m = static_cast<double>(a_MM.size(0));
    return 2e-9 * m * m * m;
  }
};

// Restores the thread count of the calling thread.
struct ThreadsGuard {
  int before = at::get_num_threads();
  explicit ThreadsGuard(int count) { set_threads(count); }
  ~ThreadsGuard() { at::set_num_threads(before); }
};

}  // namespace

double measure_matmul_peak(DType dtype, int threads) {
  const at::ScalarType type = scalar_type_of(dtype);
  const at::NoGradGuard no_grad;
  const ThreadsGuard guard(threads);
  // Larger products run closer to the peak and mind a busy neighbour less; each size gets a slice
  // of time and is tried as long as two products (the first pays for page faults) promise to fit
  // into it.
  constexpr double kSliceSeconds = 0.1;
  double best = 0;
  for (const int64_t m : {256, 512, 1024, 2048}) {
    const auto size = static_cast<double>(m);
    if (best > 0 && 2 * 2e-9 * size * size * size / best > 2 * kSliceSeconds) break;
    Product product(m, type);
    double spent = product.seconds();
    for (int repeat = 0; repeat < 100 && (repeat == 0 || spent < kSliceSeconds); ++repeat) {
      const double seconds = product.seconds();
      best = std::max(best, product.gflop() / seconds);
      spent += seconds;
    }
  }
  return best;
}

}  // namespace capstan::device
