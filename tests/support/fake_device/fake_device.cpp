// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "support/fake_device/fake_device.h"

#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/AutogradState.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <atomic>

#include "capstan/base/error.h"
#include "support/fake_device/capture.h"
#include "support/fake_device/fake_generator.h"
#include "support/fake_device/host_tensor.h"
#include "support/fake_device/memory.h"
#include "support/fake_device/natives.h"
#include "support/fake_device/timeline.h"

namespace capstan::test {
namespace fake {
namespace {

using device::Event;
using device::Stream;

class FakeAccelerator : public device::Accelerator {
 public:
  [[nodiscard]] const char* name() const override { return "fake"; }
  [[nodiscard]] c10::DeviceType type() const override { return c10::kPrivateUse1; }
  [[nodiscard]] int device_count() const override { return 1; }
  void set_device(int index) override {
    if (index != 0)
      throw EnvError(ErrorText{.module = "device",
                               .what = "choosing the fake device",
                               .got = "device " + std::to_string(index),
                               .need = "device 0"});
  }
  [[nodiscard]] c10::Device device() const override { return fake_device(); }

  [[nodiscard]] Stream current_stream() const override { return handle(fake::current_stream()); }
  void set_current_stream(Stream stream) override { fake::set_current_stream(id(stream)); }
  [[nodiscard]] Stream create_stream(bool) override { return handle(fake::create_stream()); }
  void synchronize(Stream stream) override { synchronize_stream(id(stream)); }

  [[nodiscard]] Event create_event() override { return {new EventState}; }
  void destroy(Event event) override {
    forget(event);
    delete state(event);
  }
  void record(Event event, Stream stream) override {
    (void)record_in_capture(*this, event, stream);  // whose ops are ordered like others, too
    fake::record(*state(event), id(stream));
  }
  void wait(Stream stream, Event event) override {
    (void)wait_in_capture(*this, stream, event);
    fake::wait(id(stream), *state(event));
  }
  [[nodiscard]] bool is_done(Event event) const override {
    check_not_captured(event);
    return poll(*state(event));
  }
  void synchronize(Event event) override {
    check_not_captured(event);
    fake::synchronize(*state(event));
  }

  void begin_capture(device::Pool pool) override {
    TORCH_CHECK(fake::current_stream() != 0, "a capture on the default stream");
    fake::begin_capture(current_stream(), number(pool));
    allocate_from(number(pool), fake::current_stream());
  }
  [[nodiscard]] bool is_capturing() const override { return fake::is_capturing(); }
  [[nodiscard]] device::Graph end_capture() override {
    allocate_from(0, 0);
    return {fake::end_capture()};
  }
  void launch(device::Graph graph) override {
    fake::launch(*static_cast<Recording*>(graph.handle));
  }
  void destroy(device::Graph graph) override {
    fake::destroy(static_cast<Recording*>(graph.handle));
  }

  [[nodiscard]] device::Pool create_pool() override {
    static std::atomic<intptr_t> pools = 0;
    return {reinterpret_cast<void*>(++pools)};
  }
  void destroy(device::Pool pool) override {
    TORCH_CHECK(!has_graphs(number(pool)), "a pool is destroyed before its graphs");
  }
  void begin_allocating(device::Pool pool) override {
    TORCH_CHECK(!has_graphs(number(pool)), "memory of graphs is given out while they exist");
    allocate_from(number(pool), fake::current_stream());
  }
  void end_allocating(device::Pool) override { allocate_from(0, 0); }

  void keep_for(const at::Tensor& tensor, Stream stream) override {
    fake::keep_for(tensor.storage().data(), id(stream));
  }
  [[nodiscard]] at::Tensor empty_pinned(at::IntArrayRef sizes, at::ScalarType dtype) override {
    constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::CPU);
    return at::Tensor(
        at::detail::empty_generic(sizes, pinned_allocator(), kKeys, dtype, std::nullopt));
  }
  [[nodiscard]] device::DeviceMemory memory() const override { return memory_stats(); }
  void reset_peak() override { fake::reset_peak(); }
  // GPUs have no fp64: proofs take it.
  [[nodiscard]] bool has_grouped_products(at::ScalarType type) const override {
    return type == at::kBFloat16 || type == at::kDouble;
  }

