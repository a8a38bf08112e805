// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Legend: B samples, T tokens of the whole rows, D hidden features, k choices of a token.
#include "ranks/parallel/experts_case.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "capstan/base/check.h"
#include "capstan/ops/router.h"
#include "capstan/parallel/context_split.h"
#include "capstan/parallel/parallel_seams.h"
#include "capstan/plan/frozen.h"
#include "ranks/parallel/seams_case.h"
#include "support/gradient_check.h"
#include "support/growing_cache.h"
#include "support/run_ranks.h"

namespace capstan::test {

using at::Tensor;

std::string ExpertCase::text() const {
  const plan::ExpertShape& e = experts;
  return fmt::format(
      "dp {} x {} cp {} tp {} sp {} ep {} | {} of {} {} groups {}/{} normalize {} shared {}{} "
      "auxiliary {} {} z {} bias {} capacity {} | samples {} tokens {} micro-batches {}",
      replicate, shard, cp, tp, sequence, ep, e.per_token, e.count, e.router, e.groups_per_token,
      e.groups, e.normalize_weights, e.shared_intermediate_size, e.shared_gate ? " gated" : "",
      e.auxiliary_loss, e.auxiliary_scope, e.z_loss, e.bias_update_rate,
      e.capacity_factor.value_or(0), samples, tokens, micro_batches);
}

plan::ModelShape shape_of(const ExpertCase& c) {
  plan::ModelShape s;
  s.family = "moe";
  s.vocab_size = 37;
  s.hidden_size = 16;
  s.intermediate_size = 24;
  s.num_hidden_layers = 2;
  s.num_attention_heads = 4;
  s.num_key_value_heads = 2;
  s.head_dim = 4;
  s.max_position_embeddings = 64;
  s.rope_theta = 200;
  s.experts = c.experts;
  if (s.experts.count == 0) s.experts.count = 8;
  if (s.experts.intermediate_size == 0) s.experts.intermediate_size = 6;
  return s;
}

namespace {

plan::Layout layout_of(const ExpertCase& c, bool one_rank) {
  const plan::ModelShape shape = shape_of(c);
  plan::LayoutOptions options;
  if (!one_rank) options.grid = plan::Grid(c.sizes());
  options.sequence_parallel = c.sequence && !one_rank;
  options.vocab_multiple = 4;
  return plan::Layout(
      shape, plan::freeze_blocks(plan::find_family("moe").param_table(shape), c.frozen_blocks),
      options);
}

Tensor ids_of(const ExpertCase& c) {
  const Tensor text = (at::arange(c.samples * (c.tokens + 1), at::kLong) * 7919 + 5).square();
  return text.remainder(37).view({c.samples, c.tokens + 1});
}
Tensor token_numbers(const ExpertCase& c) {
  return at::arange(c.samples * c.tokens, at::kLong).view({c.samples, c.tokens});
}
Tensor token_weights(const ExpertCase& c) {
  return testing::normal({c.samples, c.tokens}, 77).abs() + 0.01;
}

// States as if steps had gone before, so that they matter in the first one.
void age(std::span<const param::RouterState> states) {
  uint64_t seed = 40;
  for (const param::RouterState& state : states) {
    ++seed;
    if (state.bias_E.defined())
      state.bias_E.copy_(0.1 * testing::normal(state.bias_E.sizes(), seed));
    if (state.fractions_E.defined())
      state.fractions_E.copy_(
          at::softmax(testing::normal(state.fractions_E.sizes(), seed + 100), 0));
  }
}

}  // namespace

// Passes statistics on and keeps what was decided.
struct ExpertRank::Sink final : param::StatSink {
  parallel::ExpertBalance* balance = nullptr;
  plan::ExpertShape shape;
  std::vector<Tensor> numbers_n;               // of the routed tokens, by micro-batch
  std::vector<std::vector<Tensor>> chosen_nk;  // [layer][micro-batch]
  double margin = std::numeric_limits<double>::infinity();

