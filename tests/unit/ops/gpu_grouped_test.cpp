// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Groups of rows whose sizes only the device knows, in one product, against a product for each on
// the CPU. Legend: R rows, D input features, O output features.
#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <numeric>

#include "capstan/device/accelerator.h"
#include "capstan/ops/grouped_choice.h"
#include "capstan/ops/grouped_linear.h"
#include "unit/ops/one_param.h"

namespace capstan::ops {
namespace {

using testing::normal;
using testing::PlainStore;

// A flat store of [gate, up, down] of each expert, on the device: weights lie equally far apart.
class DeviceStore final : public param::ParamStore {
 public:
  struct Shape {
    int64_t groups, features, hidden;
  };
  DeviceStore(Shape shape, at::ScalarType type, c10::Device device)
      : type_(type), device_(device), anchor_(at::empty({0}).requires_grad_(true)) {
    for (int64_t g = 0; g < shape.groups; ++g) {
      const auto number = std::to_string(g);
      table_.push_back(param_spec("up" + number, {shape.features, shape.hidden}));
      table_.push_back(param_spec("down" + number, {shape.hidden, shape.features}));
    }
    const int64_t size = shape.features * shape.hidden, all = 2 * shape.groups * size;
    values_ = normal({all}, 5, type).to(device);
    gradients_ = at::full({all}, kNan, at::TensorOptions(gradient_type()).device(device));
    for (const auto& spec : table_) {
      const int64_t first = static_cast<int64_t>(slots_.size()) * size;
      shapes_.push_back(spec.shape);
      slots_.push_back({gradients_.narrow(0, first, size).view(spec.shape), true});
    }
  }
  [[nodiscard]] std::vector<Projection> projections(size_t first) {
    std::vector<Projection> list;
    for (size_t i = first; i < table_.size(); i += 2)
      list.push_back({{Param(this, static_cast<int>(i))}, {}});
    return list;
  }
  [[nodiscard]] Tensor gradient(int index) const { return slots_.at(index).buffer; }
  [[nodiscard]] bool is_written(int index) const { return !slots_.at(index).overwrite; }
  // Values that do not lie side by side.
  void scatter() { scattered_ = true; }
  // Gradients that may be put off wait for run_deferred().
  void defer() { is_deferred_ = true; }
  void run_deferred() {
    for (size_t i = 0; i < waiting_.size(); ++i) waiting_[i]();
    waiting_.clear();
  }

  [[nodiscard]] const plan::ParamSpec& spec(int index) const override { return table_.at(index); }
  [[nodiscard]] const plan::LocalParam& local(int) const override { return local_; }
  [[nodiscard]] bool trainable(int) const override { return true; }
  [[nodiscard]] Tensor value(int index) const override {
    const auto& shape = shapes_.at(index);
    const int64_t size = shape[0] * shape[1];
    const Tensor view = values_.narrow(0, index * size, size).view(shape);
    return scattered_ ? view.clone() : view;
  }
  [[nodiscard]] at::ScalarType compute_dtype() const override { return type_; }
  [[nodiscard]] uint64_t version(int) const override { return 0; }
  void accumulate(int index, const param::AddGradient& add, param::When when) override {
    if (is_deferred_ && when == param::When::kDeferrable)
      waiting_.push_back([this, index, add] { add(slots_.at(index)); });
    else
      add(slots_.at(index));
  }
  [[nodiscard]] Tensor anchor(int) const override { return anchor_; }
  [[nodiscard]] Tensor joined_value(std::span<const int> indices) const override {
    return value(indices.front());
  }
  void accumulate_joined(std::span<const int> indices, const param::AddGradient& add,
                         param::When when) override {
    accumulate(indices.front(), add, when);
  }

