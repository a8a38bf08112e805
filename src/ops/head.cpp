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

void check_targets(const Tensor& targets, int64_t vocab) {
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

// Tokens as rows, in chunks.
struct Chunks {
  Tensor x_ND, targets_N, weight_VD;
  int64_t size;

  Chunks(const Tensor& x, const Projection& head, const Tensor& targets)
      : x_ND(x.detach().reshape({-1, x.size(-1)})),
        targets_N(targets.to(at::kLong).reshape({-1}).contiguous()),
        weight_VD(real_weight(head)),
        size(plan::head_chunk_tokens(weight_VD.size(0), x_ND.size(0))) {
    CAPSTAN_CHECK(targets_N.numel() == x_ND.size(0), "head: {} targets for {} tokens",
                  targets_N.numel(), x_ND.size(0));
    CAPSTAN_CHECK(size > 0 || x_ND.size(0) == 0, "head: chunk of {} tokens", size);
  }

  // visit(logits_nV, first token, count); logits live in one buffer that the next chunk overwrites.
  template <class Visit>
  void for_each(const Visit& visit) const {
    const int64_t tokens = x_ND.size(0);
    const Tensor buffer = at::empty({std::min(size, tokens), weight_VD.size(0)}, x_ND.options());
    for (int64_t first = 0; first < tokens; first += size) {
      const int64_t n = std::min(size, tokens - first);
      Tensor logits_nV = buffer.narrow(0, 0, n);
      at::mm_out(logits_nV, x_ND.narrow(0, first, n), weight_VD.t());
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
  Tensor dx_nD = dx_ND.narrow(0, first, n);
  at::mm_out(dx_nD, d_logits_nV, chunks.weight_VD);
  if (head.trainable()) accumulate_now(head, d_logits_nV, chunks.x_ND.narrow(0, first, n));
}

Tensor entropy_of(const Tensor& logits, const Tensor& lse, const Tensor& targets) {
  const Tensor logp = logits.to(lse.scalar_type()) - lse.unsqueeze(1);
  const Tensor entropy = -(logp.exp() * logp).sum(1);
  return at::where(targets.ne(kIgnoreTarget), entropy, at::zeros_like(entropy));
}

// Adds the gradient that comes through the entropy: dH/dl = -p (log p + H).
Tensor entropy_gradient(const Tensor& logits, const Tensor& lse, const Tensor& grad_n) {
  const Tensor logp = logits.to(lse.scalar_type()) - lse.unsqueeze(1), p = logp.exp();
  const Tensor entropy = -(p * logp).sum(1, true);
  return -p * (logp + entropy) * grad_n.unsqueeze(1);
}

struct ScoreGradients {
  Tensor logprob_N, entropy_N;  // either may be undefined
};

Tensor scores_backward(const Chunks& chunks, const Projection& head, const Tensor& lse,
                       const ScoreGradients& grads) {
  const Tensor dx_ND = at::empty_like(chunks.x_ND);
  const Tensor weights =
      grads.logprob_N.defined() ? -grads.logprob_N.contiguous() : at::zeros_like(lse);
  chunks.for_each([&](const Tensor& logits, int64_t first, int64_t n) {
    const Tensor targets = chunks.targets_N.narrow(0, first, n), l = lse.narrow(0, first, n);
    Tensor extra;
    if (grads.entropy_N.defined()) {
      const Tensor g = grads.entropy_N.narrow(0, first, n);
      extra =
          entropy_gradient(logits, l, at::where(targets.ne(kIgnoreTarget), g, at::zeros_like(g)));
    }
    logits_to_gradient_(logits, l, targets, weights.narrow(0, first, n), 0);
    if (extra.defined()) logits.add_(extra);
    push_gradients(chunks, head, logits, first, dx_ND);
  });
  return dx_ND;
}

}  // namespace

HeadScores head_scores(const Tensor& x, const Projection& head, const Tensor& targets,
                       bool entropy) {
  HeadScores out;
  Tensor lse_N;
  const Path chosen = path();
  {
    at::NoGradGuard no_grad;
    const Chunks chunks(x, head, targets);
    check_targets(chunks.targets_N, chunks.weight_VD.size(0));
    const auto options = x.options().dtype(wide_dtype_of(x)).requires_grad(false);
    lse_N = at::empty({chunks.x_ND.size(0)}, options);
    out.logprob_BT = at::empty_like(lse_N);
    if (entropy) out.entropy_BT = at::empty_like(lse_N);
    chunks.for_each([&](const Tensor& logits, int64_t first, int64_t n) {
      const Tensor t = chunks.targets_N.narrow(0, first, n);
      const LogitStats stats = logit_stats(logits, t, 0);
      const Tensor lse = stats.top_N + stats.sum_N.log();
      lse_N.narrow(0, first, n).copy_(lse);
      out.logprob_BT.narrow(0, first, n)
          .copy_(at::where(t.ne(kIgnoreTarget), stats.picked_N - lse, at::zeros_like(lse)));
      if (entropy) out.entropy_BT.narrow(0, first, n).copy_(entropy_of(logits, lse, t));
    });
    out.logprob_BT = out.logprob_BT.view(targets.sizes());
    if (entropy) out.entropy_BT = out.entropy_BT.view(targets.sizes());
  }
  Tensors outputs{out.logprob_BT};
  if (entropy) outputs.push_back(out.entropy_BT);
  record(outputs, {"head_scores",
                   {x},
                   head.parts,
                   {x, lse_N},
                   [head, targets, chosen](const Tensors& saved, Tensors& grads) -> Tensors {
                     at::NoGradGuard no_grad;
                     const PathGuard guard(chosen);
                     const auto flat = [](const Tensor& g) {
                       return g.defined() ? g.reshape({-1}) : Tensor();
                     };
                     const Tensor dx = scores_backward(
                         Chunks(saved[0], head, targets), head, saved[1],
                         {flat(grads[0]), grads.size() > 1 ? flat(grads[1]) : Tensor()});
                     return {dx.view_as(saved[0])};
                   }});
  return out;
}

WeightedLoss head_weighted_loss(const Tensor& x, const Projection& head, const Tensor& targets,
                                const Tensor& weights) {
  const bool wants_gradient = needs_backward({x}, head.parts);
  WeightedLoss out;
  Tensor dx_ND;
  {
    at::NoGradGuard no_grad;
    const Chunks chunks(x, head, targets);
    check_targets(chunks.targets_N, chunks.weight_VD.size(0));
    const auto wide = wide_dtype_of(x);
    const Tensor weights_N = weights.detach().to(wide).reshape({-1}).contiguous();
    CAPSTAN_CHECK(weights_N.numel() == chunks.x_ND.size(0), "head: {} weights for {} tokens",
                  weights_N.numel(), chunks.x_ND.size(0));
    const Tensor logprob_N = at::empty_like(weights_N);
    if (wants_gradient) dx_ND = at::empty_like(chunks.x_ND);
    chunks.for_each([&](const Tensor& logits, int64_t first, int64_t n) {
      cross_entropy_(logits, chunks.targets_N.narrow(0, first, n),
                     wants_gradient ? weights_N.narrow(0, first, n) : Tensor(),
                     logprob_N.narrow(0, first, n));
      if (wants_gradient) push_gradients(chunks, head, logits, first, dx_ND);
    });
    const Tensor counted =
        at::where(chunks.targets_N.ne(kIgnoreTarget), weights_N, at::zeros_like(weights_N));
    out.loss = -(counted.to(at::kDouble) * logprob_N.to(at::kDouble)).sum().to(wide);
    out.logprob_BT = logprob_N.view(targets.sizes());
  }
  if (wants_gradient)
    record(out.loss, {"head_weighted_loss",
                      {x},
                      head.parts,
                      {dx_ND.view_as(x)},
                      [](const Tensors& saved, Tensors& grads) -> Tensors {
                        const double seed = grads[0].item<double>();
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
