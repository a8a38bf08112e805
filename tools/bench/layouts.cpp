// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What layouts cost: measurements of layouts.sh. Each round runs the steps of one rank with all
// threads and then the same global step on two ranks with half of them each, so that every pair
// saw the same machine.
// usage: layouts threads|processes CASE ROUNDS STEPS THREADS
// CASE: dp2 | zero3 | tp2 | pp2 | overhead. Prints one JSON object. `processes`: this is one of two
// ranks that meet by the variables of torchrun; rank 0 prints.
#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cstdio>
#include <map>

#include "capstan/base/env.h"
#include "capstan/comm/threads.h"
#include "capstan/comm/world.h"
#include "capstan/device/allocator.h"
#include "capstan/device/threads.h"
#include "capstan/engine/engine.h"
#include "capstan/parallel/parallelize.h"

namespace {

using namespace capstan;
using at::Tensor;
using Overrides = std::vector<std::string>;

constexpr int kWarmUp = 2, kRanks = 2;
constexpr const char* kRecipe =
    "version: 1\n"
    "run: {name: bench, steps: 100000, threads: 1}\n"
    "model: {vocab_size: 4096, hidden_size: 512, intermediate_size: 1408, num_hidden_layers: 6, "
    "num_attention_heads: 8, num_key_value_heads: 4, tie_word_embeddings: false}\n"
    "data: {tokenizer: none, train: [{path: none-needed}]}\n"
    "batch: {global_samples: 8, micro_samples: 4, sequence_length: 256}\n"
    "optimizer: {lr: 3.0e-4}\n"
    "lr_schedule: {kind: constant}\n"
    "precision: {compute: fp32}\n";

plan::Plan plan_of(int ranks, const Overrides& overrides) {
  return plan::make_plan(recipe::parse_recipe(kRecipe, "bench", overrides),
                         plan::local_topology(ranks, ranks, "cpu"), {});
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

double milliseconds_since(int64_t begin) {
  return static_cast<double>(monotonic_ns() - begin) * 1e-6;
}

engine::MicroBatch make_rows(const plan::Plan& plan, int64_t number) {
  const int64_t samples = plan.batch.micro_samples, length = plan.batch.sequence_length;
  const Tensor row = (at::arange(samples * (length + 1), at::kLong) * 2654435761 + number * 40503)
                         .bitwise_right_shift(7)
                         .remainder(plan.model().shape.vocab_size)
                         .view({samples, length + 1});
  engine::MicroBatch batch;
  batch.ids_BT = row.narrow(1, 0, length).contiguous();
  batch.targets_BT = row.narrow(1, 1, length).contiguous();
  batch.rows.positions_BT = at::arange(length, at::kLong).expand({samples, length}).contiguous();
  for (int64_t s = 0; s < samples; ++s) batch.rows.samples.push_back(number * samples + s);
  return batch;
}

std::vector<engine::MicroBatch> make_step(const plan::Plan& plan, int rank) {
  std::vector<engine::MicroBatch> batches;
  const int64_t first = plan.grid.data_parallel_index(rank) * plan.batch.micro_batches;
  for (int64_t m = 0; m < plan.batch.micro_batches; ++m)
    batches.push_back(make_rows(plan, first + m));
  return batches;
}

// Where ranks run: threads of this process, or this process and its peer.
class Ranks {
 public:
  explicit Ranks(bool processes) {
    if (processes) world_.emplace(comm::World::from_env(60));
  }
  using Body = std::function<void(const comm::Communicator& world)>;
  void run(int ranks, int threads, const Body& body) {
    if (!world_) return comm::run_thread_ranks(ranks, body, {.threads_per_rank = threads});
    device::set_threads(threads);
    if (ranks > 1)
      body(world_->communicator());
    else if (world_->rank() == 0)
      body(comm::Communicator());
    world_->communicator().barrier().wait();
  }
  [[nodiscard]] bool prints() const { return !world_ || world_->rank() == 0; }
  void close() {
    if (world_) world_->close();
  }

 private:
  std::optional<comm::World> world_;
};

// Median time of a step, as rank 0 sees it.
double time_steps(Ranks& where, const plan::Plan& plan, int threads, int steps) {
  double result = 0;
  where.run(plan.grid.size(), threads, [&](const comm::Communicator& world) {
    mesh::Mesh mesh(world, plan.grid);
    engine::Engine engine(plan, mesh);
    const auto objective = engine::make_next_token_objective();
    const auto batches = make_step(plan, world.rank());
    std::vector<double> times;
    for (int step = 0; step < steps + kWarmUp; ++step) {
      const int64_t begin = monotonic_ns();
      (void)engine.step(batches, *objective);
      if (step >= kWarmUp) times.push_back(milliseconds_since(begin));
    }
    if (world.rank() == 0) result = median(times);
  });
  return result;
}

// Speed of the plan's schedule by its simulation, as part of what all ranks at work all the time
// would give. Times by FLOPs; the head makes its gradient in its forward.
double ideal_speed(const plan::Plan& plan) {
  const plan::ModelShape& shape = plan.model().shape;
  const plan::ForwardFlops& flops = plan.flops.forward;
  const double layer =
      (flops.linear + flops.attention) / static_cast<double>(shape.num_hidden_layers);
  plan::ScheduleCosts costs;
  costs.forward.clear();
  std::vector<int> begin = plan.model().layout.options().stage_begin;
  begin.push_back(shape.num_blocks());
  double work = 0;
  for (size_t stage = 0; stage + 1 < begin.size(); ++stage) {
    double forward = 0;
    for (int block = begin[stage]; block < begin[stage + 1]; ++block)
      forward += block == 0 || block == shape.head_block() ? 0 : layer;
    costs.backward_input.resize(stage + 1);
    costs.backward_input[stage] = forward;
    const bool has_head = stage + 2 == begin.size();
    costs.forward.push_back(forward + (has_head ? 3 * flops.head : 0));
    work += costs.forward.back() + 2 * forward;
  }
  costs.backward_weight = costs.backward_input;
  const double all = work * static_cast<double>(plan.batch.micro_batches);
  return all / plan.grid.sizes().pp / plan::simulate_schedule(plan.schedule, costs).makespan;
}

struct Case {
  Overrides both, layout;  // of both sides; of the two ranks
};
const std::map<std::string, Case>& cases() {
  static const std::map<std::string, Case> table = {
      {"dp2", {{}, {"parallel.data=2"}}},
      {"zero3", {{}, {"parallel.data=2", "parallel.zero.stage=3"}}},
      {"tp2", {{}, {"parallel.tensor=2"}}},
      {"pp2",
       {{"batch.micro_samples=1"},
        {"parallel.pipeline.size=2", "parallel.pipeline.schedule=1f1b"}}}};
  return table;
}

std::string compare(Ranks& where, const Case& it, int rounds, int steps, int threads) {
  Overrides overrides = it.both;
  const plan::Plan one = plan_of(1, overrides);
  overrides.insert(overrides.end(), it.layout.begin(), it.layout.end());
  const plan::Plan two = plan_of(kRanks, overrides);
  std::vector<double> base_ms, layout_ms;
  for (int round = 0; round < rounds; ++round) {
    base_ms.push_back(time_steps(where, one, threads, steps));
    layout_ms.push_back(time_steps(where, two, std::max(1, threads / kRanks), steps));
  }
  return fmt::format("\"tokens\": {}, \"ideal\": {:.4f}, \"base_ms\": [{:.3f}], \"ms\": [{:.3f}]",
                     two.batch.tokens_per_step, ideal_speed(two), fmt::join(base_ms, ", "),
                     fmt::join(layout_ms, ", "));
}

// ---- What the engine adds to the blocks' own work ----

// The blocks called one after another, each a graph of its own, without an engine.
class HandMade {
 public:
  explicit HandMade(const plan::Plan& plan) : model_(parallel::parallelize(plan, "policy", mesh_)) {
    for (const auto& store : model_.stores) store->initialize(1, "policy");
  }

  void step(const std::vector<engine::MicroBatch>& batches) {
    for (const auto& store : model_.stores) store->begin_step();
    for (const engine::MicroBatch& batch : batches) pass(batch);
    for (const auto& store : model_.stores) {
      (void)store->take_gradient(true);
      store->end_step();
    }
  }

 private:
  static nn::BlockIO leaves_of(const nn::BlockIO& out) {
    const auto leaf = [](const Tensor& x) {
      return x.defined() ? x.detach().set_requires_grad(true) : x;
    };
    return {
        .hidden_BTD = leaf(out.hidden_BTD), .residual_BTD = leaf(out.residual_BTD), .extras = {}};
  }

  void pass(const engine::MicroBatch& batch) {
    for (const auto& store : model_.stores) store->open();
    const param::Context context{.rows = &batch.rows};
    std::vector<nn::BlockIO> in, out;
    out.push_back(model_.model.embedding->forward(context, *model_.seams, batch.ids_BT));
    for (const auto& layer : model_.model.layers) {
      in.push_back(leaves_of(out.back()));
      out.push_back(layer->forward(context, *model_.seams, in.back()));
    }
    in.push_back(leaves_of(out.back()));
    const nn::ScoreRequest request{.weights_BT =
                                       at::full(batch.targets_BT.sizes(), 1e-3, at::kFloat)};
    const auto scores =
        model_.model.head->score(context, *model_.seams, in.back(), batch.targets_BT, request);
    backward(std::move(in), std::move(out), scores.weighted_loss);
    for (const auto& store : model_.stores) store->close();
  }

  static void backward(std::vector<nn::BlockIO> in, std::vector<nn::BlockIO> out,
                       const Tensor& loss) {
    torch::autograd::backward({loss}, {});
    for (; !in.empty(); in.pop_back(), out.pop_back()) {
      std::vector<Tensor> roots = {out.back().residual_BTD},
                          gradients = {in.back().residual_BTD.grad()};
      if (out.back().hidden_BTD.defined()) {
        roots.push_back(out.back().hidden_BTD);
        gradients.push_back(in.back().hidden_BTD.grad());
      }
      torch::autograd::backward(roots, gradients);
    }
  }

  mesh::Mesh mesh_;
  parallel::ParallelModel model_;
};

// A model so small that calls count: time of 16 micro-batches less that of one, by 15.
const Overrides kTiny = {"model.hidden_size=128",       "model.intermediate_size=352",
                         "model.num_hidden_layers=4",   "model.num_attention_heads=4",
                         "model.num_key_value_heads=2", "model.vocab_size=512",
                         "batch.micro_samples=1",       "batch.sequence_length=64"};

std::string measure_overhead(Ranks& where, int rounds, int steps, int threads) {
  const auto plan_with = [](const char* samples) {
    Overrides overrides = kTiny;
    overrides.emplace_back(samples);
    return plan_of(1, overrides);
  };
  const plan::Plan one = plan_with("batch.global_samples=1"),
                   many = plan_with("batch.global_samples=16");
  std::vector<double> engine_ms, hand_ms;
  where.run(1, threads, [&](const comm::Communicator&) {
    mesh::Mesh mesh;
    engine::Engine engine_one(one, mesh), engine_many(many, mesh);
    HandMade hand(one);
    const auto objective = engine::make_next_token_objective();
    const auto rows_one = make_step(one, 0), rows_many = make_step(many, 0);
    const auto time_of = [](const auto& call) {
      const int64_t begin = monotonic_ns();
      call();
      return milliseconds_since(begin);
    };
    for (int step = 0; step < rounds * steps + kWarmUp; ++step) {
      const double e16 = time_of([&] { (void)engine_many.step(rows_many, *objective); });
      const double h16 = time_of([&] { hand.step(rows_many); });
      const double e1 = time_of([&] { (void)engine_one.step(rows_one, *objective); });
      const double h1 = time_of([&] { hand.step(rows_one); });
      if (step < kWarmUp) continue;
      engine_ms.push_back((e16 - e1) / 15);
      hand_ms.push_back((h16 - h1) / 15);
    }
  });
  return fmt::format("\"engine_ms\": [{:.4f}], \"hand_ms\": [{:.4f}]", fmt::join(engine_ms, ", "),
                     fmt::join(hand_ms, ", "));
}

int run(const std::string& mode, const std::string& name, int rounds, int steps, int threads) {
  Ranks where(mode == "processes");
  const std::string result = name == "overhead"
                                 ? measure_overhead(where, rounds, steps, threads)
                                 : compare(where, cases().at(name), rounds, steps, threads);
  if (where.prints())
    std::printf("{\"case\": \"%s\", \"ranks\": \"%s\", %s}\n", name.c_str(), mode.c_str(),
                result.c_str());
  where.close();
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  const bool is_called_right =
      argc == 6 && (std::string(argv[1]) == "threads" || std::string(argv[1]) == "processes") &&
      (cases().contains(argv[2]) || std::string(argv[2]) == "overhead") && std::atoi(argv[3]) > 0 &&
      std::atoi(argv[4]) > 0 && std::atoi(argv[5]) > 0;
  if (!is_called_right) {
    std::fprintf(stderr,
                 "usage: layouts threads|processes dp2|zero3|tp2|pp2|overhead ROUNDS STEPS "
                 "THREADS\n");
    return 2;
  }
  device::install_cpu_allocator();
  try {
    return run(argv[1], argv[2], std::atoi(argv[3]), std::atoi(argv[4]), std::atoi(argv[5]));
  } catch (const Error& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return error.run_exit_code();
  }
}
