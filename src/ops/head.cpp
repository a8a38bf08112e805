// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Legend: B samples, T tokens, N = B T, n tokens of a chunk, D hidden features, V vocabulary rows.
#include "capstan/ops/head.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>

#include "capstan/base/check.h"
#include "capstan/base/error.h"
#include "capstan/ops/linear.h"
#include "capstan/ops/path.h"
#include "capstan/plan/family.h"
#include "ops/logits_internal.h"

namespace capstan::ops {
namespace {

int64_t real_rows(const Projection& head) {
  CAPSTAN_CHECK(head.parts.size() == 1 && head.bias.empty(),
                "the head has one weight and no bias, got {} and {}", head.parts.size(),
                head.bias.size());
  return head.parts.front().local().real.extent.at(0);
}

// The weight without vocabulary padding: padded rows have no logits at all.
Tensor real_weight(const Projection& head) { return head.weight().narrow(0, 0, real_rows(head)); }

int64_t vocabulary_of(const Projection& head) { return head.parts.front().spec().shape.at(0); }

// Off the CPU the caller has looked: reading them would wait for the device.
void check_targets(const Tensor& targets, int64_t vocab) {
  if (!targets.is_cpu()) return;
  const auto* const target = targets.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < targets.numel(); ++i)
    if (target[i] != kIgnoreTarget && (target[i] < 0 || target[i] >= vocab))
      throw DataError(ErrorText{.module = "ops",
                                .what = fmt::format("scoring target {} of the batch", i),
                                .got = fmt::format("id {}", target[i]),
                                .need = fmt::format("0 to {}, or {}", vocab - 1, kIgnoreTarget),
                                .why = "the model's vocabulary ends there",
                                .fix = "Prepare the data with the tokenizer of this model"});
}

Tensor gathered(const Tensor& x, const VocabularyCut& cut) {
  return cut.gather ? cut.gather(x.detach()) : x.detach();
}

// Ranks that share a vocabulary go through the same chunks, whatever each holds of it.
int64_t chunk_tokens(const Projection& head, const VocabularyCut& cut, int64_t tokens) {
  const int64_t rows =
      cut.is_cut() ? head.parts.front().local().local_shape.at(0) : real_rows(head);
  return plan::head_chunk_tokens(rows, tokens);
}

// All tokens as rows, in chunks.
struct Chunks {
  Tensor x_ND, targets_N, weight_VD;
  int64_t first_row;  // global number of weight_VD's row 0
  int64_t size;

  Chunks(const Tensor& x, const Projection& head, const Tensor& targets, const VocabularyCut& cut)
      : x_ND(gathered(x, cut).reshape({-1, x.size(-1)})),
        targets_N(targets.to(at::kLong).reshape({-1}).contiguous()),
        weight_VD(real_weight(head)),
        first_row(head.parts.front().local().real.begin.at(0)),
        size(chunk_tokens(head, cut, x_ND.size(0))) {
    CAPSTAN_CHECK(targets_N.numel() == x_ND.size(0), "head: {} targets for {} tokens",
                  targets_N.numel(), x_ND.size(0));
    CAPSTAN_CHECK(size > 0 || x_ND.size(0) == 0, "head: chunk of {} tokens", size);
  }