 private:
  // The handle of the default stream is not null, so that a forgotten one shows.
  static Stream handle(int stream) {
    return {reinterpret_cast<void*>(static_cast<intptr_t>(stream) + 1)};
  }
  static int id(Stream stream) {
    TORCH_CHECK(stream.handle, "a stream without handle");
    return static_cast<int>(reinterpret_cast<intptr_t>(stream.handle) - 1);
  }
  static int number(device::Pool pool) {
    TORCH_CHECK(pool.handle, "a pool without handle");
    return static_cast<int>(reinterpret_cast<intptr_t>(pool.handle));
  }
  static EventState* state(Event event) {
    TORCH_CHECK(event.handle, "an event without handle");
    return static_cast<EventState*>(event.handle);
  }
};

c10::Stream torch_stream(int stream) {
  return c10::Stream(c10::Stream::UNSAFE, fake_device(), stream);
}
int stream_id(const c10::Stream& stream) { return static_cast<int>(stream.id()); }

// What LibTorch's own guards, events and autograd engine call.
struct FakeGuard final : c10::impl::DeviceGuardImplInterface {
  [[nodiscard]] c10::DeviceType type() const override { return c10::kPrivateUse1; }
  [[nodiscard]] c10::Device exchangeDevice(c10::Device) const override { return fake_device(); }
  [[nodiscard]] c10::Device getDevice() const override { return fake_device(); }
  void setDevice(c10::Device device) const override {
    TORCH_CHECK(device.index() <= 0, "the fake device has index 0 only");
  }
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  [[nodiscard]] c10::DeviceIndex deviceCount() const noexcept override { return 1; }

  [[nodiscard]] c10::Stream getStream(c10::Device) const override {
    return torch_stream(current_stream());
  }
  [[nodiscard]] c10::Stream getDefaultStream(c10::Device) const override { return torch_stream(0); }
  [[nodiscard]] c10::Stream getNewStream(c10::Device, int) const override {
    return torch_stream(create_stream());
  }
  [[nodiscard]] c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override {
    return torch_stream(create_stream());
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const c10::Stream previous = torch_stream(current_stream());
    set_current_stream(stream_id(stream));
    return previous;
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    synchronize_stream(stream_id(stream));
  }
  void synchronizeDevice(c10::DeviceIndex) const override { synchronize_device(); }

  void record(void** event, const c10::Stream& stream, c10::DeviceIndex,
              c10::EventFlag) const override {
    if (!*event) *event = new EventState;
    fake::record(*static_cast<EventState*>(*event), stream_id(stream));
  }
  void block(void* event, const c10::Stream& stream) const override {
    if (event) wait(stream_id(stream), *static_cast<EventState*>(event));
  }
  bool queryEvent(void* event) const override {
    return !event || poll(*static_cast<EventState*>(event));
  }
  void synchronizeEvent(void* event) const override {
    if (event) synchronize(*static_cast<EventState*>(event));
  }
  void destroyEvent(void* event, c10::DeviceIndex) const noexcept override {
    delete static_cast<EventState*>(event);
  }
  void recordDataPtrOnStream(const c10::DataPtr& memory, const c10::Stream& stream) const override {
    keep_for(memory.get(), stream_id(stream));
  }
};

struct FakeHooks final : at::PrivateUse1HooksInterface {
  [[nodiscard]] bool isBuilt() const override { return true; }
  [[nodiscard]] bool isAvailable() const override { return true; }
  [[nodiscard]] bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  [[nodiscard]] c10::DeviceIndex deviceCount() const override { return 1; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  [[nodiscard]] c10::DeviceIndex getCurrentDevice() const override { return 0; }
  [[nodiscard]] c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  [[nodiscard]] c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  bool isPinnedPtr(const void* pointer) const override { return is_pinned(pointer); }
  [[nodiscard]] c10::Allocator* getPinnedMemoryAllocator() const override {
    return pinned_allocator();
  }
  c10::Device getDeviceFromPtr(void* pointer) const override {
    TORCH_CHECK(is_device_pointer(pointer), "not a pointer of the fake device");
    return fake_device();
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    resize_storage(storage, bytes);
  }
  [[nodiscard]] const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return default_generator();
  }
  [[nodiscard]] at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return make_generator();
  }
};

// At program start: the first backward, be it one on the CPU, starts LibTorch's backward threads
// for the devices that have a guard by then.
const c10::impl::DeviceGuardImplRegistrar guard(c10::kPrivateUse1, new FakeGuard);

device::Accelerator* install() {
  c10::register_privateuse1_backend("fake");
  c10::SetAllocator(c10::kPrivateUse1, device_allocator());
  at::RegisterPrivateUse1HooksInterface(new FakeHooks);
  register_ops();
  auto* const accelerator = new FakeAccelerator;
  device::install_accelerator(accelerator);
  return accelerator;
}

}  // namespace
}  // namespace fake

device::Accelerator& install_fake_device() {
  static device::Accelerator* const accelerator = fake::install();
  return *accelerator;
}

c10::Device fake_device() { return {c10::kPrivateUse1, 0}; }

BackwardOnThisThread::BackwardOnThisThread()
    : previous_(c10::AutogradState::get_tls_state().get_multithreading_enabled()) {
  c10::AutogradState::get_tls_state().set_multithreading_enabled(false);
}

BackwardOnThisThread::~BackwardOnThisThread() {
  c10::AutogradState::get_tls_state().set_multithreading_enabled(previous_);
}

}  // namespace capstan::test
