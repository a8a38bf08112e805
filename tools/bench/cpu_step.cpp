// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Our side of cpu_step.sh: optimizer steps of a Llama on random tokens, one rank.
// usage: cpu_step DTYPE THREADS STEPS [hidden ffn layers heads kv_heads vocab sequence batch]
// Prints one JSON object: milliseconds of every step but the first two, the rate of matrix products
// measured after each of them, time to the first finished step, peak memory before any product was
// measured.
#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <sys/resource.h>

#include <cstdio>
#include <fstream>

#include "capstan/base/env.h"
#include "capstan/device/allocator.h"
#include "capstan/device/threads.h"
#include "capstan/engine/engine.h"
#include "gemm_ceiling.h"

namespace {

using namespace capstan;

double seconds_since_process_start() {
  std::ifstream uptime_file("/proc/uptime"), stat_file("/proc/self/stat");
  double uptime = 0;
  uptime_file >> uptime;
  std::string stat((std::istreambuf_iterator<char>(stat_file)), {});
  stat = stat.substr(stat.rfind(')') + 2);
  size_t at = 0;
  for (int field = 3; field < 22; ++field) at = stat.find(' ', at) + 1;
  return uptime - std::stod(stat.substr(at)) / static_cast<double>(::sysconf(_SC_CLK_TCK));
}

std::string recipe_text(int argc, char** argv) {
  const auto argument = [&](int index, const char* fallback) {
    return index < argc ? argv[index] : fallback;
  };
  const std::string batch = argument(11, "4");
  const std::string residual = std::string(argv[1]) == "fp64" ? "fp64" : "fp32";
  return fmt::format(
      "version: 1\n"
      "run: {{name: bench, steps: 100000, threads: {}}}\n"
      "model: {{vocab_size: {}, hidden_size: {}, intermediate_size: {}, num_hidden_layers: {}, "
      "num_attention_heads: {}, "
      "num_key_value_heads: {}, tie_word_embeddings: false}}\n"
      "data: {{tokenizer: none, train: [{{path: none-needed}}]}}\n"
      "batch: {{global_samples: {}, micro_samples: {}, sequence_length: {}}}\n"
      "optimizer: {{lr: 3.0e-4}}\n"
      "lr_schedule: {{kind: constant}}\n"
      "precision: {{compute: {}, residual: {}}}\n",
      argv[2], argument(9, "8192"), argument(4, "512"), argument(5, "1408"), argument(6, "8"),
      argument(7, "8"), argument(8, "4"), batch, batch, argument(10, "512"), argv[1], residual);
}

engine::MicroBatch random_batch(const plan::BatchPlan& b, int64_t vocab, int64_t step) {
  const at::Tensor row =
      (at::arange(b.micro_samples * (b.sequence_length + 1), at::kLong) * 2654435761 + step * 40503)
          .bitwise_right_shift(7)
          .remainder(vocab)
          .view({b.micro_samples, b.sequence_length + 1});
  engine::MicroBatch batch;
  batch.ids_BT = row.narrow(1, 0, b.sequence_length).contiguous();
  batch.targets_BT = row.narrow(1, 1, b.sequence_length).contiguous();
  batch.rows.positions_BT = at::arange(b.sequence_length, at::kLong)
                                .expand({b.micro_samples, b.sequence_length})
                                .contiguous();
  for (int64_t s = 0; s < b.micro_samples; ++s)
    batch.rows.samples.push_back(step * b.micro_samples + s);
  return batch;
}

struct Peaks {
  double rss_mb = 0, counted_mb = 0;
};

Peaks peaks_until_now() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return {static_cast<double>(usage.ru_maxrss) / 1024,
          static_cast<double>(device::stats(0).peak_bytes) / 1048576};
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    std::fprintf(stderr,
                 "usage: cpu_step DTYPE THREADS STEPS [hidden ffn layers heads kv_heads vocab "
                 "sequence batch]\n");
    return 2;
  }
  device::install_cpu_allocator();
  const plan::Plan plan = plan::make_plan(recipe::parse_recipe(recipe_text(argc, argv), "bench"),
                                          plan::local_topology(1, 1, "cpu"), {});
  device::set_threads(std::atoi(argv[2]));
  mesh::Mesh mesh;
  engine::Engine engine(plan, mesh);
  const auto objective = engine::make_next_token_objective();
  bench::GemmCeiling ceiling(plan.model().shape,
                             plan.batch.micro_samples * plan.batch.sequence_length,
                             std::string(argv[1]) == "bf16" ? at::kBFloat16 : at::kFloat);
  std::vector<double> times;
  double first_s = 0, loss = 0;
  Peaks peaks;
  for (int64_t step = 0; step < std::atoll(argv[3]) + 2; ++step) {
    const int64_t begin = monotonic_ns();
    loss = engine.step({random_batch(plan.batch, plan.model().shape.vocab_size, step)}, *objective)
               .loss;
    if (step == 0) first_s = seconds_since_process_start();
    if (step == 1) peaks = peaks_until_now();
    if (step < 2) continue;
    times.push_back(static_cast<double>(monotonic_ns() - begin) * 1e-6);
    ceiling.sample();
  }
  const auto tokens = static_cast<double>(plan.batch.tokens_per_step);
  std::printf("%s\n", fmt::format("{{\"step_ms\": [{:.2f}], \"tokens_per_step\": {:.0f}, "
                                  "\"first_step_s\": {:.2f}, \"peak_rss_mb\": {:.0f}, "
                                  "\"counted_peak_mb\": {:.0f}, \"loss\": {:.4f}, "
                                  "\"gflop_per_step\": {:.1f}, \"square_gflops\": [{:.1f}], "
                                  "\"own_gflops\": [{:.1f}]}}",
                                  fmt::join(times, ", "), tokens, first_s, peaks.rss_mb,
                                  peaks.counted_mb, loss, plan.flops.per_token * tokens * 1e-9,
                                  fmt::join(ceiling.rates().square, ", "),
                                  fmt::join(ceiling.rates().own, ", "))
                          .c_str());
  return 0;
}
