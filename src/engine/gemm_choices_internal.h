// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// run.gemm on a device: when products are measured, and that all ranks take the same algorithms.
// The first step of a process runs with what a file of an earlier one says, and notes the products
// that it says nothing about. Before the second, rank 0 measures those of all ranks, on memory of
// its own between two steps, and every rank takes what it found. From then on nothing changes: a
// product of another shape is multiplied as before a measurement.
// Why the same: copies of a weight that ranks update alike stay alike only if nothing that is
// computed twice differs in a bit: a layer's part that tensor-parallel ranks all compute, or a
// gradient that nobody sums. Gradients of data-parallel replicas are summed and would not need it.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "capstan/base/file.h"
#include "capstan/comm/communicator.h"
#include "capstan/ops/gemm.h"
#include "capstan/recipe/recipe.h"

namespace capstan::engine {

class GemmChoices {
 public:
  // file: kept over processes; empty: not kept. Null where products are LibTorch's. Throws EnvError
  // when run.gemm wants cuBLASLt and the device has none.
  [[nodiscard]] static std::unique_ptr<GemmChoices> make(const recipe::Run& run,
                                                         const comm::Communicator& world,
                                                         Path file);

  GemmChoices(std::shared_ptr<ops::Gemm> gemm, bool measures, comm::Communicator world, Path file);
  // Before every step. Collective over world in the first two.
  void before_step();

 private:
  void read();
  void measure();
  void take(const std::string& text);
  [[nodiscard]] std::vector<ops::GemmChoice> measured(
      const std::vector<ops::LtProblem>& wanted) const;

  std::shared_ptr<ops::Gemm> gemm_;
  bool measures_;
  comm::Communicator world_;
  Path file_;
  int steps_ = 0;
};

}  // namespace capstan::engine
