// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// An own loop on the engine: two ranks as threads learn to count, with a loss of our own that
// weighs the second half of each row twice. Needs no files.
#include <ATen/ATen.h>

#include <cstdio>

#include "capstan/comm/threads.h"
#include "capstan/device/allocator.h"
#include "capstan/engine/engine.h"

namespace {

using namespace capstan;

constexpr int kRanks = 2;
constexpr const char* kRecipe =
    "version: 1\n"
    "run: {name: custom-loop, steps: 60, threads: 1}\n"
    "model: {vocab_size: 64, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, "
    "num_attention_heads: 4}\n"
    "data: {tokenizer: unused, train: [{path: unused}]}\n"
    "batch: {global_samples: 8, micro_samples: 2, sequence_length: 32}\n"
    "optimizer: {lr: 5.0e-3}\n"
    "lr_schedule: {kind: cosine, warmup: 10}\n"
    "precision: {compute: fp32}\n";

// loss = sum of w_t * loss_t / sum of w_t over the whole step, w_t = 2 in the second half of a row.
class HalfAndHalf final : public engine::Objective {
 public:
  double local_denominator(const std::vector<engine::MicroBatch>& batches) const override {
    double sum = 0;
    for (const engine::MicroBatch& batch : batches) sum += raw_weights(batch).sum().item<double>();
    return sum;
  }
  at::Tensor weights(const engine::MicroBatch& batch, double global_denominator) const override {
    return raw_weights(batch) / global_denominator;
  }
  at::Tensor loss(const nn::TokenScores& scores, const engine::MicroBatch& batch,
                  double global_denominator) const override {
    return -(scores.logprob_BT * weights(batch, global_denominator)).sum();
  }

 private:
  static at::Tensor raw_weights(const engine::MicroBatch& batch) {
    at::Tensor w = at::ones(batch.targets_BT.sizes(), at::kFloat);
    w.narrow(1, w.size(1) / 2, w.size(1) - w.size(1) / 2).fill_(2);
    return w * batch.targets_BT.ne(-100);
  }
};

// Row s counts up from a start of its own; every rank takes its share of the step's rows.
engine::MicroBatch make_rows(int64_t first_sample, int64_t count, int64_t length) {
  const at::Tensor start =
      (at::arange(first_sample, first_sample + count, at::kLong) * 7).unsqueeze(1);
  const at::Tensor row = (start + at::arange(length + 1, at::kLong).unsqueeze(0)).remainder(64);
  engine::MicroBatch batch;
  batch.ids_BT = row.narrow(1, 0, length).contiguous();
  batch.targets_BT = row.narrow(1, 1, length).contiguous();
  batch.rows.positions_BT = at::arange(length, at::kLong).expand({count, length}).contiguous();
  for (int64_t s = 0; s < count; ++s) batch.rows.samples.push_back(first_sample + s);
  return batch;
}

void run_rank(const comm::Communicator& world, const plan::Plan& plan) {
  mesh::Mesh mesh(world, plan.grid);
  engine::Engine engine(plan, mesh);
  const HalfAndHalf objective;
  const plan::BatchPlan& b = plan.batch;
  for (int64_t step = 0; step < b.total_steps; ++step) {
    std::vector<engine::MicroBatch> batches;
    const int64_t mine =
        step * b.global_samples + mesh.grid().data_parallel_index(mesh.rank()) * b.samples_per_rank;
    for (int64_t m = 0; m < b.micro_batches; ++m)
      batches.push_back(make_rows(mine + m * b.micro_samples, b.micro_samples, b.sequence_length));
    const engine::StepReport report = engine.step(batches, objective);
    if (world.rank() == 0 && (step % 10 == 0 || step + 1 == b.total_steps))
      std::printf("step %2lld  loss %.4f  norm %.3f  lr %.2e\n",
                  static_cast<long long>(report.step), report.loss, report.grad_norm, report.lr);
  }
}

}  // namespace

int main() {
  device::install_cpu_allocator();
  try {
    const plan::Plan plan = plan::make_plan(recipe::parse_recipe(kRecipe, "custom_loop"),
                                            plan::local_topology(kRanks, kRanks, "cpu"), {});
    comm::run_thread_ranks(kRanks, [&](const comm::Communicator& world) { run_rank(world, plan); });
    return 0;
  } catch (const Error& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return error.run_exit_code();
  }
}
