// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/ops/gemm.h"

#include <ATen/ATen.h>

#include <utility>

#include "capstan/base/check.h"
#include "capstan/base/error.h"
#include "capstan/base/log.h"
#include "ops/gemm_internal.h"

namespace capstan::ops {
namespace {

constexpr size_t kMostUnmeasured = 256;  // a model has some dozens

std::mutex install_mutex;
std::shared_ptr<LtApi>& installed() {
  static std::shared_ptr<LtApi> api;
  return api;
}

std::mutex share_mutex;
std::weak_ptr<Gemm>& shared_gemm() {
  static std::weak_ptr<Gemm> gemm;
  return gemm;
}

const char* stand_in_of(const LtProblem& problem) {
  if (is_fused(problem)) return "the product alone and kernels behind it";
  return has_libtorch_form(problem) ? "LibTorch's" : "a product in bf16 and an addition";
}

const float* scale_pointer(const Tensor& scale) {
  return scale.defined() ? scale.const_data_ptr<float>() : nullptr;
}

}  // namespace

std::shared_ptr<LtApi> installed_lt_api() {
  const std::scoped_lock lock(install_mutex);
  return installed();
}

void install_lt_api(std::shared_ptr<LtApi> api) {
  const std::scoped_lock lock(install_mutex);
  installed() = std::move(api);
}

void run_algorithm(LtApi& api, const LtProblem& problem, const LtAlgorithm& algorithm,
                   const Product& product) {
  const Tensor workspace =
      algorithm.workspace_bytes > 0
          ? at::empty({algorithm.workspace_bytes}, product.out_MN.options().dtype(at::kByte))
          : Tensor();
  const Tensor& aux = product.sum_MN.defined() ? product.sum_MN : product.gelu_at_MN;
  const LtPointers pointers{
      .a = product.b_KN.const_data_ptr(),
      .b = product.a_MK.const_data_ptr(),
      .d = product.out_MN.mutable_data_ptr(),
      .bias = product.bias_N.defined() ? product.bias_N.const_data_ptr() : nullptr,
      .aux = aux.defined() ? aux.mutable_data_ptr() : nullptr,
      .bias_gradient =
          product.row_sums_M.defined() ? product.row_sums_M.mutable_data_ptr() : nullptr,
      .a_scale = scale_pointer(product.b_scale),
      .b_scale = scale_pointer(product.a_scale),
      .workspace = workspace.defined() ? workspace.mutable_data_ptr() : nullptr};
  api.multiply(problem, pointers, algorithm, device::accelerator()->current_stream());
}

Gemm::Gemm(std::shared_ptr<LtApi> api, GemmLibrary library)
    : api_(std::move(api)), library_(library) {}
Gemm::~Gemm() = default;

std::shared_ptr<Gemm> Gemm::share(GemmLibrary library) {
  const std::shared_ptr<LtApi> api = installed_lt_api();
  if (!api)
    throw EnvError(ErrorText{.module = "ops",
                             .what = "multiplying by cuBLASLt (run.gemm)",
                             .got = "no cuBLASLt on this device",
                             .need = "the CUDA plug-in",
                             .fix = "Set run.gemm: libtorch"});
  const std::scoped_lock lock(share_mutex);
  std::shared_ptr<Gemm> gemm = shared_gemm().lock();
  if (!gemm) shared_gemm() = gemm = std::make_shared<Gemm>(api, library);
  CAPSTAN_CHECK(gemm->library_ == library, "two values of run.gemm in one process");
  return gemm;
}

std::shared_ptr<Gemm> Gemm::shared() {
  const std::scoped_lock lock(share_mutex);
  return shared_gemm().lock();
}

bool Gemm::multiply(const Product& product) {
  const std::optional<LtProblem> problem = lt_problem_of(product);
  if (!problem) return false;
  const std::optional<LtAlgorithm> algorithm = algorithm_of(*problem);
  if (!algorithm) return false;
  run_algorithm(*api_, *problem, *algorithm, product);
  return true;
}

std::optional<LtAlgorithm> Gemm::algorithm_of(const LtProblem& problem) {
  const std::scoped_lock lock(mutex_);
  if (const auto made = choices_.find(problem); made != choices_.end())
    return made->second.algorithm;
  note(problem);
  // Should its rival be faster.
  if (is_fused(problem)) note(plain_of(problem));
  const bool has_rival = is_fused(problem) || has_libtorch_form(problem);
  if (library_ == GemmLibrary::kAuto && has_rival) return std::nullopt;
  return first_algorithm(problem);
}

void Gemm::note(const LtProblem& problem) {
  if (unmeasured_.size() >= kMostUnmeasured || choices_.contains(problem)) return;
  if (unmeasured_.insert(problem).second && is_closed_)
    log::info("ops", "a product of {} after the choices were made: not measured",
              shape_text(problem));
}

std::optional<LtAlgorithm> Gemm::first_algorithm(const LtProblem& problem) {
  if (const auto known = firsts_.find(problem); known != firsts_.end()) return known->second;
  const std::vector<LtAlgorithm> list = api_->algorithms(problem, 1, kLtWorkspaceBytes);
  const std::optional<LtAlgorithm> first = list.empty() ? std::nullopt : std::optional(list[0]);
  if (!first)
    log::warning("ops", "cuBLASLt has no algorithm for a product of {}: it takes {}",
                 shape_text(problem), stand_in_of(problem));
  if (firsts_.size() < kMostUnmeasured) firsts_[problem] = first;
  return first;
}

std::vector<LtProblem> Gemm::unmeasured() const {
  const std::scoped_lock lock(mutex_);
  return {unmeasured_.begin(), unmeasured_.end()};
}

GemmChoice Gemm::measure(const LtProblem& problem) const {
  return fastest(*api_, problem, library_ == GemmLibrary::kAuto);
}

// Made with the rivals that the library has here.
bool Gemm::answers(const GemmChoice& choice) const {
  if (choice.algorithm && !api_->is_valid(choice.problem, *choice.algorithm)) return false;
  if (choice.us == 0 || is_fused(choice.problem)) return true;
  if (library_ == GemmLibrary::kCublaslt) return choice.algorithm.has_value();
  return choice.rival_us > 0 || !has_libtorch_form(choice.problem);
}

int64_t Gemm::adopt(const std::vector<GemmChoice>& choices) {
  const std::scoped_lock lock(mutex_);
  int64_t kept = 0;
  for (const GemmChoice& choice : choices) {
    if (!answers(choice)) continue;
    choices_[choice.problem] = choice;
    unmeasured_.erase(choice.problem);
    ++kept;
  }
  return kept;
}

void Gemm::close() {
  const std::scoped_lock lock(mutex_);
  is_closed_ = true;
}

std::vector<GemmChoice> Gemm::choices() const {
  const std::scoped_lock lock(mutex_);
  std::vector<GemmChoice> list;
  for (const auto& [problem, choice] : choices_) list.push_back(choice);
  return list;
}

}  // namespace capstan::ops
