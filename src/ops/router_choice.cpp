// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The decisions of a router, as plain loops: ties and NaN must come out the same everywhere.
// Legend: N tokens, E experts, k choices, G groups, S rows.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <limits>

#include "capstan/base/check.h"
#include "capstan/ops/router.h"
#include "ops/router_internal.h"

namespace capstan::ops {
namespace {

constexpr int64_t kTokensPerTask = 64;

// The best `most` of the candidates offered so far, best first. Of equal ones the earlier stays
// ahead; NaN never passes anything, so the list is complete whatever the scores are.
template <class T>
class Best {
 public:
  explicit Best(int64_t most) : most_(static_cast<size_t>(most)) {}
  void clear() { size_ = 0; }
  void offer(T score, int64_t index) {
    size_t at = size_;
    if (size_ == most_) {
      if (!(score > scores_[most_ - 1])) return;
      at = most_ - 1;
    } else if (scores_.size() < most_) {
      scores_.push_back(score);
      indices_.push_back(index);
    }
    size_ = std::min(size_ + 1, most_);
    for (; at > 0 && score > scores_[at - 1]; --at) {
      scores_[at] = scores_[at - 1];
      indices_[at] = indices_[at - 1];
    }
    scores_[at] = score;
    indices_[at] = index;
  }
  [[nodiscard]] size_t size() const { return size_; }
  [[nodiscard]] int64_t index(size_t i) const { return indices_[i]; }
  [[nodiscard]] T score(size_t i) const { return scores_[i]; }

 private:
  size_t most_, size_ = 0;
  std::vector<T> scores_;
  std::vector<int64_t> indices_;
};

// One more than is chosen is kept where a margin is wanted.
template <class T>
class Chooser {
 public:
  Chooser(const RouterSpec& spec, int64_t experts, const T* bias, int64_t more)
      : spec_(spec),
        size_(experts / spec.groups),
        bias_(bias),
        groups_(std::min(spec.groups_per_token + more, spec.groups)),
        experts_(std::min(spec.per_token + more, experts)),
        is_open_(static_cast<size_t>(spec.groups), true) {}

  void choose(const T* scores) {
    if (spec_.groups > 1) open_groups(scores);
    experts_.clear();
    for (int64_t g = 0; g < spec_.groups; ++g) {
      if (!is_open_[static_cast<size_t>(g)]) continue;
      for (int64_t e = g * size_; e < (g + 1) * size_; ++e) experts_.offer(value(scores, e), e);
    }
  }
  [[nodiscard]] const Best<T>& groups() const { return groups_; }
  [[nodiscard]] const Best<T>& experts() const { return experts_; }

 private:
  [[nodiscard]] T value(const T* scores, int64_t e) const {
    return bias_ ? scores[e] + bias_[e] : scores[e];
  }
  void open_groups(const T* scores) {
    groups_.clear();
    for (int64_t g = 0; g < spec_.groups; ++g) {
      T first = value(scores, g * size_), second = 0;
      for (int64_t i = 1; i < size_; ++i) {
        const T v = value(scores, g * size_ + i);
        second = i == 1 ? v : std::max(second, v);
        if (second > first) std::swap(first, second);
      }
      groups_.offer(first + second, g);
    }
    is_open_.assign(is_open_.size(), false);
    for (int64_t i = 0; i < spec_.groups_per_token; ++i)
      is_open_[static_cast<size_t>(groups_.index(static_cast<size_t>(i)))] = true;
  }

