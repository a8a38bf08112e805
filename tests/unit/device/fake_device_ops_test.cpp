// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Ops on the fake device against the CPU: values and gradients.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/custom_function.h>

#include <barrier>
#include <functional>
#include <thread>

#include "support/fake_device/fake_device.h"

namespace capstan::test {
namespace {

using ::testing::HasSubstr;
using Tensors = std::vector<at::Tensor>;
using Fn = std::function<Tensors(const Tensors&)>;

struct Case {
  const char* name;
  Fn fn;
};

at::Tensor on_device(const at::Tensor& t) { return t.to(fake_device()); }

at::Tensor longs(std::vector<int64_t> values) { return at::tensor(values); }

std::string message_of(const std::function<void()>& fn) {
  try {
    fn();
  } catch (const std::exception& e) {
    return e.what();
  }
  return "nothing was thrown";
}

void expect_same(const at::Tensor& host, const at::Tensor& device, const char* what) {
  ASSERT_EQ(host.defined(), device.defined()) << what;
  if (!host.defined()) return;
  EXPECT_TRUE(device.is_privateuseone()) << what;
  EXPECT_EQ(device.scalar_type(), host.scalar_type()) << what;
  ASSERT_EQ(device.sizes(), host.sizes()) << what;
  EXPECT_EQ(device.strides(), host.strides()) << what;
  EXPECT_TRUE(at::equal(device.cpu(), host)) << what << "\n" << device.cpu() << "\n" << host;
}

// Runs fn, then backward from the sum of its squared results; gives results and gradients.
Tensors run(const Fn& fn, const Tensors& inputs, const c10::Device& device) {
  Tensors leaves;
  for (const at::Tensor& t : inputs)
    leaves.push_back(t.to(device, t.scalar_type(), false, true)
                         .set_requires_grad(at::isFloatingType(t.scalar_type())));
  Tensors results = fn(leaves);
  at::Tensor loss;
  for (const at::Tensor& r : results)
    if (r.requires_grad()) {
      const at::Tensor part = (r * r).sum().to(at::kFloat);
      loss = loss.defined() ? loss + part : part;
    }
  if (loss.defined()) loss.backward();
  for (const at::Tensor& leaf : leaves)
    if (leaf.grad().defined()) results.push_back(leaf.grad());
  for (at::Tensor& r : results) r = r.detach();
  return results;
}

void compare(const Case& c, const Tensors& inputs) {
  const Tensors host = run(c.fn, inputs, at::kCPU);
  Tensors device;
  try {
    device = run(c.fn, inputs, fake_device());
  } catch (const std::exception& e) {
    FAIL() << c.name << ": " << e.what();
  }
  ASSERT_EQ(host.size(), device.size()) << c.name;
  for (size_t i = 0; i < host.size(); ++i) expect_same(host[i], device[i], c.name);
}

class FakeDeviceOps : public ::testing::Test {
 protected:
  static void SetUpTestSuite() { install_fake_device(); }
  FakeDeviceOps() { at::manual_seed(7); }
  const at::TensorOptions options_ = at::device(fake_device());
};

TEST_F(FakeDeviceOps, Matrices_AgreeWithTheCpu) {
  const Tensors inputs = {at::randn({6, 8}), at::randn({8, 5}), at::randn({6, 5})};
  const Case cases[] = {
      {"matmul", [](const Tensors& x) { return Tensors{at::matmul(x[0], x[1])}; }},
      {"mm of a transposed", [](const Tensors& x) { return Tensors{at::mm(x[1].t(), x[0].t())}; }},
      {"addmm", [](const Tensors& x) { return Tensors{at::addmm(x[2], x[0], x[1], 0.5, 2)}; }},
      {"linear", [](const Tensors& x) { return Tensors{at::linear(x[0], x[1].t())}; }},
      {"bmm",
       [](const Tensors& x) {
         return Tensors{
             at::bmm(x[0].unsqueeze(0).expand({3, 6, 8}), x[1].unsqueeze(0).repeat({3, 1, 1}))};
       }},
      {"einsum",
       [](const Tensors& x) {
         return Tensors{at::einsum("ij,jk->ki", {x[0], x[1]})};
       }},
  };
  for (const Case& c : cases) compare(c, inputs);
}

TEST_F(FakeDeviceOps, Shapes_AgreeWithTheCpu) {
  const Tensors inputs = {at::randn({4, 6}), at::randn({4, 6}), longs({3, 0, 0, 2})};
  const Case cases[] = {
      {"narrow", [](const Tensors& x) { return Tensors{x[0].narrow(1, 2, 3)}; }},
      {"view",
       [](const Tensors& x) {
         return Tensors{x[0].view({2, 12}).view({-1})};
       }},
      {"transpose",
       [](const Tensors& x) {
         return Tensors{x[0].t(), x[0].transpose(0, 1)};
       }},
      {"reshape",
       [](const Tensors& x) {
         return Tensors{x[0].t().reshape({3, 8})};
       }},
      {"contiguous", [](const Tensors& x) { return Tensors{x[0].t().contiguous()}; }},
      {"permute",
       [](const Tensors& x) {
         return Tensors{x[0].view({2, 2, 6}).permute({2, 0, 1})};
       }},
      {"clone", [](const Tensors& x) { return Tensors{x[0].t().clone()}; }},
      {"to dtype", [](const Tensors& x) { return Tensors{x[0].to(at::kBFloat16)}; }},
      {"index_select", [](const Tensors& x) { return Tensors{x[0].index_select(0, x[2])}; }},
      {"index", [](const Tensors& x) { return Tensors{x[0].index({x[2]})}; }},
      {"gather",
       [](const Tensors& x) {
         return Tensors{x[0].gather(1, x[2].unsqueeze(1).expand({4, 2}))};
       }},
      {"scatter_",
       [](const Tensors& x) {
         return Tensors{
             x[0].clone().scatter_(0, x[2].unsqueeze(0), x[1].narrow(0, 0, 1).narrow(1, 0, 4))};
       }},
      {"index_add_",
       [](const Tensors& x) { return Tensors{x[0].clone().index_add_(0, x[2], x[1])}; }},
      {"index_put_",
       [](const Tensors& x) { return Tensors{x[0].clone().index_put_({x[2]}, x[1])}; }},
      {"cat",
       [](const Tensors& x) {
         return Tensors{at::cat({x[0], x[1]}, 1)};
       }},
      {"stack",
       [](const Tensors& x) {
         return Tensors{at::stack({x[0], x[1]})};
       }},
      {"split", [](const Tensors& x) { return x[0].split(2, 1); }},
      {"unbind", [](const Tensors& x) { return x[0].unbind(0); }},
      {"chunk", [](const Tensors& x) { return x[0].chunk(3, 1); }},
      {"unfold", [](const Tensors& x) { return Tensors{x[0].unfold(1, 3, 2)}; }},
      {"tril",
       [](const Tensors& x) {
         return Tensors{x[0].tril(), x[0].triu(1)};
       }},
      {"flip and roll",
       [](const Tensors& x) {
         return Tensors{x[0].flip({1}), x[0].roll(1, 0)};
       }},
      {"repeat_interleave",
       [](const Tensors& x) { return Tensors{x[0].repeat_interleave(x[2], 0, 5)}; }},
      {"pad",
       [](const Tensors& x) {
         return Tensors{at::constant_pad_nd(x[0], {1, 2}, 3)};
       }},
      {"as_strided",
       [](const Tensors& x) {
         return Tensors{x[0].as_strided({3, 4}, {6, 1}, 2)};
       }},
      {"index_copy_",
       [](const Tensors& x) {
         return Tensors{x[0].clone().index_copy_(0, x[2].slice(0, 2), x[1].slice(0, 2))};
       }},
      {"scatter_add_",
       [](const Tensors& x) {
         return Tensors{x[0].clone().scatter_add_(0, x[2].unsqueeze(1).expand({4, 6}), x[1])};
       }},
      {"expand and squeeze",
       [](const Tensors& x) {
         return Tensors{x[0].unsqueeze(1).expand({4, 3, 6}), x[0].unsqueeze(0).squeeze(0)};
       }},
      {"view of a type",
       [](const Tensors& x) {
         return Tensors{x[2].view(at::kInt), x[0].detach().view(at::kByte)};
       }},
      {"meshgrid and outer",
       [](const Tensors& x) {
         return Tensors{at::outer(x[0][0], x[1][1]), x[0].diagonal()};
       }},
      {"embedding", [](const Tensors& x) { return Tensors{at::embedding(x[0], x[2])}; }},
      {"one_hot",
       [](const Tensors& x) {
         return Tensors{at::zeros_like(x[0]).scatter_(1, x[2].unsqueeze(1), 1)};
       }},
  };
  for (const Case& c : cases) compare(c, inputs);
}

TEST_F(FakeDeviceOps, Elementwise_AgreesWithTheCpu) {
  const Tensors inputs = {at::randn({4, 6}), at::randn({4, 6}), at::randn({4, 6}).gt(0)};
  const Case cases[] = {
      {"scalars", [](const Tensors& x) { return Tensors{(x[0] * 2 + 1) / 3 - x[1].pow(2)}; }},
      {"where", [](const Tensors& x) { return Tensors{at::where(x[2], x[0], x[1])}; }},
      {"masked_fill", [](const Tensors& x) { return Tensors{x[0].masked_fill(x[2], -1)}; }},
      {"masked_select", [](const Tensors& x) { return Tensors{x[0].masked_select(x[2])}; }},
      {"boolean index", [](const Tensors& x) { return Tensors{x[0].index({x[2]})}; }},
      {"silu", [](const Tensors& x) { return Tensors{at::silu(x[0]) * x[1]}; }},
      {"gelu",
       [](const Tensors& x) {
         return Tensors{at::gelu(x[0]), at::sigmoid(x[1])};
       }},
      {"exp and log",
       [](const Tensors& x) {
         return Tensors{x[0].exp().log1p(), x[1].abs().sqrt()};
       }},
      {"in place", [](const Tensors& x) { return Tensors{x[0].clone().mul_(x[1]).add_(x[0], 2)}; }},
      {"addcmul", [](const Tensors& x) { return Tensors{at::addcmul(x[0], x[1], x[1], 0.5)}; }},
      {"lerp", [](const Tensors& x) { return Tensors{at::lerp(x[0], x[1], 0.3)}; }},
      {"clamp",
       [](const Tensors& x) {
         return Tensors{x[0].clamp(-0.5, 0.5), at::maximum(x[0], x[1])};
       }},
      {"comparisons",
       [](const Tensors& x) {
         return Tensors{x[0] > x[1], x[0].eq(0), x[2].logical_not()};
       }},
      {"host scalar", [](const Tensors& x) { return Tensors{x[0] * at::scalar_tensor(2.5)}; }},
      {"fill",
       [](const Tensors& x) {
         return Tensors{at::zeros_like(x[0]), at::full_like(x[0], 3)};
       }},
      {"xlogy and logaddexp",
       [](const Tensors& x) {
         return Tensors{at::xlogy(x[0], x[1].abs()), at::logaddexp(x[0], x[1])};
       }},
      {"rounding",
       [](const Tensors& x) {
         return Tensors{at::floor_divide(x[0].detach(), 0.5), x[1].abs().rsqrt(), x[0].round()};
       }},
      {"isfinite",
       [](const Tensors& x) {
         return Tensors{at::isfinite(x[0]), x[0].isnan(), at::nan_to_num(x[1])};
       }},
      {"bernoulli of ones",
       [](const Tensors& x) {
         return Tensors{at::bernoulli(at::ones_like(x[0])), at::dropout(x[1], 0, true)};
       }},
      {"bfloat16",
       [](const Tensors& x) { return Tensors{x[0].to(at::kBFloat16) * x[1].to(at::kBFloat16)}; }},
  };
  for (const Case& c : cases) compare(c, inputs);
}

TEST_F(FakeDeviceOps, Reductions_AgreeWithTheCpu) {
  const Tensors inputs = {at::randn({4, 6}), longs({3, 0, 5, 2}), at::randn({6})};
  const Case cases[] = {
      {"sum",
       [](const Tensors& x) {
         return Tensors{x[0].sum(1), x[0].sum(), x[0].mean(0)};
       }},
      {"norm",
       [](const Tensors& x) {
         return Tensors{x[0].norm(), at::linalg_vector_norm(x[0], 2)};
       }},
      {"softmax", [](const Tensors& x) { return Tensors{at::softmax(x[0], 1)}; }},
      {"log_softmax", [](const Tensors& x) { return Tensors{at::log_softmax(x[0], -1)}; }},
      {"logsumexp", [](const Tensors& x) { return Tensors{at::logsumexp(x[0], 1)}; }},
      {"cross_entropy",
       [](const Tensors& x) { return Tensors{at::cross_entropy_loss(x[0], x[1])}; }},
      {"cumsum", [](const Tensors& x) { return Tensors{x[0].cumsum(1)}; }},
      {"amax",
       [](const Tensors& x) {
         return Tensors{x[0].amax(1), x[0].argmax(1), x[0].any()};
       }},
      {"max",
       [](const Tensors& x) {
         return Tensors{std::get<0>(x[0].max(1)), std::get<1>(x[0].max(1))};
       }},
      {"topk",
       [](const Tensors& x) {
         auto [v, i] = x[0].topk(3, 1);
         return Tensors{v, i};
       }},
      {"sort",
       [](const Tensors& x) {
         auto [v, i] = x[0].sort(1, true);
         return Tensors{v, i};
       }},
      {"argsort",
       [](const Tensors& x) {
         return Tensors{x[1].argsort(), at::bincount(x[1])};
       }},
      {"layer_norm", [](const Tensors& x) { return Tensors{at::layer_norm(x[0], {6}, x[2])}; }},
      {"rms_norm", [](const Tensors& x) { return Tensors{at::rms_norm(x[0], {6}, x[2])}; }},
      {"var", [](const Tensors& x) { return Tensors{x[0].var(1)}; }},
      {"searchsorted",
       [](const Tensors& x) { return Tensors{at::searchsorted(std::get<0>(x[2].sort()), x[0])}; }},
  };
  for (const Case& c : cases) compare(c, inputs);
}

TEST_F(FakeDeviceOps, Attention_AgreesWithTheCpu) {
  const Tensors inputs = {at::randn({2, 3, 5, 8}), at::randn({2, 3, 5, 8}),
                          at::randn({2, 3, 5, 8})};
  const Case flash = {"flash", [](const Tensors& x) {
                        return Tensors{std::get<0>(at::_scaled_dot_product_flash_attention_for_cpu(
                            x[0], x[1], x[2], 0.0, true))};
                      }};
  compare(flash, inputs);
  const at::Tensor host = at::scaled_dot_product_attention(inputs[0], inputs[1], inputs[2]);
  const at::Tensor device = at::scaled_dot_product_attention(
      on_device(inputs[0]), on_device(inputs[1]), on_device(inputs[2]));
  EXPECT_TRUE(at::allclose(host, device.cpu(), 1e-5, 1e-6));
}

TEST_F(FakeDeviceOps, Factories_AgreeWithTheCpu) {
  for (const at::ScalarType type : {at::kDouble, at::kFloat, at::kBFloat16, at::kHalf, at::kLong,
                                    at::kInt, at::kBool, at::kByte}) {
    const auto host = at::dtype(type);
    const auto device = options_.dtype(type);
    expect_same(at::zeros({3, 2}, host), at::zeros({3, 2}, device), "zeros");
    expect_same(at::ones({3, 2}, host), at::ones({3, 2}, device), "ones");
    expect_same(at::full({3}, 1, host), at::full({3}, 1, device), "full");
    expect_same(at::eye(2, host), at::eye(2, device), "eye");
    if (type != at::kBool) expect_same(at::arange(7, host), at::arange(7, device), "arange");
    expect_same(at::scalar_tensor(1, host), at::scalar_tensor(1, device), "scalar_tensor");
    EXPECT_EQ(at::empty({0, 4}, device).numel(), 0);
  }
  expect_same(longs({4, 5}), at::tensor(std::vector<int64_t>{4, 5}, options_.dtype(at::kLong)),
              "tensor");
  expect_same(at::tril_indices(3, 3), at::tril_indices(3, 3, 0, options_.dtype(at::kLong)),
              "tril_indices");
  EXPECT_EQ(at::randn({3}, options_).isnan().sum().item<int64_t>(), 0);
  EXPECT_EQ(at::randperm(9, options_.dtype(at::kLong)).sum().item<int64_t>(), 36);
}

TEST_F(FakeDeviceOps, Copies_ConvertTypesAndStrides) {
  const at::Tensor host = at::randn({4, 6}), device = on_device(host);
  expect_same(host.t(), on_device(host.t()), "strided to the device");
  EXPECT_TRUE(at::equal(device.t().cpu(), host.t()));
  EXPECT_TRUE(at::equal(device.to(at::device(at::kCPU).dtype(at::kHalf)), host.to(at::kHalf)));
  const at::Tensor wide = at::zeros({4, 6}, options_.dtype(at::kDouble));
  wide.t().copy_(device.t());
  expect_same(host.to(at::kDouble), wide, "on the device");
  wide.narrow(0, 1, 2).copy_(host[0]);  // broadcast from the host
  EXPECT_TRUE(at::equal(wide[2].cpu(), host[0].to(at::kDouble)));
  at::Tensor target = at::empty({1});
  target = at::_copy_from_and_resize(host, at::empty({0}, options_));
  expect_same(host, target, "copy and resize");
  EXPECT_EQ(device[1][2].item<float>(), host[1][2].item<float>());
}

TEST_F(FakeDeviceOps, PinnedAndBorrowedMemory_KeepTheirPlace) {
  const at::Tensor host = at::randn({8}), pinned = host.pin_memory();
  EXPECT_TRUE(pinned.is_pinned());
  EXPECT_TRUE(at::equal(pinned, host));
  EXPECT_TRUE(at::empty({3}, at::TensorOptions().pinned_memory(true)).is_pinned());
  const int64_t before = host_syncs_of_thread();
  const at::Tensor device = pinned.to(fake_device(), /*non_blocking=*/true);
  EXPECT_EQ(host_syncs_of_thread(), before);
  const at::Tensor borrowed = at::from_blob(device.data_ptr(), {2, 4}, options_.dtype(at::kFloat));
  EXPECT_TRUE(borrowed.is_privateuseone());
  borrowed.mul_(2);
  EXPECT_TRUE(at::equal(device.cpu(), host * 2));
  device.record_stream(c10::Stream(c10::Stream::DEFAULT, fake_device()));
}

TEST_F(FakeDeviceOps, OutArguments_AreWrittenAndResized) {
  const at::Tensor a = at::randn({4, 6}), b = at::randn({6, 3});
  at::Tensor fits = at::empty({4, 3}, options_), grows = at::empty({0}, options_);
  const void* const memory = fits.data_ptr();
  EXPECT_TRUE(at::mm_out(fits, on_device(a), on_device(b)).is_same(fits));
  EXPECT_EQ(fits.data_ptr(), memory);
  expect_same(a.mm(b), fits, "mm out");
  at::mm_out(grows, on_device(a), on_device(b));
  expect_same(a.mm(b), grows, "mm out, resized");
  at::Tensor values = at::empty({0}, options_), indices = at::empty({0}, options_.dtype(at::kLong));
  at::topk_out(values, indices, on_device(a), 2, 1);
  at::Tensor product = at::empty({4, 3}, options_);
  at::matmul_out(product, on_device(a), on_device(b));
  at::addmm_out(product, product, on_device(a), on_device(b));
  expect_same(a.mm(b).addmm_(a, b), product, "addmm out of itself");
  expect_same(std::get<1>(a.topk(2, 1)), indices, "topk out, resized");
  at::Tensor sum = on_device(a.mm(b));
  EXPECT_TRUE(sum.addmm_(on_device(a), on_device(b)).is_same(sum));
  expect_same(a.mm(b).addmm_(a, b), sum, "addmm_");
  at::Tensor part = at::zeros({8, 3}, options_);
  at::Tensor rows = part.narrow(0, 2, 4);
  at::mm_out(rows, on_device(a), on_device(b));
  expect_same(a.mm(b), part.narrow(0, 2, 4), "into a view");
}

TEST_F(FakeDeviceOps, ForeachAndFused_AgreeWithTheCpu) {
  const auto step = [](const c10::Device& device) {
    at::manual_seed(3);
    Tensors p, g, m, v, steps;
    for (int i = 1; i <= 3; ++i) {
      p.push_back(at::randn({i, 4}).to(device));
      g.push_back(at::randn({i, 4}).to(device));
      m.push_back(at::zeros_like(p.back()));
      v.push_back(at::zeros_like(p.back()));
      steps.push_back(at::zeros({}, at::device(device)));
    }
    at::_foreach_mul_(g, 0.5);
    at::_foreach_add_(g, p, 0.1);
    at::_foreach_add_(steps, 1);
    const at::Tensor norm = at::stack(at::_foreach_norm(g)).norm();
    at::_foreach_div_(g, norm);
    at::_fused_adamw_(p, g, m, v, {}, steps, 0.1, 0.9, 0.95, 0.1, 1e-8, false, false);
    at::_foreach_copy_(m, g);
    p.insert(p.end(), m.begin(), m.end());
    at::_foreach_zero_(v);
    p.push_back(v[0]);
    const Tensors scaled = at::_foreach_mul(p, 2);
    p.insert(p.end(), scaled.begin(), scaled.end());
    return p;
  };
  const Tensors host = step(at::kCPU), device = step(fake_device());
  for (size_t i = 0; i < host.size(); ++i) expect_same(host[i], device[i], "foreach");
  at::Tensor found = at::zeros({1}, options_), scale = at::full({1}, 0.5, options_);
  Tensors grads = {at::ones({4}, options_)};
  at::_amp_foreach_non_finite_check_and_unscale_(grads, found, scale);
  EXPECT_EQ(grads[0].sum().item<float>(), 2);
}

TEST_F(FakeDeviceOps, ResizeAndSet_KeepTheMemory) {
  at::Tensor t = at::arange(6, options_.dtype(at::kFloat));
  t.resize_({2, 2});
  EXPECT_EQ(t[1][1].item<float>(), 3);
  t.resize_({10});
  EXPECT_EQ(t[5].item<float>(), 5);
  EXPECT_TRUE(t[9].isnan().item<bool>());
  at::Tensor window = at::empty({0}, options_);
  window.set_(t.storage(), 2, {2, 2}, {2, 1});
  EXPECT_EQ(window[1][1].item<float>(), 5);
  window.set_(t.storage());
  EXPECT_EQ(window.numel(), 10);
  window.set_(t);
  EXPECT_TRUE(window.is_alias_of(t));
  window.set_();
  EXPECT_EQ(window.numel(), 0);
}

TEST_F(FakeDeviceOps, MixedDevices_AreRefused) {
  const at::Tensor device = at::ones({4, 4}, options_), host = at::ones({4, 4});
  const auto refused = [](const std::function<void()>& fn) {
    EXPECT_THAT(message_of(fn), HasSubstr("Expected all tensors to be on the same device"));
  };
  refused([&] { (void)(device + host); });
  refused([&] { (void)device.mm(host); });
  refused([&] { (void)host.mm(device); });
  refused([&] { (void)at::cat({device, host}); });
  refused([&] { (void)device.index_select(0, longs({1, 2})); });
  refused([&] { (void)at::embedding(device, longs({1, 2})); });
  refused([&] {
    at::Tensor out = at::empty({4, 4});
    (void)at::mm_out(out, device, device);
  });
  refused([&] { (void)at::dot(device[0], host[0]); });
  EXPECT_EQ(device.index({longs({1, 2})}).size(0), 2);  // as on CUDA
}

TEST_F(FakeDeviceOps, Generators_MustBeTheDevices) {
  const at::Tensor t = at::empty({64}, options_);
  EXPECT_THAT(message_of([&] { t.normal_(0, 1, at::detail::createCPUGenerator(5)); }),
              HasSubstr("device type for generator"));
  at::Generator generator = at::globalContext().getAcceleratorHooksInterface().getNewGenerator(0);
  generator.set_current_seed(5);
  t.normal_(0, 1, generator);
  const at::Tensor host = at::empty({64}).normal_(0, 1, at::detail::createCPUGenerator(5));
  expect_same(host, t, "normal_");
}

}  // namespace
}  // namespace capstan::test
