// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "support/fake_device/fake_generator.h"

#include <ATen/CPUGeneratorImpl.h>
#include <c10/core/GeneratorImpl.h>

#include "support/fake_device/fake_device.h"

namespace capstan::test::fake {
namespace {

class FakeGenerator : public c10::GeneratorImpl {
 public:
  explicit FakeGenerator(at::Generator host)
      : GeneratorImpl(fake_device(), c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)),
        host_(std::move(host)) {}
  void set_current_seed(uint64_t seed) override { host_.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { host_.set_offset(offset); }
  [[nodiscard]] uint64_t get_offset() const override { return host_.get_offset(); }
  [[nodiscard]] uint64_t current_seed() const override { return host_.current_seed(); }
  uint64_t seed() override { return at::Generator(host_).seed(); }
  void set_state(const c10::TensorImpl& state) override {
    host_.unsafeGetGeneratorImpl()->set_state(state);
  }
  [[nodiscard]] c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return host_.unsafeGetGeneratorImpl()->get_state();
  }
  [[nodiscard]] const at::Generator& host() const { return host_; }

 private:
  [[nodiscard]] FakeGenerator* clone_impl() const override {
    return new FakeGenerator(host_.clone());
  }
  at::Generator host_;
};

}  // namespace

at::Generator make_generator() {
  return at::make_generator<FakeGenerator>(at::detail::createCPUGenerator());
}

const at::Generator& default_generator() {
  static const auto* const generator = new at::Generator(make_generator());
  return *generator;
}

at::Generator host_generator(const at::Generator& generator) {
  if (!generator.defined()) return generator;
  TORCH_CHECK(generator.device().is_privateuseone(),
              "Expected a 'fake' device type for generator but found '", generator.device().type(),
              "'");
  return static_cast<const FakeGenerator*>(generator.unsafeGetGeneratorImpl())->host();
}

}  // namespace capstan::test::fake
