// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <cstddef>
#include <functional>
#include <memory>
#include <vector>

#include "capstan/ops/keep.h"
#include "capstan/ops/path.h"

namespace capstan::ops {

class Repeat;

// A node whose outputs may be made again.
struct RemakingNode : torch::autograd::Node {
  std::shared_ptr<Repeat> repeat;  // whose result is output 0
  // Null where the output has to be kept.
  [[nodiscard]] virtual std::unique_ptr<Kept> remade(size_t output) = 0;
};

// What a node holds of one of its saved tensors.
class Saved {
 public:
  // is_output: of the node itself.
  Saved(const Tensor& tensor, bool is_output);
  [[nodiscard]] Tensor get(const std::shared_ptr<torch::autograd::Node>& node = nullptr) const;

 private:
  torch::autograd::SavedVariable variable_;  // where kept_ is null
  std::unique_ptr<Kept> kept_;
};

// One call of remake(): what its ops saved, in order, once they have been made again.
class Repeat : public std::enable_shared_from_this<Repeat> {
 public:
  using Forward = std::function<Tensor(const Tensor& x, bool again)>;
  Repeat(const Tensor& x, Forward forward);

  Tensor run(const Tensor& x);
  [[nodiscard]] std::unique_ptr<Kept> slot();  // of the next saved tensor
  [[nodiscard]] std::unique_ptr<Kept> result();
  // A tensor that was made again. False in the first run.
  bool take_in(const Tensor& tensor);
  Tensor take(size_t slot);
  Tensor take_result();

  // That of the call running on this thread, or null.
  [[nodiscard]] static Repeat* running();

 private:
  class Scope;
  void make();

  Saved input_;
  bool input_requires_grad_;
  Forward forward_;
  Path path_;
  size_t slots_ = 0;
  int result_users_ = 0;
  bool is_again_ = false;
  std::vector<Tensor> made_;
  Tensor result_;
};

}  // namespace capstan::ops
