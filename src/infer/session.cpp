// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/infer/session.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>

#include "capstan/base/bytes.h"
#include "capstan/base/env.h"
#include "capstan/base/gpu.h"
#include "capstan/base/log.h"
#include "capstan/base/text.h"
#include "capstan/checkpoint/load.h"
#include "capstan/checkpoint/saver.h"
#include "capstan/device/accelerator.h"
#include "capstan/device/cuda.h"
#include "capstan/device/threads.h"
#include "capstan/infer/kv_cache.h"
#include "capstan/plan/fp8.h"

namespace capstan::infer {
namespace {

// The model's own recipe, brought down to one rank of this machine.
recipe::Resolved recipe_for_use(const checkpoint::FoundStep& step,
                                const std::vector<std::string>& overrides,
                                const std::string& device) {
  std::vector<std::string> changes = {"parallel.data=auto",
                                      "parallel.tensor=1",
                                      "parallel.sequence=false",
                                      "parallel.pipeline.size=1",
                                      "parallel.pipeline.schedule=gpipe",
                                      "parallel.pipeline.chunks=1",
                                      "parallel.pipeline.split=auto",
                                      "parallel.context.size=1",
                                      "parallel.context.method=ring",
                                      "parallel.expert=1",
                                      "parallel.zero.stage=0",
                                      "parallel.zero.shard_size=auto",
                                      "parallel.zero.reduce=auto",
                                      "parallel.zero.reshard_after_forward=true",
                                      "parallel.zero.offload=none",
                                      "parallel.recompute.mode=none",
                                      "parallel.recompute.parts=[]",
                                      "parallel.offload_activations=false",
                                      "optimizer.in_backward=false",
                                      "run.device=" + device,
                                      "run.graphs=false",
                                      "run.gemm=auto",
                                      "run.threads=auto"};
  changes.insert(changes.end(), overrides.begin(), overrides.end());
  return recipe::parse_recipe(checkpoint::read_step_file(step.path, "recipe.yaml"),
                              (step.path / "recipe.yaml").string(), changes);
}

// The plan's memory is that of training, which is not what happens here: nothing to hold it to.
plan::Topology topology_for_use(const std::string& device) {
  plan::Topology topology = plan::local_topology(1, 1, device);
  topology.device = device;
  topology.memory_bytes = topology.host_memory_bytes = 0;
  return topology;
}

void prepare_gpu(const recipe::Recipe& recipe) {
  plan::check_fp8_gpus(recipe, probe_gpus().gpus);
  if (recipe.run.deterministic) device::compute_deterministically();
}

// "GPU 0 (NVIDIA H100)", "the CPU, 8 threads"
std::string place_of(const std::string& device) {
  if (device == "cpu") return fmt::format("the CPU, {} threads", at::get_num_threads());
  const auto index = static_cast<size_t>(device::run_device().index());
  const std::vector<Gpu>& gpus = probe_gpus().gpus;
  return fmt::format("GPU {}{}", index,
                     index < gpus.size() ? " (" + gpus[index].name + ")" : std::string());
}

std::vector<checkpoint::StateBlob> model_blobs(const checkpoint::HostState& state) {
  std::vector<checkpoint::StateBlob> blobs = state.blobs();
  std::erase_if(blobs, [](const checkpoint::StateBlob& blob) { return blob.kind != "model"; });
  return blobs;
}

// How much of the text is made of whole UTF-8 characters; what follows may still grow into one.
size_t whole_characters(std::string_view text) {
  for (size_t back = 1; back <= std::min<size_t>(3, text.size()); ++back) {
    const auto byte = static_cast<unsigned char>(text[text.size() - back]);
    if ((byte & 0xC0) == 0x80) continue;  // continuation
    const size_t need = byte >= 0xF0 ? 4 : byte >= 0xE0 ? 3 : byte >= 0xC0 ? 2 : 1;
    return need > back ? text.size() - back : text.size();
  }
  return text.size();
}

std::vector<int32_t> encode_prompt(const Session& session, std::string_view prompt) {
  const text::Tokenizer& tokenizer = session.tokenizer();
  std::vector<int32_t> ids = tokenizer.encode(prompt, {.add_special = true});
  if (ids.empty() && tokenizer.eos_id())
    ids.push_back(*tokenizer.eos_id());  // an empty prompt starts a new document
  const int64_t context = session.plan().model().shape.max_position_embeddings;
  if (ids.empty() || static_cast<int64_t>(ids.size()) >= context)
    throw ConfigError({.module = "infer",
                       .what = "reading the prompt",
                       .got = fmt::format("{} tokens", ids.size()),
                       .need = fmt::format("1 to {}", context - 1),
                       .why = fmt::format("the model has {} positions", context)});
  return ids;
}

}  // namespace

struct Session::State {
  checkpoint::FoundStep step;
  plan::Plan plan;
  mesh::Mesh mesh;
  std::unique_ptr<engine::Engine> engine;
  std::optional<text::Tokenizer> tokenizer;
};

Session::Session(const SessionOptions& options) : state_(std::make_unique<State>()) {
  state_->step = checkpoint::open_model_directory(options.model, checkpoint::Verify::kFull);
  const Path& folder = state_->step.path;
  if (std::filesystem::exists(folder / "tokenizer.json"))
    state_->tokenizer = text::Tokenizer::load(folder / "tokenizer.json");
  const std::string device = device::accelerator() ? "cuda" : "cpu";
  const recipe::Resolved recipe = recipe_for_use(state_->step, options.overrides, device);
  state_->plan = plan::make_plan(
      recipe, topology_for_use(device),
      {.tokenizer_vocab_size =
           state_->tokenizer ? std::optional(state_->tokenizer->vocab_size()) : std::nullopt});
  if (device == "cuda") prepare_gpu(state_->plan.resolved);
  device::set_threads(static_cast<int>(options.threads.value_or(device::recommended_threads(1))));
  state_->engine = std::make_unique<engine::Engine>(
      state_->plan, state_->mesh, engine::EngineOptions{.trains = false, .initializes = false});
  const checkpoint::HostState state(state_->engine->state_entries());
  std::vector<checkpoint::StateBlob> blobs = model_blobs(state);
  (void)checkpoint::load_state(state_->step, blobs);
  state.write_back();
  state_->engine->restore(state_->engine->scalars());
  log::info("infer", "{}: step {}, {} parameters, on {}", folder.string(),
            state_->step.manifest.step, format_count(state_->plan.model().parameters),
            place_of(device));
}

Session::~Session() = default;
Session::Session(Session&&) noexcept = default;
Session& Session::operator=(Session&&) noexcept = default;
engine::Engine& Session::engine() { return *state_->engine; }
const plan::Plan& Session::plan() const { return state_->plan; }
const text::Tokenizer& Session::tokenizer() const {
  if (!state_->tokenizer)
    throw ConfigError({.module = "infer",
                       .what = "reading text with " + step_folder().string(),
                       .got = "a model trained without a tokenizer",
                       .need = "tokenizer.json in the step folder",
                       .fix = "Use token files (--data PREFIX), or train with data.tokenizer"});
  return *state_->tokenizer;
}
bool Session::has_tokenizer() const { return state_->tokenizer.has_value(); }
int64_t Session::step() const { return state_->step.manifest.step; }
const Path& Session::step_folder() const { return state_->step.path; }

Generated generate(Session& session, std::string_view prompt, const GenerateOptions& options,
                   const std::function<void(std::string_view piece)>& stream) {
  check_sampling(options.sampling);
  const at::NoGradGuard no_grad;
  const plan::ModelShape& shape = session.plan().model().shape;
  const std::vector<int32_t> prompt_ids = encode_prompt(session, prompt);
  ContiguousKvCache cache(shape.num_hidden_layers,
                          std::min(shape.max_position_embeddings,
                                   static_cast<int64_t>(prompt_ids.size()) + options.max_tokens));
  std::vector<int64_t> next(prompt_ids.begin(), prompt_ids.end());
  Generated result;
  size_t streamed = 0;
  while (true) {
    if (static_cast<int64_t>(result.tokens.size()) >= options.max_tokens)
      result.stopped_by = "max tokens";
    else if (cache.length() + static_cast<int64_t>(next.size()) > shape.max_position_embeddings)
      result.stopped_by = "context is full";
    if (!result.stopped_by.empty()) break;
    const at::Tensor ids = at::tensor(next, at::kLong).unsqueeze(0);
    const at::Tensor logits =
        session.engine().next_logits(ids, &cache).cpu().to(at::kFloat).reshape({-1}).contiguous();
    const int64_t token =
        sample_token({logits.data_ptr<float>(), static_cast<size_t>(logits.numel())},
                     options.sampling, options.sequence, result.tokens.size());
    if (options.stop_at_end && session.tokenizer().eos_id() == token) {
      result.stopped_by = "end of text";
      break;
    }
    result.tokens.push_back(static_cast<int32_t>(token));
    result.text += session.tokenizer().token_bytes(static_cast<int32_t>(token));
    next = {token};
    const size_t whole = whole_characters(result.text);
    if (stream && whole > streamed)
      stream(std::string_view(result.text).substr(streamed, whole - streamed));
    streamed = std::max(streamed, whole);
  }
  if (stream && streamed < result.text.size())
    stream(std::string_view(result.text).substr(streamed));
  return result;
}

}  // namespace capstan::infer
