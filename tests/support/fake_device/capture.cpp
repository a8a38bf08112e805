// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "support/fake_device/capture.h"

#include <atomic>
#include <memory>
#include <set>

#include "support/fake_device/fake_device.h"
#include "support/fake_device/host_tensor.h"
#include "support/fake_device/memory.h"

namespace capstan::test {
namespace fake {
namespace {

thread_local std::unique_ptr<Recording> current;
std::atomic<int64_t> launches = 0;
thread_local int64_t thread_launches = 0;

// Events that were last recorded in a capture.
std::set<void*>& captured() {
  static auto* const events = new std::set<void*>;
  return *events;
}

Progress& progress_of(device::Stream stream) {
  const auto found = current->streams.find(stream.handle);
  TORCH_CHECK(found != current->streams.end(), "a stream that is not part of the capture is used");
  return found->second;
}

void join(Progress& progress, const Progress& other) {
  for (const auto& [stream, jobs] : other) progress[stream] = std::max(progress[stream], jobs);
}

// Where a launch does what the first stream of the capture was given.
std::function<device::Stream()> at_launch(device::Accelerator& accelerator, device::Stream stream) {
  if (stream.handle != current->origin.handle) return [stream] { return stream; };
  return [&accelerator] { return accelerator.current_stream(); };
}

void copy_tensor(const at::Tensor& made, const at::Tensor& recorded) {
  if (!made.defined() || !made.is_privateuseone() || made.numel() == 0) return;
  if (made.storage().data() == recorded.storage().data()) return;
  host_view(recorded).copy_(host_view(made));
}

}  // namespace

bool is_capturing() { return current != nullptr; }

void begin_capture(device::Stream origin, int pool) {
  TORCH_CHECK(!current, "a capture inside another");
  current = std::make_unique<Recording>();
  current->origin = origin;
  current->pool = pool;
  add_graph(pool);
  current->streams[origin.handle];
  current->memory = snapshot();
}

Recording* end_capture() {
  TORCH_CHECK(current, "no capture to end");
  restore(current->memory);
  current->memory = {};
  auto made = std::move(current);
  Progress& origin = made->streams.at(made->origin.handle);
  for (auto& [stream, progress] : made->streams)
    if (origin[stream] < progress[stream]) {
      destroy(made.release());
      TORCH_CHECK(false, "a capture ends before a stream was joined");
    }
  return made.release();
}

void destroy(Recording* recording) {
  if (!recording) return;
  remove_graph(recording->pool);
  delete recording;
}

bool record_in_capture(device::Accelerator& accelerator, device::Event event,
                       device::Stream stream) {
  const std::lock_guard lock(state_mutex());
  if (!current) {
    captured().erase(event.handle);
    return false;
  }
  const auto own = std::shared_ptr<device::Event>(new device::Event(accelerator.create_event()),
                                                  [&accelerator](device::Event* made) {
                                                    accelerator.destroy(*made);
                                                    delete made;
                                                  });
  current->marks[event.handle] = {own, progress_of(stream)};
  captured().insert(event.handle);
  current->ops.push_back([&accelerator, own, where = at_launch(accelerator, stream)] {
    accelerator.record(*own, where());
  });
  return true;
}

bool wait_in_capture(device::Accelerator& accelerator, device::Stream stream, device::Event event) {
  if (!current) {
    check_not_captured(event);
    return false;
  }
  const auto mark = current->marks.find(event.handle);
  TORCH_CHECK(mark != current->marks.end(), "a capture waits for what was queued before it");
  Progress& progress = current->streams[stream.handle];
  join(progress, mark->second.behind);
  ++progress[stream.handle];
  current->ops.push_back(
      [&accelerator, own = mark->second.event, where = at_launch(accelerator, stream)] {
        accelerator.wait(where(), *own);
      });
  return true;
}

bool run_in_capture(device::Stream stream, std::function<void()> start) {
  if (!current) return false;
  ++progress_of(stream)[stream.handle];
  current->ops.push_back(std::move(start));
  return true;
}

void check_not_captured(device::Event event) {
  const std::lock_guard lock(state_mutex());
  TORCH_CHECK(!captured().contains(event.handle),
              "an event of a capture is waited for or queried outside of it");
}

void forget(device::Event event) {
  const std::lock_guard lock(state_mutex());
  captured().erase(event.handle);
}

void launch(const Recording& recording) {
  TORCH_CHECK(!current, "a graph launched during a capture");
  ++launches;
  ++thread_launches;
  struct Scratch {
    Scratch() { allocate_from(kScratch, current_stream()); }
    ~Scratch() { allocate_from(0, 0); }
  } scratch;
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
int64_t graph_launches_of_thread() { return fake::thread_launches; }

}  // namespace capstan::test