  // visit(logits_nV, first token, count); logits live in one buffer that the next chunk overwrites.
  template <class Visit>
  void for_each(const Visit& visit) const {
    const int64_t tokens = x_ND.size(0);
    // Logits of a weight kept wide stay wide.
    const bool wide = weight_VD.element_size() > x_ND.element_size();
    const Tensor buffer = at::empty({std::min(size, tokens), weight_VD.size(0)},
                                    wide ? weight_VD.options() : x_ND.options());
    for (int64_t first = 0; first < tokens; first += size) {
      const int64_t n = std::min(size, tokens - first);
      Tensor logits_nV = buffer.narrow(0, 0, n);
      multiply_into(logits_nV, x_ND.narrow(0, first, n), weight_VD.t());
      visit(logits_nV, first, n);
    }
  }
};

void accumulate_now(const Projection& head, const Tensor& d_logits_nV, const Tensor& x_nD) {
  head.accumulate(
      [&](param::GradSlot& slot) {
        const int64_t real = d_logits_nV.size(1), padded = slot.buffer.size(0);
        if (slot.overwrite && real < padded) slot.buffer.narrow(0, real, padded - real).zero_();
        param::GradSlot rows{slot.buffer.narrow(0, 0, real), slot.overwrite};
        add_outer_product(rows, d_logits_nV, x_nD);
        slot.overwrite = false;
      },
      param::When::kNow);
}

// Weight gradient and input gradient of one chunk whose logits have become their gradient.
void push_gradients(const Chunks& chunks, const Projection& head, const Tensor& d_logits_nV,
                    int64_t first, const Tensor& dx_ND) {
  const int64_t n = d_logits_nV.size(0);
  multiply_into(dx_ND.narrow(0, first, n), d_logits_nV, chunks.weight_VD);
  if (head.trainable()) accumulate_now(head, d_logits_nV, chunks.x_ND.narrow(0, first, n));
}

// Log-sum-exp and logit of the target over the whole vocabulary.
struct RowScores {
  Tensor lse_n, picked_n;
  [[nodiscard]] Tensor logprob_of(const Tensor& targets) const {
    return at::where(targets.ne(kIgnoreTarget), picked_n - lse_n, at::zeros_like(lse_n));
  }
};
RowScores row_scores(const Tensor& logits, const Tensor& targets, int64_t first_row,
                     const VocabularyCut& cut) {
  const LogitStats stats = logit_stats(logits, targets, first_row);
  if (!cut.is_cut()) return {stats.top_N + stats.sum_N.log(), stats.picked_N};
  const Tensor top = stats.top_N.clone();
  cut.max(top);
  // A rank without columns has top -inf and sum 0, and so adds 0.
  const Tensor sums_2n = at::stack({stats.sum_N * (stats.top_N - top).exp(), stats.picked_N});
  cut.sum(sums_2n);
  return {top + sums_2n[0].log(), sums_2n[1]};
}

Tensor entropy_of(const Tensor& logits, const Tensor& lse, const Tensor& targets,
                  const VocabularyCut& cut) {
  const Tensor logp = logits.to(lse.scalar_type()) - lse.unsqueeze(1);
  const Tensor entropy = -(logp.exp() * logp).sum(1);
  if (cut.is_cut()) cut.sum(entropy);
  return at::where(targets.ne(kIgnoreTarget), entropy, at::zeros_like(entropy));
}

// The gradient that comes through the entropy H: dH/dl = -p (log p + H).
Tensor entropy_gradient(const Tensor& logits, const Tensor& lse, const Tensor& entropy,
                        const Tensor& grad_n) {
  const Tensor logp = logits.to(lse.scalar_type()) - lse.unsqueeze(1);
  return -logp.exp() * (logp + entropy.unsqueeze(1)) * grad_n.unsqueeze(1);
}

struct SavedScores {
  Tensor lse_N, entropy_N;  // entropy: undefined unless asked for
};
struct ScoreGradients {
  Tensor logprob_N, entropy_N;  // either may be undefined
};

Tensor scores_backward(const Chunks& chunks, const Projection& head, const SavedScores& scores,
                       const ScoreGradients& grads) {
  const Tensor& lse = scores.lse_N;
  const Tensor dx_ND = at::empty_like(chunks.x_ND);
  const Tensor weights =
      grads.logprob_N.defined() ? -grads.logprob_N.contiguous() : at::zeros_like(lse);
  chunks.for_each([&](const Tensor& logits, int64_t first, int64_t n) {
    const Tensor targets = chunks.targets_N.narrow(0, first, n), l = lse.narrow(0, first, n);
    Tensor extra;
    if (grads.entropy_N.defined()) {
      const Tensor g = grads.entropy_N.narrow(0, first, n);
      extra = entropy_gradient(logits, l, scores.entropy_N.narrow(0, first, n),
                               at::where(targets.ne(kIgnoreTarget), g, at::zeros_like(g)));
    }
    logits_to_gradient_(logits, l, targets, weights.narrow(0, first, n), chunks.first_row);
    if (extra.defined()) logits.add_(extra);
    push_gradients(chunks, head, logits, first, dx_ND);
  });
  return dx_ND;
}

// The rows of one chunk. With weights the logits become their gradient.
struct WeightedRows {
  Tensor targets_n, weights_n, logprob_n;
  int64_t first_row;
};
void weigh_rows_(const Tensor& logits, const WeightedRows& rows, const VocabularyCut& cut) {
  if (!cut.is_cut()) return cross_entropy_(logits, rows.targets_n, rows.weights_n, rows.logprob_n);
  const RowScores scores = row_scores(logits, rows.targets_n, rows.first_row, cut);
  rows.logprob_n.copy_(scores.logprob_of(rows.targets_n));
  if (rows.weights_n.defined())
    logits_to_gradient_(logits, scores.lse_n, rows.targets_n, rows.weights_n, rows.first_row);
}

// From the rows of all tokens to the shape of this rank's x.
Tensor input_gradient(const Tensor& dx_ND, const Tensor& targets, const Tensor& x,
                      const VocabularyCut& cut) {
  if (!cut.reduce) return dx_ND.view_as(x);
  std::vector<int64_t> sizes = targets.sizes().vec();
  sizes.push_back(dx_ND.size(1));
  return cut.reduce(dx_ND.view(sizes)).view_as(x);
}

}  // namespace

