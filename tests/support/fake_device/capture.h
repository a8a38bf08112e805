// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Graphs of the fake device: the ops of a capture as functions that run them again. Of the calling
// thread: others are not recorded.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <functional>
#include <vector>

namespace capstan::test::fake {

struct Recording {
  std::vector<std::function<void()>> ops;
  std::vector<char> memory;  // before the capture
};

[[nodiscard]] bool is_capturing();
void begin_capture();
[[nodiscard]] Recording* end_capture();  // the caller's
void launch(const Recording& recording);

// The same place in memory, without keeping it alive; CPU tensors as they are.
[[nodiscard]] at::Tensor unowned(const at::Tensor& tensor);
[[nodiscard]] at::IValue unowned(const at::IValue& value);
// Bytes of tensors that lie elsewhere than those of the recorded result.
void copy_result(const at::IValue& made, const at::IValue& recorded);

}  // namespace capstan::test::fake
