// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// products [KEY=VALUE ...]: TFLOP/s of the products of a layer and the head on GPU 0, by LibTorch's
// call and by cuBLASLt's fastest algorithm, measured as run.gemm: auto measures them.
// Keys: tokens, hidden, ffn, qkv (features of q, k and v together), vocabulary, bias (0, 1);
// without any, two models.
#include <ATen/ATen.h>
#include <fmt/core.h>

#include <exception>
#include <map>
#include <string>
#include <vector>

#include "capstan/base/error.h"
#include "capstan/device/accelerator.h"
#include "capstan/device/cuda.h"
#include "capstan/ops/gemm.h"

namespace {

using namespace capstan;
using Sizes = std::map<std::string, int64_t>;

at::Tensor empty(int64_t rows, int64_t columns, at::ScalarType type) {
  return at::empty({rows, columns}, at::TensorOptions().device(device::run_device()).dtype(type));
}

void report(const ops::Gemm& gemm, const char* name, const ops::Product& product) {
  const ops::GemmChoice choice = gemm.measure(ops::lt_problem_of(product).value());
  const double flops = ops::flops_of(choice.problem) * 1e-6;
  fmt::print("{:28} {:52} {:9.1f} {:8.0f} {:9.1f} {:8.0f} {:7.2f}\n", name,
             ops::shape_text(choice.problem), choice.rival_us, flops / choice.rival_us, choice.us,
             flops / choice.us, choice.rival_us / choice.us);
}

// y = x W^T, dx = dy W, dW += dy^T x.
void report_linear(const ops::Gemm& gemm, const std::string& name, const Sizes& s, int64_t out,
                   int64_t in) {
  const int64_t tokens = s.at("tokens");
  const at::Tensor x = empty(tokens, in, at::kBFloat16), y = empty(tokens, out, at::kBFloat16),
                   w = empty(out, in, at::kBFloat16), dw = empty(out, in, at::kFloat);
  ops::Product forward{.out_MN = y, .a_MK = x, .b_KN = w.t()};
  if (s.at("bias") != 0) forward.bias_N = empty(1, out, at::kBFloat16).view({-1});
  report(gemm, (name + " forward").c_str(), forward);
  report(gemm, (name + " input gradient").c_str(), {.out_MN = x, .a_MK = y, .b_KN = w});
  report(gemm, (name + " weight gradient").c_str(),
         {.out_MN = dw, .a_MK = y.t(), .b_KN = x, .accumulates = true});
}

void report_model(const Sizes& s) {
  const auto gemm = ops::Gemm::share(ops::GemmLibrary::kAuto);
  fmt::print("\n{} tokens, hidden {}, on {}\n{:28} {:52} {:>9} {:>8} {:>9} {:>8} {:>7}\n",
             s.at("tokens"), s.at("hidden"), gemm->identity(), "product", "M x N x K", "LibTorch",
             "TFLOP/s", "cuBLASLt", "TFLOP/s", "ratio");
  report_linear(*gemm, "qkv", s, s.at("qkv"), s.at("hidden"));
  report_linear(*gemm, "o", s, s.at("hidden"), s.at("hidden"));
  report_linear(*gemm, "gate, up", s, 2 * s.at("ffn"), s.at("hidden"));
  report_linear(*gemm, "down", s, s.at("hidden"), s.at("ffn"));
  report_linear(*gemm, "head", s, s.at("vocabulary"), s.at("hidden"));
}

std::vector<Sizes> models_of(int argc, char** argv) {
  Sizes small = {{"tokens", 4096}, {"hidden", 768},       {"ffn", 2048},
                 {"qkv", 2304},    {"vocabulary", 50304}, {"bias", 0}};
  const Sizes large = {{"tokens", 8192}, {"hidden", 4096},       {"ffn", 14336},
                       {"qkv", 6144},    {"vocabulary", 128256}, {"bias", 0}};
  if (argc == 1) return {small, large};
  for (int i = 1; i < argc; ++i) {
    const std::string text = argv[i];
    const size_t at = text.find('=');
    const auto known = at == std::string::npos ? small.end() : small.find(text.substr(0, at));
    const std::string value = known == small.end() ? "" : text.substr(at + 1);
    if (value.empty() || value.size() > 8 ||
        value.find_first_not_of("0123456789") != std::string::npos)
      throw ConfigError({.module = "bench",
                         .what = "reading the arguments",
                         .got = text,
                         .need = "KEY=NUMBER with tokens, hidden, ffn, qkv, vocabulary or bias"});
    known->second = std::stoll(value);
  }
  return {small};
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const std::vector<Sizes> models = models_of(argc, argv);
    device::start_cuda(0);
    for (const Sizes& sizes : models) report_model(sizes);
    return 0;
  } catch (const std::exception& error) {
    fmt::print(stderr, "{}\n", error.what());
    return 1;
  }
}
