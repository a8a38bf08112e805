// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The device beside the CPU that this process computes on: streams, events and memory, as the CUDA
// plug-in gives them and the fake device of the tests imitates them. One process has at most one
// kind, and one device of it: a rank's. Work on a stream runs in order; nothing here waits for the
// device unless it says so. Functions are thread-safe; the current stream is the calling thread's.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>

namespace capstan::device {

// Owned by the accelerator; as small as a pointer so that they may be copied.
struct Stream {
  void* handle = nullptr;
};
struct Event {
  void* handle = nullptr;
};

// Work of a stream, recorded once and launched as a whole.
struct Graph {
  void* handle = nullptr;
};

// Memory that graphs share with each other and with the work before them.
struct Pool {
  void* handle = nullptr;
};

struct DeviceMemory {
  int64_t free_bytes = 0, total_bytes = 0;              // of the device, all processes
  int64_t allocated_bytes = 0, peak_bytes = 0;          // tensors of this process
  int64_t reserved_bytes = 0, peak_reserved_bytes = 0;  // what its allocator holds
};

class Accelerator {
 public:
  virtual ~Accelerator() = default;
  [[nodiscard]] virtual const char* name() const = 0;  // "cuda"
  [[nodiscard]] virtual c10::DeviceType type() const = 0;
  [[nodiscard]] virtual int device_count() const = 0;
  // Which device this process uses from here on, in every thread. Throws EnvError when there is no
  // such device.
  virtual void set_device(int index) = 0;
  [[nodiscard]] virtual c10::Device device() const = 0;

  [[nodiscard]] virtual Stream current_stream() const = 0;
  // What this thread's ops are queued on until the next call; see StreamGuard.
  virtual void set_current_stream(Stream stream) = 0;
  // Lives as long as the process.
  [[nodiscard]] virtual Stream create_stream(bool high_priority) = 0;
  virtual void synchronize(Stream stream) = 0;  // the host waits

  [[nodiscard]] virtual Event create_event() = 0;
  virtual void destroy(Event event) = 0;
  virtual void record(Event event, Stream stream) = 0;
  virtual void wait(Stream stream, Event event) = 0;          // the stream waits, not the host
  [[nodiscard]] virtual bool is_done(Event event) const = 0;  // true before the first record
  virtual void synchronize(Event event) = 0;                  // the host waits

  // From begin_capture to end_capture what this thread queues on its current stream, which must not
  // be the default one, is recorded and not run. So is what it queues on streams that wait for an
  // event recorded meanwhile; the current stream must wait for their ends in turn before the
  // capture ends. Nothing may wait for the device, ask whether it is done, or wait for an event
  // from before. Tensors from before must stay where they are as long as the graph is launched;
  // memory that is allocated meanwhile is the pool's and the graph's. One capture at a time. The
  // defaults throw InternalError: an accelerator without graphs.
  virtual void begin_capture(Pool pool);
  [[nodiscard]] virtual Graph end_capture();  // throws when the recording failed
  [[nodiscard]] virtual bool is_capturing() const { return false; }  // on the current stream
  virtual void launch(Graph graph);                                  // on the current stream
  virtual void destroy(Graph graph);

  // Between begin_allocating and end_allocating memory for the current stream is taken from the
  // pool, where what is free again serves later captures on the same stream, and each of those the
  // next ones. So graphs of one pool are launched in the order of their captures, and nothing is
  // allocated between begin_allocating and end_allocating while they exist. A pool outlives its
  // graphs.
  [[nodiscard]] virtual Pool create_pool();
  virtual void destroy(Pool pool);
  virtual void begin_allocating(Pool pool);
  virtual void end_allocating(Pool pool);

  // The tensor's memory is not given out again before work queued on `stream` so far is done.
  virtual void keep_for(const at::Tensor& tensor, Stream stream) = 0;
  // Host memory that the device reads and writes without a copy.
  [[nodiscard]] virtual at::Tensor empty_pinned(at::IntArrayRef sizes, at::ScalarType dtype) = 0;
  [[nodiscard]] virtual DeviceMemory memory() const = 0;
  virtual void reset_peak() = 0;

  // Whether at::_grouped_mm multiplies groups of rows in this type without the host learning how
  // many rows there are. What it does else makes the host wait.
  [[nodiscard]] virtual bool has_grouped_products(at::ScalarType) const { return false; }
};

// Null on the CPU. Set once, before the first use of the device; it must outlive its users.
[[nodiscard]] Accelerator* accelerator();
void install_accelerator(Accelerator* accelerator);
// Where tensors of a run live: the accelerator's device, else the CPU.
[[nodiscard]] c10::Device run_device();

// Ops of this thread are queued on another stream while it lives.
class StreamGuard {
 public:
  StreamGuard(Accelerator& accelerator, Stream stream)
      : accelerator_(accelerator), previous_(accelerator.current_stream()) {
    accelerator_.set_current_stream(stream);
  }
  ~StreamGuard() { accelerator_.set_current_stream(previous_); }
  StreamGuard(const StreamGuard&) = delete;
  StreamGuard& operator=(const StreamGuard&) = delete;

 private:
  Accelerator& accelerator_;
  Stream previous_;
};

}  // namespace capstan::device
