// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "support/fake_device/capture.h"

#include <atomic>
#include <memory>

#include "support/fake_device/fake_device.h"
#include "support/fake_device/host_tensor.h"
#include "support/fake_device/memory.h"

namespace capstan::test {
namespace fake {
namespace {

thread_local std::unique_ptr<Recording> current;
std::atomic<int64_t> launches = 0;

void copy_tensor(const at::Tensor& made, const at::Tensor& recorded) {
  if (!made.defined() || !made.is_privateuseone() || made.numel() == 0) return;
  if (made.storage().data() == recorded.storage().data()) return;
  host_view(recorded).copy_(host_view(made));
}

}  // namespace

bool is_capturing() { return current != nullptr; }

void begin_capture() {
  TORCH_CHECK(!current, "a capture inside another");
  current = std::make_unique<Recording>();
  current->memory = snapshot();
}

Recording* end_capture() {
  TORCH_CHECK(current, "no capture to end");
  restore(current->memory);
  current->memory.clear();
  return current.release();
}

void launch(const Recording& recording) {
  TORCH_CHECK(!current, "a graph launched during a capture");
  ++launches;
  for (const auto& op : recording.ops) op();
}

at::Tensor unowned(const at::Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_privateuseone()) return tensor;
  c10::DataPtr place(const_cast<void*>(tensor.storage().data()), fake_device());
  const c10::Storage storage(c10::Storage::use_byte_size_t(), tensor.storage().nbytes(),
                             std::move(place), nullptr, /*resizable=*/false);
  return over(tensor, storage, c10::DispatchKey::PrivateUse1);
}

at::IValue unowned(const at::IValue& value) {
  if (value.isTensor()) return unowned(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& t : value.toTensorVector()) list.push_back(unowned(t));
    return list;
  }
  if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const std::optional<at::Tensor>& t : value.toOptionalTensorVector())
      list.push_back(t ? std::optional(unowned(*t)) : std::nullopt);
    return list;
  }
  return value;
}

void copy_result(const at::IValue& made, const at::IValue& recorded) {
  if (made.isTensor()) return copy_tensor(made.toTensor(), recorded.toTensor());
  if (!made.isTensorList()) return;
  const auto from = made.toTensorVector(), to = recorded.toTensorVector();
  for (size_t i = 0; i < from.size(); ++i) copy_tensor(from[i], to[i]);
}

}  // namespace fake

void record_for_graph(std::function<void()> op) {
  if (fake::current) fake::current->ops.push_back(std::move(op));
}

int64_t graph_launches() { return fake::launches; }

}  // namespace capstan::test
