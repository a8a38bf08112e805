// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Legend: B samples, T tokens, N = B T, n tokens that this rank routes, p ranks, D hidden, k
// choices of a token.
#include "capstan/parallel/expert_parallel.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>

#include "capstan/base/check.h"
#include "capstan/ops/record.h"
#include "parallel/expert_exchange_internal.h"

namespace capstan::parallel {
namespace {

// Consecutive tokens for each rank of the tensor axis: `part` each, the last ones fewer.
struct Slice {
  comm::Communicator group;
  int64_t all, part, begin, count;

  Slice(const comm::Communicator& tensor, int64_t tokens)
      : group(tensor), all(tokens), part((tokens + tensor.size() - 1) / tensor.size()) {
    begin = std::min(part * tensor.rank(), tokens);
    count = std::min(part, tokens - begin);
  }
  [[nodiscard]] Tensor own(const Tensor& x_ND) const { return x_ND.narrow(0, begin, count); }
  // The parts of all ranks, [N, ...].
  [[nodiscard]] Tensor gather(const Tensor& x_nD) const {
    std::vector<int64_t> sizes = x_nD.sizes().vec();
    sizes[0] = part;
    Tensor padded = x_nD.contiguous();
    if (count < part) {
      padded = at::zeros(sizes, x_nD.options());
      padded.narrow(0, 0, count).copy_(x_nD);
    }
    sizes[0] = part * group.size();
    const Tensor parts = at::empty(sizes, x_nD.options());
    group.all_gather(parts, padded).wait();
    return parts.narrow(0, 0, all);
  }
};

// Every rank holds all tokens and goes on with its own. Its gradient is zero for the others', so
// the whole one is their concatenation.
Tensor take_own(const Slice& slice, const Tensor& x_ND) {
  Tensor own;
  {
    at::NoGradGuard no_grad;
    own = slice.own(x_ND.detach()).detach();
  }
  return ops::record(own, {"own_tokens",
                           {x_ND},
                           {},
                           {},
                           [slice](const ops::Tensors&, ops::Tensors& grads) -> ops::Tensors {
                             at::NoGradGuard no_grad;
                             return {slice.gather(grads[0].detach())};
                           }});
}

// The reverse. What follows is computed alike on every rank of the axis, so a rank's own part of
// the gradient is whole.
Tensor gather_all(const Slice& slice, const Tensor& y_nD) {
  Tensor all;
  {
    at::NoGradGuard no_grad;
    all = slice.gather(y_nD.detach()).detach();
  }
  return ops::record(all, {"all_tokens",
                           {y_nD},
                           {},
                           {},
                           [slice](const ops::Tensors&, ops::Tensors& grads) -> ops::Tensors {
                             at::NoGradGuard no_grad;
                             return {slice.own(grads[0])};
                           }});
}

// Choices, rows and places of all tokens that share rows; parts that are short are padded.
Tensor keep_over(const comm::Communicator& group, int64_t part, const Tensor& experts_nk,
                 const nn::TokenPlaces& places, const ops::CapacitySpec& spec) {
  const int64_t k = experts_nk.size(1), count = experts_nk.size(0);
  const Tensor mine = at::full({part, k + 2}, -1, experts_nk.options().dtype(at::kInt));
  mine.narrow(0, 0, count).narrow(1, 0, k).copy_(experts_nk);
  mine.narrow(0, 0, count).select(1, k).copy_(places.row_N);
  mine.narrow(0, 0, count).select(1, k + 1).copy_(places.place_N);
  const Tensor all = at::empty({part * group.size(), k + 2}, mine.options());
  group.all_gather(all, mine).wait();
  const Tensor wide = all.to(at::kLong);
  return ops::keep_within_capacity(wide.narrow(1, 0, k), wide.select(1, k), wide.select(1, k + 1),
                                   spec)
      .narrow(0, part * group.rank(), count);
}

nn::ExpertCut cut_of(const ExpertParallel& layout, int64_t part) {
  nn::ExpertCut cut;
  const comm::Communicator rows = layout.rows.control(), expert = layout.expert;
  if (rows.size() > 1) {
    cut.sum_rows = [rows](const Tensor& x) { rows.all_reduce(x).wait(); };
    cut.keep = [rows, part](const Tensor& experts_nk, const nn::TokenPlaces& places,
                            const ops::CapacitySpec& spec) {
      return keep_over(rows, part, experts_nk, places, spec);
    };
  }
  if (expert.size() > 1)
    cut.exchange = [expert](const std::vector<int64_t>& counts_E) {
      return exchange_over(expert, counts_E);
    };
  if (expert.size() > 1)
    cut.exchange_room = [expert](int64_t experts, int64_t room) {
      return exchange_room_over(expert, experts, room);
    };
  cut.most_tokens = part;
  return cut;
}

int64_t whole_row(const param::RowMap& rows, int64_t tokens) {
  return rows.row_length > 0 ? rows.row_length : tokens;
}

}  // namespace

Tensor parallel_experts(const ExpertParallel& layout, const nn::Context& context, int layer,
                        const Tensor& x_BTD, const nn::ExpertInput& input) {
  CAPSTAN_CHECK(context.rows, "a pass needs the map of its rows");
  CAPSTAN_CHECK(
      static_cast<int64_t>(input.gate_up.size()) * layout.expert.size() == input.shape.count,
      "layer {}: {} of {} experts on one of {} ranks", layer, input.gate_up.size(),
      input.shape.count, layout.expert.size());
  const int64_t batch = x_BTD.size(0), tokens = x_BTD.size(1);
  const Tensor x_ND = x_BTD.reshape({batch * tokens, x_BTD.size(2)});
  const bool is_split = layout.sequence_parallel && context.mode != param::Mode::kDecode;
  if (is_split || layout.tensor.size() == 1) {
    const int64_t ranks = is_split ? layout.tensor.size() : 1;
    const nn::TokenPlaces places =
        nn::places_of(*context.rows, batch, tokens, is_split ? layout.tensor.rank() * tokens : 0,
                      whole_row(*context.rows, tokens * ranks), x_BTD.device());
    return nn::run_experts(context, layer, x_ND, input, places, cut_of(layout, x_ND.size(0)))
        .view(x_BTD.sizes());
  }
  const Slice slice(layout.tensor, batch * tokens);
  nn::TokenPlaces places = nn::places_of(*context.rows, batch, tokens, 0,
                                         whole_row(*context.rows, tokens), x_BTD.device());
  places.row_N = slice.own(places.row_N);
  places.place_N = slice.own(places.place_N);
  const Tensor y_nD = nn::run_experts(context, layer, take_own(slice, x_ND), input, places,
                                      cut_of(layout, slice.part));
  return gather_all(slice, y_nD).view(x_BTD.sizes());
}

}  // namespace capstan::parallel
