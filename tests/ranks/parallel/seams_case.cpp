// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Legend: B samples, T tokens of the whole rows, D hidden features.
#include "ranks/parallel/seams_case.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <cmath>
#include <limits>

#include "capstan/parallel/context_split.h"
#include "capstan/plan/frozen.h"
#include "ranks/comm_backends.h"
#include "support/gradient_check.h"

namespace capstan::test {

using at::Tensor;

std::string SeamsCase::text() const {
  return fmt::format(
      "tp {} sp {} cp {} {} overlap {} documents {} window {} deferred {} entropy {} bias {} tied "
      "{} vocab {} kv heads {} samples {} tokens {}",
      tp, sequence, cp, all_to_all ? "all_to_all" : "ring", overlap, documents, window.value_or(0),
      deferred, entropy, bias, tied, vocab, key_value_heads, samples, tokens);
}

plan::ModelShape shape_of(const SeamsCase& c) {
  plan::ModelShape s;
  s.vocab_size = c.vocab;
  s.hidden_size = 16;
  s.intermediate_size = 24;
  s.num_hidden_layers = 2;
  s.num_attention_heads = c.heads;
  s.num_key_value_heads = c.key_value_heads;
  s.head_dim = 4;
  s.max_position_embeddings = 64;
  s.rope_theta = 200;
  s.sliding_window = c.window;
  s.attention_bias = s.attention_output_bias = c.bias;
  s.tie_word_embeddings = c.tied;
  return s;
}

plan::Layout layout_of(const SeamsCase& c, bool one_rank) {
  const plan::ModelShape shape = shape_of(c);
  plan::LayoutOptions options;
  if (!one_rank) options.grid = plan::Grid({.cp = c.cp, .tp = c.tp});
  options.sequence_parallel = c.sequence && !one_rank;
  options.vocab_multiple = c.vocab_multiple;
  return plan::Layout(
      shape, plan::freeze_blocks(plan::find_family("llama").param_table(shape), c.frozen_blocks),
      options);
}

Batch batch_of(const SeamsCase& c) {
  Batch b;
  const Tensor text = (at::arange(c.samples * (c.tokens + 1), at::kLong) * 7919 + 5).square();
  const Tensor ids = text.remainder(c.vocab).view({c.samples, c.tokens + 1});
  b.ids_BT = ids.slice(1, 0, c.tokens).contiguous();
  b.targets_BT = ids.slice(1, 1).clone();
  b.targets_BT[0][1] = -100;
  b.targets_BT[c.samples - 1][c.tokens - 3] = -100;
  b.weights_BT = testing::normal({c.samples, c.tokens}, 77).abs() + 0.01;
  if (!c.documents) {
    b.positions_BT = at::arange(c.tokens, at::kLong).expand({c.samples, c.tokens}).contiguous();
    return b;
  }
  // Documents of other lengths in each sample, crossing the chunks of the context axis.
  b.first_key_BT = at::zeros({c.samples, c.tokens}, at::kInt);
  for (int64_t s = 0; s < c.samples; ++s)
    for (int64_t begin = 0, length = 5 + 3 * s; begin < c.tokens;
         begin += length, length = 3 + length * 7 % 11)
      b.first_key_BT[s].slice(0, begin, c.tokens).fill_(begin);
  b.positions_BT = at::arange(c.tokens, at::kLong) - b.first_key_BT;
  return b;
}

SeamsRank::SeamsRank(const SeamsCase& c, const std::optional<comm::Communicator>& world)
    : case_(c), batch_(batch_of(c)) {
  const plan::Layout layout = layout_of(c, !world);
  if (world) {
    mesh_ = mesh::Mesh(*world, layout.options().grid);
    tp_rank_ = mesh_.coord().tp;
    cp_rank_ = mesh_.coord().cp;
    seams_ = std::make_unique<parallel::ParallelSeams>(
        parallel::ParallelSeamsOptions{.tensor = mesh_.along(plan::Axis::kTp),
                                       .context = mesh_.along(plan::Axis::kCp),
                                       .sequence_parallel = c.sequence,
                                       .all_to_all = c.all_to_all,
                                       .overlap_chunks = c.overlap});
  } else {
    seams_ = std::make_unique<nn::Seams>();
  }
  const bool is_cut = world && c.cp > 1;
  rows_.positions_BT = part(batch_.positions_BT, false);
  rows_.positions_are_rows = !is_cut && !c.documents;
  if (c.documents) rows_.first_key_BT = part(batch_.first_key_BT, false);
  if (is_cut) {
    rows_.row_index_T = parallel::context_row_index(c.tokens, c.cp, cp_rank_);
    rows_.row_length = c.tokens;
  }
  store_ = std::make_unique<LayoutStore>(layout, world ? world->rank() : 0, c.dtype, c.deferred);
  model_ = nn::build_model(shape_of(c), {c.dtype, c.dtype},
                           [this](const std::string& name) { return store_->find(name); });
}

param::Context SeamsRank::context(param::Mode mode) const {
  param::Context context;
  context.mode = mode;
  context.rows = &rows_;
  return context;
}

Tensor SeamsRank::part(const Tensor& x, bool stream) const {
  const Tensor mine =
      parallel::split_sequence(x, std::max(1, mesh_.size(plan::Axis::kCp)), cp_rank_);
  const int64_t tp = mesh_.size(plan::Axis::kTp);
  if (!stream || !case_.sequence || tp == 1) return mine;
  return mine.narrow(1, tp_rank_ * (mine.size(1) / tp), mine.size(1) / tp).contiguous();
}

nn::BlockIO detached(const nn::BlockIO& out) {
  const auto leaf = [](const Tensor& x) {
    return x.defined() ? x.detach().requires_grad_(x.requires_grad()) : x;
  };
  return {.hidden_BTD = leaf(out.hidden_BTD), .residual_BTD = leaf(out.residual_BTD), .extras = {}};
}

void backward_block(const nn::BlockIO& out, const nn::BlockIO& next) {
  std::vector<Tensor> roots, grads;
  const auto add = [&](const Tensor& x, const Tensor& leaf) {
    if (!x.defined() || !x.requires_grad() || !leaf.grad().defined()) return;
    roots.push_back(x);
    grads.push_back(leaf.grad());
  };
  add(out.hidden_BTD, next.hidden_BTD);
  add(out.residual_BTD, next.residual_BTD);
  if (!roots.empty()) torch::autograd::backward(roots, grads);
}

nn::TokenScores SeamsRank::score(const nn::BlockIO& in, Tensor& objective) {
  const Tensor targets = part(batch_.targets_BT, false), weights = part(batch_.weights_BT, false);
  nn::ScoreRequest request;
  if (case_.entropy)
    request.entropy = true;
  else
    request.weights_BT = weights;
  const auto scores =
      model_.head->score(context(param::Mode::kTrain), *seams_, in, targets, request);
  objective = case_.entropy ? (weights * (0.3 * scores.entropy_BT - scores.logprob_BT)).sum()
                            : scores.weighted_loss;
  return scores;
}

SeamsRank::Named SeamsRank::train() {
  const auto ctx = context(param::Mode::kTrain);
  std::vector<nn::BlockIO> outs{
      model_.embedding->forward(ctx, *seams_, part(batch_.ids_BT, false))};
  std::vector<nn::BlockIO> ins;
  for (const auto& layer : model_.layers) {
    ins.push_back(detached(outs.back()));
    outs.push_back(layer->forward(ctx, *seams_, ins.back()));
  }
  ins.push_back(detached(outs.back()));
  Tensor objective;
  const nn::TokenScores scores = score(ins.back(), objective);
  torch::autograd::backward({objective}, {});
  for (size_t i = outs.size(); i-- > 0;) backward_block(outs[i], ins[i]);
  store_->run_deferred();

  Named named{{"sum loss", objective.detach().view({1})},
              {"tokens logprob", scores.logprob_BT.detach()}};
  if (case_.entropy) named.emplace_back("tokens entropy", scores.entropy_BT.detach());
  const auto add = [&](const std::string& name, const Tensor& x) {
    if (x.defined()) named.emplace_back("stream " + name, x);
  };
  for (size_t i = 0; i < outs.size(); ++i) {
    add(fmt::format("hidden {}", i),
        outs[i].hidden_BTD.defined() ? outs[i].hidden_BTD.detach() : Tensor());
    add(fmt::format("residual {}", i), outs[i].residual_BTD.detach());
    if (ins[i].hidden_BTD.defined())
      add(fmt::format("gradient of hidden {}", i), ins[i].hidden_BTD.grad());
    add(fmt::format("gradient of residual {}", i), ins[i].residual_BTD.grad());
  }
  return named;
}

Tensor SeamsRank::logits(int64_t count) {
  const at::NoGradGuard no_grad;
  const auto ctx = context(param::Mode::kEval);
  nn::BlockIO io = model_.embedding->forward(ctx, *seams_, part(batch_.ids_BT, false));
  for (const auto& layer : model_.layers) io = layer->forward(ctx, *seams_, io);
  return model_.head->logits(ctx, *seams_, io, count);
}

void run_ranks_of(const SeamsCase& c, const std::function<void(SeamsRank&, int)>& fn) {
  run_on(c.gloo ? Kind::kGloo : Kind::kThreads, c.ranks(), [&](comm::Communicator world) {
    const int index = world.rank();
    SeamsRank rank(c, std::move(world));
    fn(rank, index);
  });
}

double error_of(const Tensor& got, const Tensor& want) {
  const double infinity = std::numeric_limits<double>::infinity();
  if (got.sizes() != want.sizes()) return infinity;
  if (got.numel() == 0) return 0;
  const Tensor a = got.to(at::kDouble), b = want.to(at::kDouble);
  const double off = (a - b).abs().max().item<double>();
  const double error = off / std::max(b.abs().max().item<double>(), 1e-3);
  return std::isnan(error) ? infinity : error;
}

namespace {

// What the ranks found, filled by their threads, each its own place.
struct Gathered {
  std::vector<double> worst;
  std::vector<std::string> complaints;
  std::vector<Tensor> losses;
  std::vector<std::unique_ptr<SeamsRank>> ranks;
};

void compare(Gathered& all, size_t rank, double tolerance, const std::string& name, double error) {
  all.worst[rank] = std::max(all.worst[rank], error);
  if (error > tolerance)
    all.complaints[rank] += fmt::format("rank {}: {} is off by {:.3g}\n", rank, name, error);
}

void compare_tensors(Gathered& all, size_t rank, const SeamsCase& c,
                     const SeamsRank::Named& reference) {
  SeamsRank& mine = *all.ranks[rank];
  const auto named = mine.train();
  if (named.size() != reference.size()) all.complaints[rank] += "other tensors than one rank\n";
  for (size_t i = 0; i < std::min(named.size(), reference.size()); ++i) {
    const auto& [name, got] = named[i];
    if (name == "sum loss") {
      all.losses[rank] = got;
      continue;
    }
    const Tensor want = mine.part(reference[i].second, name.starts_with("stream"));
    compare(all, rank, c.tolerance, name, name == reference[i].first ? error_of(got, want) : 1e9);
  }
}

// The gradient of one whole parameter, summed as plan::LocalParam says. Copies that are not to be
// summed must be equal, and padding must have none.
Tensor summed_gradient(Gathered& all, const SeamsCase& c, size_t index) {
  Tensor whole;
  for (size_t rank = 0; rank < all.ranks.size(); ++rank) {
    LayoutStore& store = all.ranks[rank]->store();
    const auto& local = store.local(static_cast<int>(index));
    const std::string& name = store.spec(static_cast<int>(index)).name;
    if (!whole.defined()) whole = at::zeros(store.spec(static_cast<int>(index)).shape, at::kDouble);
    if (!store.has_gradient(index)) {
      all.complaints[rank] += fmt::format("rank {}: {} got no gradient\n", rank, name);
      continue;
    }
    Tensor from = store.gradient(index).to(at::kDouble), into = whole;
    const double total = from.abs().sum().item<double>();
    for (size_t d = 0; d < local.real.begin.size(); ++d) {
      const auto dim = static_cast<int64_t>(d);
      from = from.narrow(dim, 0, local.real.extent[d]);
      into = into.narrow(dim, local.real.begin[d], local.real.extent[d]);
    }
    compare(all, rank, 0, "padding of " + name,
            std::abs(total - from.abs().sum().item<double>()) > 1e-12 * total ? 1 : 0);
    const bool partial = local.extra_sum.has(plan::Axis::kTp);
    if (partial || local.counted) {
      into.add_(from);
    } else {
      const size_t first =
          rank - rank % static_cast<size_t>(c.tp) % static_cast<size_t>(local.holders);
      compare(all, rank, c.tolerance, "copy of " + name,
              error_of(store.gradient(index), all.ranks[first]->store().gradient(index)));
    }
  }
  return whole;
}

void compare_gradients(Gathered& all, const SeamsCase& c, LayoutStore& reference) {
  for (size_t i = 0; i < reference.size(); ++i) {
    if (!reference.trainable(static_cast<int>(i))) continue;
    const std::string name = "gradient of " + reference.spec(static_cast<int>(i)).name;
    compare(all, 0, c.tolerance, name, error_of(summed_gradient(all, c, i), reference.gradient(i)));
  }
}

}  // namespace

double expect_equal_to_one_rank(const SeamsCase& c) {
  SCOPED_TRACE(c.text());
  SeamsRank reference(c, {});
  const auto want = reference.train();
  const auto n = static_cast<size_t>(c.ranks());
  Gathered all{std::vector<double>(n), std::vector<std::string>(n), std::vector<Tensor>(n), {}};
  all.ranks.resize(n);
  run_on(c.gloo ? Kind::kGloo : Kind::kThreads, c.ranks(), [&](comm::Communicator world) {
    const auto rank = static_cast<size_t>(world.rank());
    all.ranks[rank] = std::make_unique<SeamsRank>(c, world);
    compare_tensors(all, rank, c, want);
  });
  Tensor loss = at::zeros_like(want[0].second);
  for (size_t rank = 0; rank < n; rank += static_cast<size_t>(c.tp)) loss += all.losses[rank];
  compare(all, 0, c.tolerance, "loss", error_of(loss, want[0].second));
  compare_gradients(all, c, reference.store());
  double worst = 0;
  for (size_t rank = 0; rank < n; ++rank) {
    EXPECT_EQ(all.complaints[rank], "");
    worst = std::max(worst, all.worst[rank]);
  }
  ::testing::Test::RecordProperty("worst_error", fmt::format("{:.3g}", worst));
  return worst;
}

}  // namespace capstan::test
