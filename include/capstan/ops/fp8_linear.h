// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The linear layers of a model in fp8 (precision.fp8). y = x W^T with x and W in e4m3; dx = dy W
// and dW = dy^T x with dy in the format of gradients. Every product reads both factors along the
// contracted columns, as cuBLASLt wants them, so dx takes W^T and dW takes dy^T and x^T.
// Scales: tensor: one per factor and call, from its own maximum. row: one per row of each factor as
// multiplied (a token of x, an output feature of W, ...). delayed: one per factor; those of x and
// dy come from the largest maximum of the last `history` steps, over all ranks and micro-batches;
// the first step, and weights always, take their own maximum. Under tensor parallel a maximum is
// that of the part that is multiplied here.
// Between forward and backward x stays as it was (bf16): the backward casts it again, transposed.
// Legend: N tokens, D input features, O output features, P projections.
#pragma once
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "capstan/ops/fp8.h"
#include "capstan/param/param.h"

namespace capstan::ops {

using param::Param;
using param::Projection;

enum class Fp8Scaling { kTensor, kRow, kDelayed };

struct Fp8Options {
  Fp8Scaling scaling = Fp8Scaling::kTensor;
  Fp8Format gradients = Fp8Format::kE5m2;
  // Casts of weights stay until the weights change: two bytes per element. Without, every call
  // makes them (weights that are gathered for a pass).
  bool keeps_weights = true;
  int64_t history = 16;                  // delayed
  std::vector<std::string> projections;  // delayed: names of all first parts, the same on all ranks
  at::Device device = at::kCPU;          // of the history
};

// Belongs to one rank, outlives the graphs of its passes. x, dy: bf16 (or fp32), rows [N, *].
class Fp8Linear {
 public:
  explicit Fp8Linear(Fp8Options options);

  // False where precision.keep_fp32 keeps the weight wide: it is multiplied as it is.
  [[nodiscard]] static bool covers(const Projection& projection);
  // out [N, O] = x W^T (+ bias). observes: the pass counts for the history.
  void forward(const Tensor& out_NO, const Tensor& x_ND, const Projection& projection,
               const Tensor& bias_O, bool observes);
  // out [N, D] = dy W
  void input_gradient(const Tensor& out_ND, const Tensor& grad_NO, const Projection& projection);
  // slot (+)= dy^T x, summed in the slot's fp32; on a device without cuBLASLt (run.gemm: libtorch)
  // the product is rounded to the type of dy before it is added. May run later in the step.
  void add_weight_gradient(param::GradSlot& slot, const Tensor& grad_NO, const Tensor& x_ND,
                           const Projection& projection);

  // Casts of weights are made again: a graph has its own.
  void forget_weights() { kept_.clear(); }

  // Delayed scaling; P rows of (x, dy).
  [[nodiscard]] bool is_delayed() const { return options_.scaling == Fp8Scaling::kDelayed; }
  [[nodiscard]] Tensor step_maxima_P2() const { return maxima_P2_; }  // fp32, since finish_step
  [[nodiscard]] Tensor history_HP2() const { return history_HP2_; }   // fp32, newest first
  // Moves the step's maxima, joined over all ranks by the caller, into the history; a step that was
  // not applied leaves none.
  void finish_step(bool applied);
  // The same where the device decides (skip: int32 without dims, there); has fixed arguments and
  // may be captured. Until note_applied() a pass finds its own maxima and takes them unless the
  // device has a history by then.
  void finish_step_on_device(const Tensor& skip);
  // The host has heard that a step was applied. Whether passes are other ones from here on.
  bool note_applied() { return !std::exchange(has_history_, true); }
  void refresh();  // after the history was written to

 private:
  enum Role { kInput, kGradient };
  struct Kept {
    std::vector<uint64_t> versions;
    std::optional<Fp8Matrix> forward_OD, turned_DO;
  };
  [[nodiscard]] Fp8Matrix cast(const Tensor& x, Fp8Format format, bool transposed) const;
  [[nodiscard]] Fp8Matrix cast(const Tensor& x, const Projection& projection, Role role,
                               bool transposed, bool observes) const;
  [[nodiscard]] Tensor expected_largest(const Tensor& x, const Tensor& expected_1) const;
  [[nodiscard]] Fp8Matrix weight(const Projection& projection, bool turned);
  [[nodiscard]] Fp8Format format_of(Role role) const;

  Fp8Options options_;
  std::map<std::pair<param::ParamStore*, int>, Kept> kept_;  // by the first part
  std::map<std::string, int64_t> rows_;                      // of projections
  Tensor maxima_P2_, history_HP2_, expected_P2_;
  Tensor holds_history_;      // bool without dims, on the device
  bool has_history_ = false;  // as far as the host knows
};

// How a pass multiplies: in the weight's type, or in fp8 where given and the weight is covered.
struct LinearMode {
  Fp8Linear* fp8 = nullptr;
  bool observes = false;  // the pass is one of training
};

}  // namespace capstan::ops