  const RouterSpec& spec_;
  int64_t size_;
  const T* bias_;
  Best<T> groups_, experts_;
  std::vector<bool> is_open_;
};

}  // namespace

void check_router(const RouterSpec& spec, int64_t experts) {
  CAPSTAN_CHECK(spec.groups >= 1 && experts % spec.groups == 0 && spec.groups_per_token >= 1 &&
                    spec.groups_per_token <= spec.groups && spec.per_token >= 1 &&
                    spec.per_token <= experts / spec.groups * spec.groups_per_token,
                "router: {} of {} experts, in {} of {} groups", spec.per_token, experts,
                spec.groups_per_token, spec.groups);
}

Tensor choose_experts(const Tensor& scores_in, const Tensor& bias_E, const RouterSpec& spec) {
  const Tensor scores_NE = scores_in.cpu();
  const int64_t tokens = scores_NE.size(0), experts = scores_NE.size(1), k = spec.per_token;
  check_router(spec, experts);
  const Tensor bias =
      bias_E.defined() ? bias_E.cpu().to(scores_NE.scalar_type()).contiguous() : bias_E;
  const Tensor chosen_Nk = at::empty({tokens, k}, at::kLong);
  AT_DISPATCH_FLOATING_TYPES(scores_NE.scalar_type(), "choose_experts", [&] {
    const auto* const scores = scores_NE.const_data_ptr<scalar_t>();
    const auto* const biases = bias.defined() ? bias.const_data_ptr<scalar_t>() : nullptr;
    auto* const out = chosen_Nk.mutable_data_ptr<int64_t>();
    at::parallel_for(0, tokens, kTokensPerTask, [&](int64_t begin, int64_t end) {
      Chooser<scalar_t> chooser(spec, experts, biases, 0);
      for (int64_t n = begin; n < end; ++n) {
        chooser.choose(scores + n * experts);
        for (int64_t j = 0; j < k; ++j)
          out[n * k + j] = chooser.experts().index(static_cast<size_t>(j));
      }
    });
  });
  return chosen_Nk.to(scores_in.device());
}

double choice_margin(const Tensor& scores_in, const Tensor& bias_E, const RouterSpec& spec) {
  const Tensor scores_NE = scores_in.cpu().to(at::kDouble).contiguous();
  const int64_t experts = scores_NE.size(1);
  check_router(spec, experts);
  const Tensor bias = bias_E.defined() ? bias_E.cpu().to(at::kDouble).contiguous() : bias_E;
  Chooser<double> chooser(spec, experts, bias.defined() ? bias.const_data_ptr<double>() : nullptr,
                          1);
  double margin = std::numeric_limits<double>::infinity();
  const auto look = [&](const Best<double>& best) {
    for (size_t i = 1; i < best.size(); ++i)
      margin = std::min(margin, best.score(i - 1) - best.score(i));
  };
  for (int64_t n = 0; n < scores_NE.size(0); ++n) {
    chooser.choose(scores_NE.const_data_ptr<double>() + n * experts);
    if (spec.groups > 1) look(chooser.groups());
    look(chooser.experts());
  }
  return margin;
}

namespace {

// bincount() would wait for the device.
Tensor count_each(const Tensor& groups, int64_t count) {
  const Tensor flat = groups.flatten();
  return at::zeros({count}, flat.options()).scatter_add_(0, flat, at::ones_like(flat));
}

}  // namespace

Tensor count_choices(const Tensor& experts_Nk, const Tensor& row_N, int64_t rows, int64_t experts) {
  if (!experts_Nk.is_cpu()) {
    const Tensor first_N1 = row_N.to(experts_Nk.device()).unsqueeze(1) * experts;
    return count_each(first_N1 + experts_Nk, rows * experts).view({rows, experts});
  }
  const Tensor counts_SE = at::zeros({rows, experts}, at::kLong);
  auto* const counts = counts_SE.mutable_data_ptr<int64_t>();
  const Tensor row = row_N.cpu().contiguous(), chosen = experts_Nk.cpu().contiguous();
  const int64_t k = chosen.size(1);
  for (int64_t n = 0; n < chosen.size(0); ++n)
    for (int64_t j = 0; j < k; ++j)
      ++counts[row.const_data_ptr<int64_t>()[n] * experts +
               chosen.const_data_ptr<int64_t>()[n * k + j]];
  return counts_SE;
}

namespace {

// Which token stands at each place of each row.
std::vector<int64_t> tokens_by_place(const Tensor& row_N, const Tensor& place_N,
                                     const CapacitySpec& spec) {
  std::vector<int64_t> token(static_cast<size_t>(spec.rows * spec.row_length), -1);
  const Tensor row = row_N.cpu().contiguous(), place = place_N.cpu().contiguous();
  for (int64_t n = 0; n < row.numel(); ++n) {
    const int64_t r = row.const_data_ptr<int64_t>()[n], p = place.const_data_ptr<int64_t>()[n];
    if (r < 0) continue;
    CAPSTAN_CHECK(r < spec.rows && p >= 0 && p < spec.row_length,
                  "capacity: a token at row {}, place {} of {} rows of {}", r, p, spec.rows,
                  spec.row_length);
    int64_t& at = token[static_cast<size_t>(r * spec.row_length + p)];
    CAPSTAN_CHECK(at < 0, "capacity: two tokens at place {} of row {}", p, r);
    at = n;
  }
  return token;
}

}  // namespace

// Choices sorted by row and expert, among those by place in the row: how far one stands from the
// start of its group is how many came before it. Padding is a group of its own.
Tensor keep_by_sort(const Tensor& experts_Nk, const Tensor& row_N, const Tensor& place_N,
                    const CapacitySpec& spec) {
  const int64_t k = experts_Nk.size(1), padding = spec.rows * spec.experts;
  const Tensor row_N1 = row_N.unsqueeze(1), choice_k = at::arange(k, experts_Nk.options());
  const Tensor is_token_Nk = row_N1.ge(0).expand_as(experts_Nk);
  const Tensor group_Nk = (row_N1 * spec.experts + experts_Nk).masked_fill(~is_token_Nk, padding);
  const Tensor turn_Nk = place_N.unsqueeze(1).clamp_min(0) * k + choice_k;
  const Tensor order = (group_Nk * (spec.row_length * k) + turn_Nk).flatten().argsort();
  const Tensor counts = count_each(group_Nk, padding + 1);
  const Tensor start =
      (counts.cumsum(0) - counts).index_select(0, group_Nk.flatten().index_select(0, order));
  const Tensor before =
      at::empty_like(order).scatter_(0, order, at::arange(order.numel(), order.options()) - start);
  return before.lt(spec.capacity).view_as(experts_Nk).logical_and(is_token_Nk);
}

Tensor keep_within_capacity(const Tensor& experts_in, const Tensor& row_N, const Tensor& place_N,
                            const CapacitySpec& spec) {
  if (!experts_in.is_cpu())
    return keep_by_sort(experts_in, row_N.to(experts_in.device()), place_N.to(experts_in.device()),
                        spec);
  const Tensor experts_Nk = experts_in.cpu().contiguous();
  const int64_t k = experts_Nk.size(1);
  const auto token = tokens_by_place(row_N, place_N, spec);
  const Tensor keep_Nk = at::zeros(experts_Nk.sizes(), at::kBool);
  const auto* const chosen = experts_Nk.const_data_ptr<int64_t>();
  bool* const keep = keep_Nk.mutable_data_ptr<bool>();
  at::parallel_for(0, spec.rows, 1, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> taken(static_cast<size_t>(spec.experts));
    for (int64_t row = begin; row < end; ++row) {
      std::fill(taken.begin(), taken.end(), 0);
      for (int64_t p = 0; p < spec.row_length; ++p) {
        const int64_t n = token[static_cast<size_t>(row * spec.row_length + p)];
        CAPSTAN_CHECK(n >= 0, "capacity: nothing at place {} of row {}", p, row);
        for (int64_t j = n * k; j < (n + 1) * k; ++j)
          keep[j] = taken[static_cast<size_t>(chosen[j])]++ < spec.capacity;
      }
    }
  });
  return keep_Nk.to(experts_in.device());
}

}  // namespace capstan::ops
