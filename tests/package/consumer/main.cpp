// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Trains three steps of a tiny model with the engine of an installed Capstan, on data made here.
#include <capstan/device/allocator.h>
#include <capstan/engine/engine.h>

#include <ATen/ATen.h>
#include <cmath>
#include <cstdio>

int main() {
  using namespace capstan;
  device::install_cpu_allocator();
  const char* recipe_text =
      "version: 1\n"
      "run: {name: consumer, steps: 3, threads: 1}\n"
      "model: {vocab_size: 64, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, "
      "num_attention_heads: 2}\n"
      "data: {tokenizer: none-needed, train: [{path: none-needed}]}\n"
      "batch: {global_samples: 4, micro_samples: 2, sequence_length: 16}\n"
      "optimizer: {lr: 1.0e-2}\n"
      "precision: {compute: fp32}\n";
  const plan::Plan plan = plan::make_plan(recipe::parse_recipe(recipe_text, "consumer"),
                                          plan::local_topology(1, 1, "cpu"), {});
  mesh::Mesh mesh;
  engine::Engine engine(plan, mesh);
  const auto objective = engine::make_next_token_objective();
  const at::Tensor stream = at::arange(4 * 17, at::kLong).remainder(64).view({4, 17});
  std::vector<engine::MicroBatch> batches(2);
  for (int64_t b = 0; b < 2; ++b) {
    batches[b].ids_BT = stream.narrow(0, 2 * b, 2).narrow(1, 0, 16).contiguous();
    batches[b].targets_BT = stream.narrow(0, 2 * b, 2).narrow(1, 1, 16).contiguous();
    batches[b].rows = {.samples = {2 * b, 2 * b + 1},
                       .positions_BT = at::arange(16, at::kLong).expand({2, 16}).contiguous()};
  }
  double first = 0, last = 0;
  for (int step = 0; step < 3; ++step) {
    last = engine.step(batches, *objective).loss;
    if (step == 0) first = last;
    std::printf("step %d loss %.4f\n", step + 1, last);
  }
  return std::isfinite(last) && last < first ? 0 : 1;
}
