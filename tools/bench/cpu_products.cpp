// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// cpu_products THREADS [ROUNDS [tokens hidden ffn qkv vocabulary]]: GFLOP/s of the bf16 products of
// a layer and the head on the CPU, by LibTorch and by ops::multiply in turn: medians of the rounds
// and the median of their ratios. Without sizes those of cpu_step's 32m.
#include <ATen/ATen.h>
#include <fmt/core.h>

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "capstan/base/env.h"
#include "capstan/device/allocator.h"
#include "capstan/device/threads.h"
#include "capstan/ops/gemm.h"

namespace {

using namespace capstan;

double median(std::vector<double> x) {
  std::nth_element(x.begin(), x.begin() + static_cast<int64_t>(x.size() / 2), x.end());
  return x[x.size() / 2];
}

// What LibTorch has on CPUs: a result of the factors' type.
void multiply_then_add(const ops::Product& p, at::Tensor& narrow) {
  if (p.out_MN.scalar_type() == at::kBFloat16) {
    at::Tensor out = p.out_MN;
    at::mm_out(out, p.a_MK, p.b_KN);
    return;
  }
  at::mm_out(narrow, p.a_MK, p.b_KN);
  p.out_MN.copy_(narrow);
}

template <class Call>
double microseconds(const Call& call) {
  const int64_t begin = monotonic_ns();
  call();
  return static_cast<double>(monotonic_ns() - begin) * 1e-3;
}

void report(const std::string& name, const ops::Product& p, int rounds) {
  at::Tensor narrow = at::empty(p.out_MN.sizes(), at::kBFloat16);
  std::vector<double> theirs, ours, ratios;
  for (int i = -1; i < rounds; ++i) {
    const double a = microseconds([&] { multiply_then_add(p, narrow); });
    const double b = microseconds([&] { ops::multiply(p); });
    if (i < 0) continue;
    theirs.push_back(a);
    ours.push_back(b);
    ratios.push_back(a / b);
  }
  const auto m = static_cast<double>(p.out_MN.size(0)), n = static_cast<double>(p.out_MN.size(1)),
             k = static_cast<double>(p.a_MK.size(1));
  const double mflop = 2e-6 * m * n * k;
  fmt::print("{:24} {:6.0f} x {:6.0f} x {:6.0f} {:9.0f} {:9.0f} {:7.2f}   best {:9.0f} {:9.0f}\n",
             name, m, n, k, 1e3 * mflop / median(theirs), 1e3 * mflop / median(ours),
             median(ratios), 1e3 * mflop / *std::ranges::min_element(theirs),
             1e3 * mflop / *std::ranges::min_element(ours));
}

// y = x W^T, dx = dy W, dW = dy^T x in fp32.
void report_linear(const std::string& name, int64_t tokens, int64_t out, int64_t in, int rounds) {
  const auto matrix = [](int64_t rows, int64_t columns) {
    return at::rand({rows, columns}).sub_(0.5).to(at::kBFloat16);
  };
  const at::Tensor x = matrix(tokens, in), y = matrix(tokens, out), w = matrix(out, in),
                   fresh_y = at::empty_like(y), fresh_x = at::empty_like(x),
                   dw = at::empty({out, in}, at::kFloat);
  report(name + " forward", {.out_MN = fresh_y, .a_MK = x, .b_KN = w.t()}, rounds);
  report(name + " input gradient", {.out_MN = fresh_x, .a_MK = y, .b_KN = w}, rounds);
  report(name + " weight gradient", {.out_MN = dw, .a_MK = y.t(), .b_KN = x}, rounds);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2 && argc != 3 && argc != 8) {
    fmt::print(stderr, "usage: cpu_products THREADS [ROUNDS [tokens hidden ffn qkv vocabulary]]\n");
    return 2;
  }
  device::install_cpu_allocator();
  device::set_threads(std::stoi(argv[1]));
  const int rounds = argc > 2 ? std::stoi(argv[2]) : 15;
  std::array<int64_t, 5> s = {2048, 512, 1408, 1024, 8192};
  for (int i = 3; i < argc; ++i) s[static_cast<size_t>(i - 3)] = std::stoll(argv[i]);
  const auto [tokens, hidden, ffn, qkv, vocabulary] = s;
  fmt::print("{:24} {:24} {:>9} {:>9} {:>7}\n", "product in bf16", "M x N x K", "LibTorch", "ours",
             "ratio");
  report_linear("qkv", tokens, qkv, hidden, rounds);
  report_linear("o", tokens, hidden, hidden, rounds);
  report_linear("gate, up", tokens, 2 * ffn, hidden, rounds);
  report_linear("down", tokens, hidden, ffn, rounds);
  report_linear("head", std::min<int64_t>(tokens, 512), vocabulary, hidden, rounds);
  return 0;
}