HeadScores head_scores(const Tensor& x, const Projection& head, const Tensor& targets, bool entropy,
                       const VocabularyCut& cut) {
  HeadScores out;
  Tensor lse_N;
  const Path chosen = path();
  {
    at::NoGradGuard no_grad;
    const Chunks chunks(x, head, targets, cut);
    check_targets(chunks.targets_N, vocabulary_of(head));
    const auto options = x.options().dtype(wide_dtype_of(x)).requires_grad(false);
    lse_N = at::empty({chunks.x_ND.size(0)}, options);
    out.logprob_BT = at::empty_like(lse_N);
    if (entropy) out.entropy_BT = at::empty_like(lse_N);
    chunks.for_each([&](const Tensor& logits, int64_t first, int64_t n) {
      const Tensor t = chunks.targets_N.narrow(0, first, n);
      const RowScores rows = row_scores(logits, t, chunks.first_row, cut);
      lse_N.narrow(0, first, n).copy_(rows.lse_n);
      out.logprob_BT.narrow(0, first, n).copy_(rows.logprob_of(t));
      if (entropy) out.entropy_BT.narrow(0, first, n).copy_(entropy_of(logits, rows.lse_n, t, cut));
    });
    out.logprob_BT = out.logprob_BT.view(targets.sizes());
    if (entropy) out.entropy_BT = out.entropy_BT.view(targets.sizes());
  }
  Tensors outputs{out.logprob_BT};
  if (entropy) outputs.push_back(out.entropy_BT);
  record(outputs, {"head_scores",
                   {x},
                   head.parts,
                   {x, lse_N, out.entropy_BT},
                   [head, targets, chosen, cut](const Tensors& saved, Tensors& grads) -> Tensors {
                     at::NoGradGuard no_grad;
                     const PathGuard guard(chosen);
                     const auto flat = [](const Tensor& g) {
                       return g.defined() ? g.reshape({-1}) : Tensor();
                     };
                     const Tensor dx = scores_backward(
                         Chunks(saved[0], head, targets, cut), head, {saved[1], flat(saved[2])},
                         {flat(grads[0]), grads.size() > 1 ? flat(grads[1]) : Tensor()});
                     return {input_gradient(dx, targets, saved[0], cut)};
                   }});
  return out;
}

WeightedLoss head_weighted_loss(const Tensor& x, const Projection& head, const Tensor& targets,
                                const Tensor& weights, const VocabularyCut& cut,
                                const Tensor& uniform_BT) {
  const bool wants_gradient = needs_backward({x}, head.parts);
  WeightedLoss out;
  Tensor dx;
  {
    at::NoGradGuard no_grad;
    const Chunks chunks(x, head, targets, cut);
    check_targets(chunks.targets_N, vocabulary_of(head));
    const auto wide = wide_dtype_of(x);
    const Tensor weights_N = weights.detach().to(wide).reshape({-1}).contiguous();
    CAPSTAN_CHECK(weights_N.numel() == chunks.x_ND.size(0), "head: {} weights for {} tokens",
                  weights_N.numel(), chunks.x_ND.size(0));
    const Tensor logprob_N = at::empty_like(weights_N);
    const Tensor dx_ND = wants_gradient ? at::empty_like(chunks.x_ND) : Tensor();
    const Tensor uniform_N = uniform_BT.defined() ? uniform_BT.reshape({-1}) : Tensor();
    chunks.for_each([&](const Tensor& logits, int64_t first, int64_t n) {
      Tensor targets_n = chunks.targets_N.narrow(0, first, n);
      if (uniform_N.defined())
        targets_n =
            draw_labels(logits, targets_n, uniform_N.narrow(0, first, n), chunks.first_row, cut);
      weigh_rows_(logits,
                  {.targets_n = targets_n,
                   .weights_n = wants_gradient ? weights_N.narrow(0, first, n) : Tensor(),
                   .logprob_n = logprob_N.narrow(0, first, n),
                   .first_row = chunks.first_row},
                  cut);
      if (wants_gradient) push_gradients(chunks, head, logits, first, dx_ND);
    });
    if (wants_gradient) dx = input_gradient(dx_ND, targets, x, cut);
    const Tensor counted =
        at::where(chunks.targets_N.ne(kIgnoreTarget), weights_N, at::zeros_like(weights_N));
    out.loss = -(counted.to(at::kDouble) * logprob_N.to(at::kDouble)).sum().to(wide);
    out.logprob_BT = logprob_N.view(targets.sizes());
  }
  if (wants_gradient)
    record(out.loss, {"head_weighted_loss",
                      {x},
                      head.parts,
                      {dx},
                      [](const Tensors& saved, Tensors& grads) -> Tensors {
                        const double seed = grads[0].is_cpu() ? grads[0].item<double>() : 1.0;
                        CAPSTAN_CHECK(
                            seed == 1.0,
                            "head: backward seed {} of a loss whose gradient was made in the "
                            "forward for seed 1 (put factors into the token weights)",
                            seed);
                        return {saved[0]};
                      }});
  return out;
}

Tensor head_logits(const Tensor& x, const Projection& head) {
  return linear_forward(x.detach(), real_weight(head), {});
}

}  // namespace capstan::ops