  void add(const char* name, int layer, const Tensor& value) override {
    balance->add(name, layer, value);
    const std::string_view what = name;
    if (what == "chosen_experts") chosen_nk.at(static_cast<size_t>(layer)).push_back(value);
    if (what != "router_scores") return;
    const ops::RouterSpec spec{.per_token = shape.per_token,
                               .sigmoid = shape.router == "sigmoid",
                               .normalize = shape.normalize_weights,
                               .groups = shape.groups,
                               .groups_per_token = shape.groups_per_token};
    margin = std::min(
        margin,
        ops::choice_margin(value, balance->states()[static_cast<size_t>(layer)].bias_E, spec));
  }
};

ExpertRank::~ExpertRank() = default;

ExpertRank::ExpertRank(const ExpertCase& c, const std::optional<comm::Communicator>& world)
    : case_(c) {
  const plan::Layout layout = layout_of(c, !world);
  const plan::ModelShape shape = shape_of(c);
  seams_ = std::make_unique<nn::Seams>();
  nn::ModelOptions options{at::kDouble, at::kDouble};
  if (world) {
    mesh_ = mesh::Mesh(*world, layout.options().grid);
    seams_ = std::make_unique<parallel::ParallelSeams>(
        parallel::ParallelSeamsOptions{.tensor = mesh_.along(plan::Axis::kTp),
                                       .context = mesh_.along(plan::Axis::kCp),
                                       .sequence_parallel = c.sequence,
                                       .expert = mesh_.along(plan::Axis::kEp),
                                       .rows = mesh_.along(plan::Axis::kCp | plan::Axis::kTp)});
    options.expert_ranks = mesh_.size(plan::Axis::kEp);
    options.expert_rank = mesh_.index(plan::Axis::kEp);
  }
  const bool is_cut = world && c.cp > 1;
  rows_.positions_are_rows = !is_cut;
  if (is_cut) {
    rows_.row_index_T = parallel::context_row_index(c.tokens, c.cp, mesh_.coord().cp);
    rows_.row_length = c.tokens;
    const int64_t here = c.samples / data_ranks() / c.micro_batches;
    rows_.positions_BT =
        rows_.row_index_T.unsqueeze(0).expand({here, rows_.row_index_T.numel()}).contiguous();
  }
  store_ = std::make_unique<LayoutStore>(layout, world ? world->rank() : 0, at::kDouble);
  balance_ = std::make_unique<parallel::ExpertBalance>(shape, std::vector<int>{0, 1}, at::kDouble);
  balance_->want_entropy(true);
  age(balance_->states());
  model_ = nn::build_model(shape, options,
                           [this](const std::string& name) { return store_->find(name); });
}

Tensor ExpertRank::sample_part(const Tensor& x) const {
  const int64_t here = x.size(0) / data_ranks();
  return x.narrow(0, mesh_.grid().data_parallel_index(mesh_.rank()) * here, here);
}

Tensor ExpertRank::context_part(const Tensor& x) const {
  return parallel::split_sequence(sample_part(x), mesh_.size(plan::Axis::kCp), mesh_.coord().cp);
}

Tensor ExpertRank::stream_part(const Tensor& x) const {
  const Tensor mine = context_part(x);
  if (!case_.sequence || case_.tp == 1 || mesh_.grid().size() == 1) return mine;
  const int64_t count = mine.size(1) / case_.tp;
  return mine.narrow(1, mesh_.coord().tp * count, count).contiguous();
}

// Of one micro-batch [B, T], the tokens that this rank routes, in order.
Tensor ExpertRank::routed_part(const Tensor& x) const {
  const int64_t tp = mesh_.size(plan::Axis::kTp);
  const Tensor flat = x.reshape({-1});
  if (case_.sequence || tp == 1) return flat;
  const int64_t part = (flat.numel() + tp - 1) / tp;
  const int64_t begin = std::min(part * mesh_.coord().tp, flat.numel());
  return flat.narrow(0, begin, std::min(part, flat.numel() - begin));
}

void ExpertRank::train_micro_batch(int64_t index, Pass& pass, Sink& sink) {
  const auto part = [&](const Tensor& mine) {
    const int64_t count = mine.size(0) / case_.micro_batches;
    return mine.narrow(0, index * count, count).contiguous();
  };
  const Tensor text = ids_of(case_);
  const auto tokens = [&](const Tensor& x) { return part(context_part(x)); };
  const param::Context context{.mode = param::Mode::kTrain,
                               .micro_batch = static_cast<int>(index),
                               .rows = &rows_,
                               .stats = &sink,
                               .rows_of_step = static_cast<double>(case_.samples),
                               .routers = balance_->states()};
  std::vector<nn::BlockIO> ins,
      outs{model_.embedding->forward(context, *seams_,
                                     tokens(text.slice(1, 0, case_.tokens).contiguous()))};
  for (const auto& layer : model_.layers) {
    ins.push_back(detached(outs.back()));
    outs.push_back(layer->forward(context, *seams_, ins.back()));
  }
  ins.push_back(detached(outs.back()));
  const nn::TokenScores scores =
      model_.head->score(context, *seams_, ins.back(), tokens(text.slice(1, 1).contiguous()),
                         {.weights_BT = tokens(token_weights(case_)), .entropy = false});
  torch::autograd::backward({scores.weighted_loss}, {});
  for (size_t i = outs.size(); i-- > 0;) backward_block(outs[i], ins[i]);
  pass.loss += scores.weighted_loss.item<double>();
  sink.numbers_n.push_back(routed_part(part(stream_part(token_numbers(case_)))));
  const auto add = [&](const std::string& name, const Tensor& x) {
    if (x.defined()) pass.stream.emplace_back(name, x.detach());
  };
  for (size_t i = 0; i < outs.size(); ++i) {
    add(fmt::format("hidden {}", i), outs[i].hidden_BTD);
    add(fmt::format("residual {}", i), outs[i].residual_BTD);
    if (ins[i].hidden_BTD.defined())
      add(fmt::format("gradient of hidden {}", i), ins[i].hidden_BTD.grad());
    add(fmt::format("gradient of residual {}", i), ins[i].residual_BTD.grad());
  }
}

ExpertRank::Pass ExpertRank::train() {
  Pass pass;
  Sink sink;
  sink.balance = balance_.get();
  sink.shape = shape_of(case_).experts;
  sink.chosen_nk.resize(2);
  for (int64_t i = 0; i < case_.micro_batches; ++i) train_micro_batch(i, pass, sink);
  for (const auto& chosen : sink.chosen_nk)
    pass.choices.emplace_back(at::cat(sink.numbers_n), at::cat(chosen));
  // Micro-batches one behind the other.
  const size_t each = pass.stream.size() / static_cast<size_t>(case_.micro_batches);
  for (size_t i = 0; i < each; ++i) {
    std::vector<Tensor> parts;
    for (size_t m = i; m < pass.stream.size(); m += each) parts.push_back(pass.stream[m].second);
    pass.stream[i].second = at::cat(parts);
  }
  pass.stream.resize(each);
  pass.margin = sink.margin;
  pass.loads = balance_->finish_step(mesh_.world(), true);
  return pass;
}

Tensor ExpertRank::decode() {
  const at::NoGradGuard no_grad;
  const Tensor ids = sample_part(ids_of(case_));
  GrowingCache cache;
  std::vector<Tensor> steps;
  for (const int64_t count : {5, 1, 2, 1}) {
    const int64_t done = cache.length();
    param::RowMap rows;
    rows.positions_BT = at::arange(done, done + count, at::kLong).expand({ids.size(0), count});
    rows.positions_are_rows = false;
    const param::Context context{.mode = param::Mode::kDecode,
                                 .rows = &rows,
                                 .cache = &cache,
                                 .routers = balance_->states()};
    nn::BlockIO io =
        model_.embedding->forward(context, *seams_, ids.narrow(1, done, count).contiguous());
    for (const auto& layer : model_.layers) io = layer->forward(context, *seams_, io);
    steps.push_back(model_.head->logits(context, *seams_, io, count));
  }
  return at::cat(steps, 1);
}

namespace {

// What the ranks found, filled by their threads, each its own place.
struct Gathered {
  std::vector<double> worst;
  std::vector<std::string> complaints;
  std::vector<std::unique_ptr<ExpertRank>> ranks;
  std::vector<double> losses;