 private:
  static constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  [[nodiscard]] at::ScalarType gradient_type() const {
    return type_ == at::kDouble ? at::kDouble : at::kFloat;
  }
  at::ScalarType type_;
  c10::Device device_;
  Tensor anchor_, values_, gradients_;
  std::vector<plan::ParamSpec> table_;
  std::vector<plan::Shape> shapes_;
  std::vector<param::GradSlot> slots_;
  plan::LocalParam local_;
  std::vector<std::function<void()>> waiting_;
  bool scattered_ = false, is_deferred_ = false;
};

struct Results {
  Tensor y_RO, dx_RD, dw;
};

// Forward and two backwards on rows of which only the first ones belong to groups.
Results run(DeviceStore& store, const Tensor& x_RD, const Tensor& grad_RO, const RowGroups& groups,
            size_t first) {
  const auto list = store.projections(first);
  Results r;
  for (int pass = 0; pass < 2; ++pass) {
    const Tensor x = leaf(x_RD), y = grouped_linear(x, list, groups);
    run_backward(y, grad_RO);
    r = {y.detach(), x.grad(), {}};
  }
  Tensors gradients;
  for (size_t g = 0; g < list.size(); ++g) {
    EXPECT_TRUE(store.is_written(list[g].parts.front().index()));
    gradients.push_back(store.gradient(list[g].parts.front().index()));
  }
  r.dw = at::stack(gradients);
  return r;
}

std::vector<at::ScalarType> types() {
  std::vector<at::ScalarType> list;
  for (const auto type : {at::kBFloat16, at::kDouble})
    if (device::accelerator()->has_grouped_products(type)) list.push_back(type);
  return list;
}

// Rows behind the last group hold NaN: nobody may read them.
void expect_as_in_turn(const std::vector<int64_t>& counts, int64_t nobodys, at::ScalarType type,
                       size_t first, bool scattered) {
  const DeviceStore::Shape shape{static_cast<int64_t>(counts.size()), 24, 16};
  const int64_t rows = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  const int64_t in = first == 0 ? shape.hidden : shape.features;
  const int64_t out = first == 0 ? shape.features : shape.hidden;
  const Tensor x = normal({rows + nobodys, in}, 1, type),
               grad = normal({rows + nobodys, out}, 2, type);
  for (const Tensor& all : {x, grad})
    all.narrow(0, rows, nobodys).fill_(std::numeric_limits<double>::quiet_NaN());
  DeviceStore plain(shape, type, at::kCPU), store(shape, type, device::run_device());
  if (scattered) store.scatter();
  const Results want =
      run(plain, x.narrow(0, 0, rows), grad.narrow(0, 0, rows), {counts, {}}, first);
  RowGroups groups = with_ends(counts, device::run_device());
  if (nobodys > 0) groups.counts.clear();
  const Results got =
      run(store, x.to(device::run_device()), grad.to(device::run_device()), groups, first);
  EXPECT_TRUE(testing::near(got.y_RO.narrow(0, 0, rows).cpu(), want.y_RO));
  EXPECT_TRUE(testing::near(got.dx_RD.narrow(0, 0, rows).cpu(), want.dx_RD));
  EXPECT_TRUE(testing::near(got.dw.cpu(), want.dw, testing::tolerance_of(type)));
}

TEST(GpuGrouped, OneProductIsAProductForEachGroup) {
  if (types().empty()) GTEST_SKIP() << "no grouped products on this device";
  for (const auto type : types())
    for (const auto& counts : std::vector<std::vector<int64_t>>{
             {5, 0, 130, 7}, {0, 0, 1}, {9}, {3, 4, 0}, {0, 0}, {1, 1, 1, 1, 1, 1, 1, 1, 1}})
      for (const int64_t nobodys : {0, 6})
        for (const size_t first : {0, 1})
          for (const bool scattered : {false, true}) {
            SCOPED_TRACE(::testing::PrintToString(counts) + " and " + std::to_string(nobodys) +
                         c10::toString(type));
            expect_as_in_turn(counts, nobodys, type, first, scattered);
          }
}

// More than are added at a time.
TEST(GpuGrouped, ManyEqualGroups) {
  if (types().empty()) GTEST_SKIP() << "no grouped products on this device";
  expect_as_in_turn(std::vector<int64_t>(70, 2), 0, at::kBFloat16, 0, false);
}

// The fp64 sum of products of the same factors, and the sum of their magnitudes.
struct Exact {
  Tensor sum, magnitude;
};
Exact exact_of(const Tensors& grads, const Tensors& xs, const std::vector<int64_t>& counts) {
  Tensors sums, magnitudes;
  int64_t first = 0;
  for (const int64_t count : counts) {
    const auto sum = [&](bool absolute) {
      Tensor all = at::zeros({grads[0].size(1), xs[0].size(1)}, at::kDouble);
      for (size_t i = 0; i < xs.size(); ++i) {
        const Tensor g = grads[i].narrow(0, first, count).to(at::kDouble);
        const Tensor x = xs[i].narrow(0, first, count).to(at::kDouble);
        all += absolute ? at::mm(g.abs().t(), x.abs()) : at::mm(g.t(), x);
      }
      return all;
    };
    sums.push_back(sum(false));
    magnitudes.push_back(sum(true));
    first += count;
  }
  return {at::stack(sums), at::stack(magnitudes)};
}

// The largest error of weight gradients over some micro-batches, beside the sum of magnitudes.
double gradient_error(const std::vector<int64_t>& counts, const RowGroups& groups,
                      bool deferred = false) {
  DeviceStore store({static_cast<int64_t>(counts.size()), 24, 16}, at::kBFloat16,
                    device::run_device());
  if (deferred) store.defer();
  const auto list = store.projections(0);
  const int64_t rows = std::accumulate(counts.begin(), counts.end(), int64_t{0});
  Tensors grads, xs;
  for (uint64_t i = 0; i < 5; ++i) {
    xs.push_back(normal({rows, 16}, 10 + i, at::kBFloat16));
    grads.push_back(normal({rows, 24}, 20 + i, at::kBFloat16));
    const Tensor x = leaf(xs.back().to(device::run_device()));
    run_backward(grouped_linear(x, list, groups), grads.back().to(device::run_device()));
  }
  store.run_deferred();
  Tensors got;
  for (const Projection& p : list)
    got.push_back(store.gradient(p.parts.front().index()).to(at::kDouble).cpu());
  const Exact exact = exact_of(grads, xs, counts);
  return ((at::stack(got) - exact.sum).abs() / (exact.magnitude + 1e-30)).max().item<double>();
}

TEST(GpuGrouped, WeightGradientsOfRowsThatTheHostKnowsAreSummedInFp32) {
  if (!device::accelerator()->has_grouped_products(at::kBFloat16))
    GTEST_SKIP() << "no grouped products on this device";
  const std::vector<int64_t> counts{40, 0, 131, 8};
  RowGroups groups = with_ends(counts, device::run_device());
  EXPECT_LT(gradient_error(counts, groups), 1e-6);
  const RowGroups equal = equal_groups(4, 64, device::run_device());
  for (const bool deferred : {false, true})
    EXPECT_LT(gradient_error({64, 64, 64, 64}, equal, deferred), 1e-6);
  groups.counts.clear();  // one product, whose result is bf16
  EXPECT_GT(gradient_error(counts, groups), 1e-5);
}

// One product adds to all buffers, or overwrites all of them.
TEST(GpuGrouped, EqualGroupsMayHaveBuffersThatDiffer) {
  if (types().empty()) GTEST_SKIP() << "no grouped products on this device";
  for (const auto type : types()) {
    DeviceStore store({3, 24, 16}, type, device::run_device());
    const auto list = store.projections(0);
    const Tensor x = normal({24, 16}, 1, type), grad = normal({24, 24}, 2, type);
    const auto pass = [&](std::span<const Projection> some) {
      const auto groups = static_cast<int64_t>(some.size());
      const Tensor rows = leaf(x.narrow(0, 0, 8 * groups).to(device::run_device()));
      run_backward(grouped_linear(rows, some, equal_groups(groups, 8, device::run_device())),
                   grad.narrow(0, 0, 8 * groups).to(device::run_device()));
    };
    pass(std::span(list).first(1));
    pass(list);
    for (int64_t g = 0; g < 3; ++g) {
      const Tensor want = at::mm(grad.narrow(0, 8 * g, 8).to(at::kDouble).t(),
                                 x.narrow(0, 8 * g, 8).to(at::kDouble));
      const Tensor got = store.gradient(list[static_cast<size_t>(g)].parts.front().index());
      EXPECT_LT((got.to(at::kDouble).cpu() - want * (g == 0 ? 2 : 1)).abs().max().item<double>(),
                1e-5);
    }
  }
}

}  // namespace
}  // namespace capstan::ops
