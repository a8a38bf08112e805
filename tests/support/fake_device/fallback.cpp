// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "support/fake_device/fallback.h"

#include <ATen/core/LegacyTypeDispatch.h>

#include <cstring>
#include <set>
#include <string>

#include "support/fake_device/capture.h"
#include "support/fake_device/fake_device.h"
#include "support/fake_device/fake_generator.h"
#include "support/fake_device/gpu_ops.h"
#include "support/fake_device/host_tensor.h"
#include "support/fake_device/memory.h"

namespace capstan::test::fake {
namespace {

using Names = std::set<std::string, std::less<>>;

// Where CUDA takes a CPU tensor without dims beside device tensors.
const Names& takes_cpu_scalars() {
  static const auto* const names = new Names{"add",
                                             "sub",
                                             "rsub",
                                             "mul",
                                             "div",
                                             "true_divide",
                                             "floor_divide",
                                             "pow",
                                             "remainder",
                                             "fmod",
                                             "atan2",
                                             "eq",
                                             "ne",
                                             "lt",
                                             "le",
                                             "gt",
                                             "ge",
                                             "maximum",
                                             "minimum",
                                             "fmax",
                                             "fmin",
                                             "bitwise_and",
                                             "bitwise_or",
                                             "bitwise_xor",
                                             "logical_and",
                                             "logical_or",
                                             "logical_xor",
                                             "where",
                                             "clamp",
                                             "clamp_min",
                                             "clamp_max",
                                             "lerp",
                                             "addcmul",
                                             "addcdiv",
                                             "copysign",
                                             "xlogy",
                                             "hypot",
                                             "nextafter",
                                             "fill",
                                             "masked_fill",
                                             "index_fill",
                                             "index_put",
                                             "_index_put_impl",
                                             "_fused_adamw",
                                             "_fused_adam",
                                             "_fused_sgd"};
  return *names;
}

// Where CUDA takes indices on the CPU.
const Names& takes_cpu_indices() {
  static const auto* const names = new Names{"index", "index_put", "_index_put_impl"};
  return *names;
}

// Ops whose CUDA kernels wait for the device, to learn the size of their result.
const Names& waits() {
  static const auto* const names =
      new Names{"nonzero", "masked_select",      "_unique", "_unique2", "unique_dim", "bincount",
                "equal",   "unique_consecutive", "histc"};
  return *names;
}

// "aten::add_" -> "add"
std::string_view base_name(const c10::FunctionSchema& schema) {
  std::string_view name = schema.name();
  name.remove_prefix(std::min(name.size(), name.find("::") + 2));
  if (name.ends_with('_')) name.remove_suffix(1);
  return name;
}

bool is_write(const c10::Argument& argument) {
  return argument.alias_info() && argument.alias_info()->isWrite();
}

class HostCall {
 public:
  HostCall(const c10::OperatorHandle& op, torch::jit::Stack& stack)
      : op_(op), schema_(op.schema()), name_(base_name(schema_)), stack_(stack) {}

  void run() {
    const size_t count = schema_.arguments().size();
    originals_.assign(stack_.end() - static_cast<std::ptrdiff_t>(count), stack_.end());
    torch::jit::drop(stack_, count);
    for (size_t i = 0; i < count; ++i)
      stack_.push_back(to_host(originals_[i], schema_.arguments()[i]));
    now_ = begin_op(schema_.name().c_str());
    std::vector<Use> uses;
    for (const Carried& c : carried_) uses.push_back({c.device, c.is_written});
    note(uses, now_);
    {
      const at::AutoDispatchBelowADInplaceOrView no_autograd;
      constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::CPU);
      if (const c10::KernelFunction* const kernel = gpu_op(op_.operator_name()))
        kernel->callBoxed(op_, kKeys, &stack_);
      else
        op_.redispatchBoxed(kKeys, &stack_);
    }
    adopt_resized();
    give_results();
    if (does_wait()) synchronize_stream(now_.stream, now_.op);
    if (is_capturing()) record();
  }

 private:
  // A launch runs the op again and puts what it makes where this call's results are.
  void record() const {
    const size_t count = schema_.returns().size();
    std::vector<at::IValue> arguments, results;
    for (const at::IValue& value : originals_) arguments.push_back(unowned(value));
    for (auto value = stack_.end() - static_cast<std::ptrdiff_t>(count); value != stack_.end();
         ++value)
      results.push_back(unowned(*value));
    record_for_graph([op = op_, arguments, results] {
      torch::jit::Stack stack = arguments;
      HostCall(op, stack).run();
      const size_t first = stack.size() - results.size();
      for (size_t i = 0; i < results.size(); ++i) copy_result(stack[first + i], results[i]);
    });
  }

  struct Carried {
    at::Tensor device, host;
    bool is_written;
  };
  struct Memory {
    c10::Storage device, host;
  };

