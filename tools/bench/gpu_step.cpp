// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Our side of gpu_step.sh: optimizer steps on random tokens, one rank, on a GPU or the CPU.
// usage: gpu_step KEY=VALUE...   keys in `defaults`
// Prints one JSON object. A batch that does not fit the memory is one with "out_of_memory".
#include <ATen/ATen.h>
#include <fmt/format.h>
#include <sys/resource.h>
#include <torch/csrc/autograd/profiler_kineto.h>
#include <torch/headeronly/version.h>

#include <cstdio>
#include <functional>
#include <map>
#include <set>

#include "capstan/base/env.h"
#include "capstan/base/error.h"
#include "capstan/base/gpu.h"
#include "capstan/base/json.h"
#include "capstan/device/accelerator.h"
#include "capstan/device/allocator.h"
#include "capstan/device/cuda.h"
#include "capstan/device/threads.h"
#include "capstan/engine/engine.h"

namespace {

using namespace capstan;
using Arguments = std::map<std::string, std::string>;

Arguments parse(int argc, char** argv) {
  Arguments defaults = {
      {"family", "llama"},     {"device", "cuda"},  {"dtype", "bf16"},    {"graphs", "false"},
      {"micro", "4"},          {"samples", "8"},    {"sequence", "1024"}, {"hidden", "768"},
      {"ffn", "2048"},         {"layers", "12"},    {"heads", "12"},      {"kv_heads", "12"},
      {"vocabulary", "50304"}, {"tied", "false"},   {"bias", "false"},    {"steps", "4"},
      {"warmup", "3"},         {"threads", "auto"}, {"trace", ""},        {"recompute", "none"},
      {"moments", "auto"},     {"gemm", "auto"}};
  for (int i = 1; i < argc; ++i) {
    const std::string text = argv[i];
    const size_t at = text.find('=');
    const auto known = at == std::string::npos ? defaults.end() : defaults.find(text.substr(0, at));
    if (known == defaults.end()) {
      std::string keys;
      for (const auto& [key, value] : defaults) keys += " " + key;
      throw ConfigError({.module = "bench",
                         .what = "reading the arguments",
                         .got = text,
                         .need = "KEY=VALUE with one of the keys" + keys});
    }
    known->second = text.substr(at + 1);
  }
  return defaults;
}

recipe::Resolved make_recipe(const Arguments& a) {
  const bool fp8 = a.at("dtype") == "fp8";
  std::vector<std::string> overrides;
  for (const auto& [key, name] : {std::pair{"device", "run.device"},
                                  {"graphs", "run.graphs"},
                                  {"gemm", "run.gemm"},
                                  {"threads", "run.threads"},
                                  {"hidden", "model.hidden_size"},
                                  {"ffn", "model.intermediate_size"},
                                  {"layers", "model.num_hidden_layers"},
                                  {"family", "model.family"},
                                  {"heads", "model.num_attention_heads"},
                                  {"vocabulary", "model.vocab_size"},
                                  {"tied", "model.tie_word_embeddings"},
                                  {"samples", "batch.global_samples"},
                                  {"micro", "batch.micro_samples"},
                                  {"sequence", "batch.sequence_length"},
                                  {"recompute", "parallel.recompute.mode"},
                                  {"moments", "optimizer.moments"}})
    overrides.push_back(fmt::format("{}={}", name, a.at(key)));
  if (a.at("family") != "gpt2")
    for (const std::string& key :
         {"num_key_value_heads=" + a.at("kv_heads"), "attention_bias=" + a.at("bias"),
          std::string("attention_output_bias=false")})
      overrides.push_back("model." + key);
  overrides.push_back("precision.compute=" + (fp8 ? "bf16" : a.at("dtype")));
  if (fp8) overrides.emplace_back("precision.fp8.scaling=tensor");
  return recipe::parse_recipe(
      "version: 1\nrun: {name: bench, steps: 100000}\n"
      "data: {tokenizer: none, train: [{path: none-needed}]}\n"
      "optimizer: {lr: 3.0e-4}\nlr_schedule: {kind: constant}\n",
      "bench", overrides);
}

// Whether it fits is measured, not predicted.
plan::Plan make_plan(const Arguments& a) {
  plan::Topology topology = plan::local_topology(1, 1, a.at("device"));
  topology.memory_bytes = topology.host_memory_bytes = 0;
  return plan::make_plan(make_recipe(a), topology, {});
}

engine::MicroBatch random_batch(const plan::BatchPlan& b, int64_t vocabulary) {
  const at::Tensor row_BT =
      at::randint(vocabulary, {b.micro_samples, b.sequence_length + 1}, at::kLong);
  engine::MicroBatch batch;
  batch.ids_BT = row_BT.narrow(1, 0, b.sequence_length).contiguous();
  batch.targets_BT = row_BT.narrow(1, 1, b.sequence_length).contiguous();
  batch.rows.positions_BT = at::arange(b.sequence_length, at::kLong)
                                .expand({b.micro_samples, b.sequence_length})
                                .contiguous();
  for (int64_t s = 0; s < b.micro_samples; ++s) batch.rows.samples.push_back(s);
  return batch;
}

void trace_step(const std::string& path, const std::function<void()>& step) {
  namespace profiler = torch::autograd::profiler;
  using torch::profiler::impl::ActivityType;
  const torch::profiler::impl::ProfilerConfig config(torch::profiler::impl::ProfilerState::KINETO);
  std::set<ActivityType> activities = {ActivityType::CPU};
  if (device::accelerator()) activities.insert(ActivityType::CUDA);
  profiler::prepareProfiler(config, activities);
  profiler::enableProfiler(config, activities, {at::RecordScope::FUNCTION});
  step();
  profiler::disableProfiler()->save(path);
}

json::Json memory_now() {
  if (const device::Accelerator* const gpu = device::accelerator()) {
    const device::DeviceMemory m = gpu->memory();
    return {{"peak_bytes", m.peak_bytes},
            {"reserved_bytes", m.peak_reserved_bytes},
            {"card_bytes", m.total_bytes - m.free_bytes}};
  }
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return {{"peak_bytes", device::stats(0).peak_bytes},
          {"reserved_bytes", usage.ru_maxrss * int64_t{1024}},
          {"card_bytes", nullptr}};
}

json::Json describe(const plan::Plan& plan, const Arguments& a) {
  std::string gpu = "cpu";
  json::Json peak = nullptr;
  if (a.at("device") == "cuda") {
    gpu = probe_gpus().gpus.front().name;
    if (const auto flops = dense_flops(gpu, DType::kBf16)) peak = *flops;
  }
  const auto& memory = plan.memory;
  return {{"who", "capstan"},
          {"processor", gpu},
          {"torch", TORCH_VERSION},
          {"driver_cuda", cuda_version_text(probe_gpus().driver_cuda)},
          {"peak_flops", peak},
          {"micro", plan.batch.micro_samples},
          {"tokens_per_step", plan.batch.tokens_per_step},
          {"flops_per_token", plan.flops.per_token},
          {"parameters", plan.model().parameters},
          {"predicted", {{"peak_bytes", memory.peak()}, {"card_bytes", memory.needed()}}},
          {"keeps", fmt::format("{}, master {}, gradients {}, moments {}", a.at("dtype"),
                                name_of(plan.precision.master), name_of(plan.precision.gradients),
                                plan.resolved.optimizer.moments == "auto"
                                    ? name_of(plan.precision.master)
                                    : plan.resolved.optimizer.moments)}};
}

void measure(const plan::Plan& plan, const Arguments& a, json::Json& result) {
  mesh::Mesh mesh;
  engine::Engine engine(plan, mesh);
  const auto objective = engine::make_next_token_objective();
  std::vector<engine::MicroBatch> batches;
  for (int64_t i = 0; i < plan.batch.micro_batches; ++i)
    batches.push_back(random_batch(plan.batch, plan.model().shape.vocab_size));
  const auto step = [&] { return engine.step(batches, *objective).loss; };
  const int64_t start = monotonic_ns(), warmup = std::stoll(a.at("warmup"));
  const auto ms_since = [](int64_t begin) {
    return static_cast<double>(monotonic_ns() - begin) * 1e-6;
  };
  std::vector<double> times;
  double loss = 0;
  for (int64_t i = 0; i < warmup + std::stoll(a.at("steps")); ++i) {
    const int64_t begin = monotonic_ns();
    loss = step();
    if (i == 0) result["first_step_s"] = ms_since(start) * 1e-3;
    if (i >= warmup) times.push_back(ms_since(begin));
  }
  result["step_ms"] = times;
  result["loss"] = loss;
  result["memory"] = memory_now();
  if (!a.at("trace").empty()) trace_step(a.at("trace"), [&] { (void)step(); });
}

int run(int argc, char** argv) {
  const Arguments a = parse(argc, argv);
  if (a.at("device") == "cuda")
    device::start_cuda(0);
  else
    device::install_cpu_allocator();
  const plan::Plan plan = make_plan(a);
  device::set_threads(plan.threads_per_rank);
  json::Json result = describe(plan, a);
  try {
    measure(plan, a, result);
  } catch (const c10::OutOfMemoryError&) {
    result["out_of_memory"] = true;
  }
  fmt::print("{}\n", result.dump());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const Error& error) {
    fmt::print(stderr, "{}\n", error.what());
    return error.exit_code();
  } catch (const std::exception& error) {
    fmt::print(stderr, "error: {}\n", error.what());
    return 1;
  }
}
