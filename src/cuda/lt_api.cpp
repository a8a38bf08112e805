// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "cuda/lt_api.h"

#include <cublasLt.h>
#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <cstring>
#include <mutex>

#include "capstan/base/error.h"
#include "cuda/lt_descriptors.h"

namespace capstan::cuda {
namespace {

using ops::LtAlgorithm;
using ops::LtPointers;
using ops::LtProblem;

static_assert(sizeof(cublasLtMatmulAlgo_t) == sizeof(LtAlgorithm::bits));

void check(cudaError_t result, const char* call) {
  if (result == cudaSuccess) return;
  throw EnvError(ErrorText{.module = "cuda",
                           .what = fmt::format("calling {}", call),
                           .got = cudaGetErrorString(result),
                           .need = "success",
                           .fix = "Run again with CUDA_LAUNCH_BLOCKING=1"});
}

cublasLtMatmulAlgo_t theirs(const LtAlgorithm& algorithm) {
  cublasLtMatmulAlgo_t made;
  std::memcpy(&made, algorithm.bits.data(), sizeof(made));
  return made;
}

class Timer {
 public:
  Timer() {
    check(cudaEventCreate(&first_), "cudaEventCreate");
    check(cudaEventCreate(&last_), "cudaEventCreate");
  }
  ~Timer() {
    if (first_) cudaEventDestroy(first_);
    if (last_) cudaEventDestroy(last_);
  }
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;
  void start(cudaStream_t stream) { check(cudaEventRecord(first_, stream), "cudaEventRecord"); }
  double stop_us(cudaStream_t stream) {
    float ms = 0;
    check(cudaEventRecord(last_, stream), "cudaEventRecord");
    check(cudaEventSynchronize(last_), "cudaEventSynchronize");
    check(cudaEventElapsedTime(&ms, first_, last_), "cudaEventElapsedTime");
    return 1000.0 * static_cast<double>(ms);
  }

 private:
  cudaEvent_t first_ = nullptr, last_ = nullptr;
};

class LibraryLt final : public ops::LtApi {
 public:
  std::string identity() override {
    int device = 0, driver = 0;
    cudaDeviceProp properties{};
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaGetDeviceProperties(&properties, device), "cudaGetDeviceProperties");
    check(cudaDriverGetVersion(&driver), "cudaDriverGetVersion");
    return fmt::format("{}, {} multiprocessors, driver {}, cuBLASLt {}", properties.name,
                       properties.multiProcessorCount, driver, cublasLtGetVersion());
  }

  std::vector<LtAlgorithm> algorithms(const LtProblem& problem, int most,
                                      int64_t workspace_bytes) override {
    const LtDescriptors of(problem);
    const LtPreference preference(problem, workspace_bytes);
    std::vector<cublasLtMatmulHeuristicResult_t> found(static_cast<size_t>(most));
    int count = 0;
    const cublasStatus_t status =
        cublasLtMatmulAlgoGetHeuristic(handle(), of.product, of.a, of.b, of.d, of.d,
                                       preference.handle, most, found.data(), &count);
    if (status == CUBLAS_STATUS_NOT_SUPPORTED) return {};
    check_lt(status, "cublasLtMatmulAlgoGetHeuristic");
    std::vector<LtAlgorithm> list;
    for (int i = 0; i < count; ++i) {
      const auto& result = found[static_cast<size_t>(i)];
      if (result.state != CUBLAS_STATUS_SUCCESS) continue;
      LtAlgorithm algorithm;
      std::memcpy(algorithm.bits.data(), &result.algo, sizeof(result.algo));
      algorithm.workspace_bytes = static_cast<int64_t>(result.workspaceSize);
      list.push_back(algorithm);
    }
    return list;
  }

  bool is_valid(const LtProblem& problem, const LtAlgorithm& algorithm) override {
    const LtDescriptors of(problem);
    const cublasLtMatmulAlgo_t algo = theirs(algorithm);
    cublasLtMatmulHeuristicResult_t result{};
    return cublasLtMatmulAlgoCheck(handle(), of.product, of.a, of.b, of.d, of.d, &algo, &result) ==
               CUBLAS_STATUS_SUCCESS &&
           static_cast<int64_t>(result.workspaceSize) <= algorithm.workspace_bytes;
  }

  void multiply(const LtProblem& problem, const LtPointers& at, const LtAlgorithm& algorithm,
                device::Stream stream) override {
    const LtDescriptors of(problem, &at);
    const cublasLtMatmulAlgo_t algo = theirs(algorithm);
    const float alpha = 1, beta = problem.accumulates ? 1 : 0;
    check_lt(cublasLtMatmul(handle(), of.product, &alpha, at.a, of.a, at.b, of.b, &beta, at.d, of.d,
                            at.d, of.d, &algo, at.workspace,
                            static_cast<size_t>(algorithm.workspace_bytes),
                            static_cast<cudaStream_t>(stream.handle)),
             "cublasLtMatmul");
  }

  double time_us(device::Stream stream, int repeats, const std::function<void()>& work) override {
    const auto on = static_cast<cudaStream_t>(stream.handle);
    Timer timer;
    timer.start(on);
    for (int i = 0; i < repeats; ++i) work();
    return timer.stop_us(on);
  }

 private:
  // Lives as long as the process, as LibTorch's own do.
  cublasLtHandle_t handle() {
    const std::scoped_lock lock(mutex_);
    if (!handle_) check_lt(cublasLtCreate(&handle_), "cublasLtCreate");
    return handle_;
  }

  std::mutex mutex_;
  cublasLtHandle_t handle_ = nullptr;
};

}  // namespace

std::shared_ptr<ops::LtApi> make_lt_api() { return std::make_shared<LibraryLt>(); }

}  // namespace capstan::cuda