  at::IValue to_host(const at::IValue& value, const c10::Argument& argument) {
    if (value.isTensor()) return tensor_to_host(value.toTensor(), argument);
    if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : value.toTensorVector())
        list.push_back(tensor_to_host(t, argument));
      return list;
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const std::optional<at::Tensor>& t : value.toOptionalTensorVector())
        list.push_back(t ? std::optional(tensor_to_host(*t, argument)) : std::nullopt);
      return list;
    }
    if (value.isDevice()) return c10::Device(c10::kCPU);
    if (value.isGenerator()) return host_generator(value.toGenerator());
    return value;
  }

  at::Tensor tensor_to_host(const at::Tensor& tensor, const c10::Argument& argument) {
    if (!tensor.defined()) return tensor;
    if (!tensor.is_privateuseone()) {
      check_may_be_on_cpu(tensor, argument);
      return tensor;
    }
    const at::Tensor host = over(tensor, host_memory(tensor.storage()), c10::DispatchKey::CPU);
    carried_.push_back({tensor, host, is_write(argument)});
    return host;
  }

  void check_may_be_on_cpu(const at::Tensor& tensor, const c10::Argument& argument) {
    const bool is_scalar =
        tensor.dim() == 0 && !is_write(argument) &&
        (tensor.unsafeGetTensorImpl()->is_wrapped_number() || takes_cpu_scalars().contains(name_));
    const bool is_index = argument.name() == "indices" && takes_cpu_indices().contains(name_);
    TORCH_CHECK(tensor.is_cpu() && (is_scalar || is_index),
                "Expected all tensors to be on the same device, but got ", argument.name(),
                " is on ", tensor.device(), ", different from other tensors on ", fake_device(),
                " (when checking argument in method ", schema_.name(), ")");
    if (is_index) count_host_sync("indices on the CPU");
  }

  [[nodiscard]] bool does_wait() const {
    constexpr size_t kOutputSize = 1;
    return waits().contains(name_) ||
           (name_ == "repeat_interleave" && originals_.at(kOutputSize).isNone());
  }

  // One host storage for each device storage, so that arguments alias as before.
  const c10::Storage& host_memory(const c10::Storage& device) {
    for (const Memory& m : memories_)
      if (m.device.is_alias_of(device)) return m.host;
    memories_.push_back({device, host_storage(device)});
    return memories_.back().host;
  }

  // Arguments that the kernel resized: their memory may have moved to the CPU.
  void adopt_resized() {
    for (const Memory& m : memories_) {
      const size_t bytes = m.host.nbytes();
      if (bytes == m.device.nbytes()) continue;
      resize_storage(m.device, bytes);
      if (bytes > 0) std::memcpy(host_of(m.device.data()), m.host.data(), bytes);
    }
    for (const Carried& c : carried_) {
      if (!c.is_written ||
          (c.device.sizes() == c.host.sizes() && c.device.strides() == c.host.strides() &&
           c.device.storage_offset() == c.host.storage_offset()))
        continue;
      c.device.unsafeGetTensorImpl()->set_sizes_and_strides(c.host.sizes(), c.host.strides(),
                                                            c.host.storage_offset());
      note({{c.device, true}}, now_);
    }
  }

  void give_results() {
    const auto& returns = schema_.returns();
    const size_t first = stack_.size() - returns.size();
    for (size_t i = 0; i < returns.size(); ++i) {
      at::IValue& result = stack_[first + i];
      if (is_write(returns[i]))
        result = original_of(returns[i]);
      else
        result = to_device(result);
    }
  }

  const at::IValue& original_of(const c10::Argument& result) {
    const auto& arguments = schema_.arguments();
    for (size_t i = 0; i < arguments.size(); ++i)
      if (is_write(arguments[i]) && *arguments[i].alias_info() == *result.alias_info())
        return originals_[i];
    TORCH_CHECK(false, schema_.name(), ": a result that is none of the arguments");
  }

  at::IValue to_device(const at::IValue& value) {
    if (value.isTensor()) return tensor_to_device(value.toTensor());
    if (!value.isTensorList()) return value;
    c10::List<at::Tensor> list;
    for (const at::Tensor& t : value.toTensorVector()) list.push_back(tensor_to_device(t));
    return list;
  }

  at::Tensor tensor_to_device(const at::Tensor& host) {
    if (!host.defined()) return host;
    for (const Memory& m : memories_)
      if (m.host.is_alias_of(host.storage()))
        return over(host, m.device, c10::DispatchKey::PrivateUse1);
    at::Tensor device = empty_device(host.sizes(), host.strides(), host.scalar_type());
    if (host.numel() > 0)
      std::memcpy(host_of(device.storage().data()), host.const_data_ptr(),
                  device.storage().nbytes());
    note({{device, true}}, now_);
    return device;
  }

  const c10::OperatorHandle& op_;
  const c10::FunctionSchema& schema_;
  const std::string_view name_;
  torch::jit::Stack& stack_;
  std::vector<at::IValue> originals_;
  std::vector<Carried> carried_;
  std::vector<Memory> memories_;
  Access now_;
};

}  // namespace

void run_on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  HostCall(op, *stack).run();
}

}  // namespace capstan::test::fake