  explicit Gathered(size_t n) : worst(n), complaints(n), ranks(n), losses(n) {}
  void compare(size_t rank, double tolerance, const std::string& name, double error) {
    worst[rank] = std::max(worst[rank], error);
    if (!(error <= tolerance))
      complaints[rank] += fmt::format("rank {}: {} is off by {:.3g}\n", rank, name, error);
  }
};

bool compare_choices(Gathered& all, size_t rank, const ExpertRank::Pass& got,
                     const ExpertRank::Pass& want) {
  for (size_t layer = 0; layer < want.choices.size(); ++layer) {
    const auto& [numbers, chosen] = got.choices[layer];
    const auto& [all_numbers, all_chosen] = want.choices[layer];
    const Tensor place = at::empty_like(all_numbers);
    place.index_copy_(0, all_numbers, at::arange(all_numbers.numel(), at::kLong));
    if (all_chosen.index_select(0, place.index_select(0, numbers)).equal(chosen)) continue;
    all.complaints[rank] += fmt::format("rank {}: layer {} chose other experts\n", rank, layer);
    return false;
  }
  return true;
}

void compare_loads(Gathered& all, size_t rank, const ExpertRank::Pass& got,
                   const ExpertRank::Pass& want) {
  for (size_t i = 0; i < want.loads.size(); ++i) {
    const parallel::ExpertLoad &a = got.loads[i], &b = want.loads[i];
    if (a.tokens != b.tokens || a.dropped != b.dropped || a.routed_tokens != b.routed_tokens)
      all.complaints[rank] += fmt::format("rank {}: other counts in layer {}\n", rank, i);
    const auto number = [&](const char* name, double x, double y) {
      all.compare(rank, 1e-12, name, std::abs(x - y) / std::max(1.0, std::abs(y)));
    };
    number("entropy", a.entropy, b.entropy);
    number("auxiliary loss", a.auxiliary_loss, b.auxiliary_loss);
    number("z loss", a.z_loss, b.z_loss);
  }
}

void compare_pass(Gathered& all, size_t rank, const ExpertCase& c, const ExpertRank::Pass& want,
                  const ExpertRank& reference) {
  ExpertRank& mine = *all.ranks[rank];
  const ExpertRank::Pass got = mine.train();
  all.losses[rank] = got.loss;
  if (!compare_choices(all, rank, got, want)) return;
  CAPSTAN_CHECK(got.stream.size() == want.stream.size(), "other tensors than one rank");
  for (size_t i = 0; i < want.stream.size(); ++i) {
    const auto& [name, whole] = want.stream[i];
    all.compare(rank, c.tolerance, name, error_of(got.stream[i].second, mine.stream_part(whole)));
  }
  compare_loads(all, rank, got, want);
  for (size_t i = 0; i < 2; ++i) {
    const auto &a = mine.balance().states()[i], &b = reference.balance().states()[i];
    const bool same = (!b.bias_E.defined() || a.bias_E.equal(b.bias_E)) &&
                      (!b.fractions_E.defined() || a.fractions_E.equal(b.fractions_E));
    if (!same) all.complaints[rank] += fmt::format("rank {}: other states of layer {}\n", rank, i);
  }
}

// Sums over the ranks that plan::LocalParam names; copies that are not summed must be equal.
void add_local(Gathered& all, size_t rank, LayoutStore& store, int index, Tensor whole,
               const ExpertCase& c) {
  const auto& local = store.local(index);
  Tensor from = store.gradient(static_cast<size_t>(index));
  for (size_t d = 0; d < local.real.begin.size(); ++d) {
    const auto dim = static_cast<int64_t>(d);
    from = from.narrow(dim, 0, local.real.extent[d]);
    whole = whole.narrow(dim, local.real.begin[d], local.real.extent[d]);
  }
  if (local.extra_sum.has(plan::Axis::kTp) || local.counted) {
    whole.add_(from);
    return;
  }
  const size_t first = rank - rank % static_cast<size_t>(c.tp) % static_cast<size_t>(local.holders);
  all.compare(rank, c.tolerance, "copy of " + store.spec(index).name,
              error_of(store.gradient(static_cast<size_t>(index)),
                       all.ranks[first]->store().gradient(static_cast<size_t>(index))));
}

void compare_gradients(Gathered& all, const ExpertCase& c, LayoutStore& reference) {
  std::map<std::string, Tensor> wholes;
  for (size_t rank = 0; rank < all.ranks.size(); ++rank) {
    LayoutStore& store = all.ranks[rank]->store();
    for (int i = 0; i < static_cast<int>(store.size()); ++i) {
      if (!store.trainable(i)) continue;
      const plan::ParamSpec& spec = store.spec(i);
      auto [it, is_new] = wholes.try_emplace(spec.name);
      if (is_new) it->second = at::zeros(spec.shape, at::kDouble);
      if (!store.has_gradient(static_cast<size_t>(i)))
        all.complaints[rank] += fmt::format("rank {}: {} got no gradient\n", rank, spec.name);
      else
        add_local(all, rank, store, i, it->second, c);
    }
  }
  for (size_t i = 0; i < reference.size(); ++i) {
    if (!reference.trainable(static_cast<int>(i))) continue;
    const std::string& name = reference.spec(static_cast<int>(i)).name;
    all.compare(0, c.tolerance, "gradient of " + name,
                error_of(wholes.at(name), reference.gradient(i)));
  }
}

}  // namespace

namespace {

// The one-rank run of a model and batch, made once.
struct Reference {
  std::unique_ptr<ExpertRank> rank;
  ExpertRank::Pass pass;
};
const Reference& reference_of(const ExpertCase& c) {
  ExpertCase one;
  one.experts = c.experts;
  one.samples = c.samples;
  one.tokens = c.tokens;
  one.frozen_blocks = c.frozen_blocks;
  static std::map<std::string, Reference> known;
  Reference& r = known[one.text() + fmt::format(" frozen {}", fmt::join(c.frozen_blocks, " "))];
  if (!r.rank) {
    r.rank = std::make_unique<ExpertRank>(one, std::nullopt);
    r.pass = r.rank->train();
  }
  return r;
}

}  // namespace

double expect_equal_to_one_rank(const ExpertCase& c) {
  SCOPED_TRACE(c.text());
  ExpertRank& reference = *reference_of(c).rank;
  const ExpertRank::Pass& want = reference_of(c).pass;
  EXPECT_GT(want.margin, 1e-9) << "a decision too close to compare";
  Gathered all(static_cast<size_t>(c.ranks()));
  run_ranks(c.ranks(), [&](comm::Communicator world) {
    const auto rank = static_cast<size_t>(world.rank());
    all.ranks[rank] = std::make_unique<ExpertRank>(c, world);
    compare_pass(all, rank, c, want, reference);
  });
  double loss = 0;
  for (size_t rank = 0; rank < all.ranks.size(); rank += static_cast<size_t>(c.tp))
    loss += all.losses[rank];
  all.compare(0, c.tolerance, "loss", std::abs(loss - want.loss) / std::abs(want.loss));
  compare_gradients(all, c, reference.store());
  for (const std::string& complaints : all.complaints) EXPECT_EQ(complaints, "");
  return *std::max_element(all.worst.begin(), all.worst.end());
}

}  // namespace capstan::test
