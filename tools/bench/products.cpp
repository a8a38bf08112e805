// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// products [KEY=VALUE ...]: TFLOP/s of the products of a layer and the head on GPU 0, by LibTorch's
// call and by cuBLASLt's fastest algorithm, measured as run.gemm: auto measures them. Lines that
// end in GELU, its derivative or a bias gradient are fused: beside them is the time of their parts,
// the fastest product alone and kernels behind it. Keys: tokens, hidden, ffn, qkv (features of q, k
// and v together), vocabulary, bias (0, 1: with its gradient), gelu (0, 1: an MLP without a gate,
// with biases); without any, three models.
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

void report(const ops::Gemm& gemm, const std::string& name, const ops::Product& product) {
  const auto problem = ops::lt_problem_of(product);
  const ops::GemmChoice choice = problem ? gemm.measure(*problem) : ops::GemmChoice{};
  if (choice.us == 0)
    return fmt::print("{:28} {:60} not by cuBLASLt\n", name,
                      problem ? ops::shape_text(*problem) : "");
  const double flops = ops::flops_of(choice.problem) * 1e-6;
  fmt::print("{:28} {:60} {:9.1f} {:8.0f} {:9.1f} {:8.0f} {:7.2f}\n", name,
             ops::shape_text(choice.problem), choice.rival_us, flops / choice.rival_us, choice.us,
             flops / choice.us, choice.rival_us / choice.us);
}

// What is done in the pass of a product beside it.
enum class Gelu { kNone, kBehind, kInFront };

// y = x W^T, dx = dy W, dW += dy^T x.
void report_linear(const ops::Gemm& gemm, const std::string& name, int64_t tokens, int64_t out,
                   int64_t in, bool has_bias = false, Gelu gelu = Gelu::kNone) {
  const at::Tensor x = empty(tokens, in, at::kBFloat16), y = empty(tokens, out, at::kBFloat16),
                   w = empty(out, in, at::kBFloat16), dw = empty(out, in, at::kFloat);
  ops::Product forward{.out_MN = y, .a_MK = x, .b_KN = w.t()};
  ops::Product backward{.out_MN = x, .a_MK = y, .b_KN = w};
  ops::Product weights{.out_MN = dw, .a_MK = y.t(), .b_KN = x, .accumulates = true};
  if (has_bias) forward.bias_N = empty(1, out, at::kBFloat16).view({-1});
  report(gemm, name + " forward", forward);
  if (gelu == Gelu::kBehind) forward.sum_MN = at::empty_like(y);
  if (gelu == Gelu::kBehind) report(gemm, name + " forward", forward);
  report(gemm, name + " input gradient", backward);
  if (gelu == Gelu::kInFront) backward.gelu_at_MN = at::empty_like(x);
  if (gelu == Gelu::kInFront) report(gemm, name + " input gradient", backward);
  report(gemm, name + " weight gradient", weights);
  if (has_bias) weights.row_sums_M = empty(1, out, at::kFloat).view({-1});
  if (has_bias) report(gemm, name + " weight gradient", weights);
}

void report_model(const Sizes& s) {
  const auto gemm = ops::Gemm::share(ops::GemmLibrary::kAuto);
  fmt::print("\n{} tokens, hidden {}, on {}\n{:28} {:60} {:>9} {:>8} {:>9} {:>8} {:>7}\n",
             s.at("tokens"), s.at("hidden"), gemm->identity(), "product", "M x N x K", "rival",
             "TFLOP/s", "cuBLASLt", "TFLOP/s", "ratio");
  const int64_t tokens = s.at("tokens"), hidden = s.at("hidden"), ffn = s.at("ffn");
  const bool has_gelu = s.at("gelu") != 0, has_bias = has_gelu || s.at("bias") != 0;
  report_linear(*gemm, "qkv", tokens, s.at("qkv"), hidden, has_bias);
  report_linear(*gemm, "o", tokens, hidden, hidden, has_bias);
  if (has_gelu) {
    report_linear(*gemm, "up", tokens, ffn, hidden, has_bias, Gelu::kBehind);
    report_linear(*gemm, "down", tokens, hidden, ffn, has_bias, Gelu::kInFront);
  } else {
    report_linear(*gemm, "gate, up", tokens, 2 * ffn, hidden, has_bias);
    report_linear(*gemm, "down", tokens, hidden, ffn, has_bias);
  }
  report_linear(*gemm, "head", tokens, s.at("vocabulary"), hidden);
}

std::vector<Sizes> models_of(int argc, char** argv) {
  Sizes small = {{"tokens", 4096},      {"hidden", 768}, {"ffn", 2048}, {"qkv", 2304},
                 {"vocabulary", 50304}, {"bias", 0},     {"gelu", 0}};
  const Sizes large = {{"tokens", 8192},       {"hidden", 4096}, {"ffn", 14336}, {"qkv", 6144},
                       {"vocabulary", 128256}, {"bias", 0},      {"gelu", 0}};
  Sizes gpt2 = small;
  gpt2["ffn"] = 3072, gpt2["gelu"] = 1;
  if (argc == 1) return {small, large, gpt2};
  for (int i = 1; i < argc; ++i) {
    const std::string text = argv[i];
    const size_t at = text.find('=');
    const auto known = at == std::string::npos ? small.end() : small.find(text.substr(0, at));
    const std::string value = known == small.end() ? "" : text.substr(at + 1);
    if (value.empty() || value.size() > 8 ||
        value.find_first_not_of("0123456789") != std::string::npos)
      throw ConfigError(
          {.module = "bench",
           .what = "reading the arguments",
           .got = text,
           .need = "KEY=NUMBER with tokens, hidden, ffn, qkv, vocabulary, bias or gelu"});
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
