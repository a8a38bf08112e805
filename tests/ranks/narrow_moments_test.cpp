// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Moments of 16 and 8 bits in runs: ZeRO cuts change no bit, checkpoints carry every bit to any
// layout, and the loss is that of wide moments within their rounding.
#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <mutex>

#include "capstan/checkpoint/saver.h"
#include "ranks/engine_fixture.h"
#include "support/run_ranks.h"
#include "support/temp_dir.h"

namespace capstan::engine::testing {
namespace {

struct Form {
  const char* name;
  std::vector<std::string> overrides;
};
std::vector<std::string> operator+(std::vector<std::string> all,
                                   const std::vector<std::string>& more) {
  all.insert(all.end(), more.begin(), more.end());
  return all;
}
const std::vector<std::string> kInt8 = {"optimizer.moments=int8",       "model.hidden_size=256",
                                        "model.intermediate_size=512",  "model.num_hidden_layers=1",
                                        "model.initializer_range=0.05", "optimizer.lr=1.0e-3"};
const std::vector<std::string> kSophia = {"optimizer.name=sophia", "optimizer.sophia.interval=1",
                                          "optimizer.lr=1.0e-3"};
const Form kForms[] = {
    {"lion", {"optimizer.name=lion", "optimizer.lr=1.0e-3"}},
    {"adamw_bf16", {"optimizer.moments=bf16"}},
    {"lion_bf16", {"optimizer.name=lion", "optimizer.moments=bf16", "optimizer.lr=1.0e-3"}},
    {"sophia_bf16", kSophia + std::vector<std::string>{"optimizer.moments=bf16"}},
    {"adamw_int8", kInt8},
    {"lion_int8", kInt8 + std::vector<std::string>{"optimizer.name=lion"}},
    {"sophia_int8",
     kInt8 + std::vector<std::string>{"optimizer.name=sophia", "optimizer.sophia.interval=1"}}};
bool is_int8(const Form& form) { return std::string(form.name).find("int8") != std::string::npos; }

// Without the global norm, whose sum depends on how it is cut.
TinyRun make_run(const Form& form, int ranks, const std::vector<std::string>& layout) {
  TinyRun run{.ranks = ranks, .steps = 3, .overrides = layout};
  run.overrides.insert(run.overrides.end(),
                       {"precision.compute=fp32", "optimizer.max_grad_norm=none"});
  run.overrides.insert(run.overrides.end(), form.overrides.begin(), form.overrides.end());
  return run;
}

class NarrowMoments : public ::testing::TestWithParam<Form> {};

TEST_P(NarrowMoments, ZeroStages_GiveTheSameBits) {
  const std::string whole = train(make_run(GetParam(), 2, {})).hash;
  for (const char* stage : {"1", "2", "3"}) {
    std::vector<std::string> layout{std::string("parallel.zero.stage=") + stage};
    if (stage != std::string("1")) layout.emplace_back("parallel.zero.reduce=step");
    EXPECT_EQ(train(make_run(GetParam(), 2, layout)).hash, whole) << "stage " << stage;
  }
}

using Whole = std::map<std::string, Tensor>;
struct Saved {
  EngineScalars scalars;
  Whole state;
  std::string hash;
  std::vector<double> losses;
};

// Whole tensors out of the boxes of all ranks.
void collect(Engine& engine, Whole& whole) {
  for (const auto& entry : engine.state_entries()) {
    Tensor& target = whole[entry.kind + "/" + entry.name];
    if (!target.defined()) target = at::zeros(entry.global_shape, entry.tensor.options());
    Tensor part = target;
    for (size_t d = 0; d < entry.box.begin.size(); ++d)
      part = part.narrow(static_cast<int64_t>(d), entry.box.begin[d], entry.box.extent[d]);
    part.copy_(entry.tensor.view(entry.box.extent));
  }
}

void go_on(Engine& engine, int rank, int64_t from, int64_t to, std::vector<double>& losses) {
  const auto objective = make_next_token_objective();
  const int data = engine.plan().grid.data_parallel_index(rank);
  for (int64_t step = from; step < to; ++step)
    losses.push_back(engine.step(make_batches(engine.plan(), data, step), *objective).loss);
}

// Two steps and a checkpoint; then two more.
Saved train_and_save(const TinyRun& run, const std::filesystem::path& directory) {
  Saved saved;
  std::mutex mutex;
  const plan::Plan plan = make_tiny_plan(run);
  test::run_ranks(run.ranks, [&](comm::Communicator world) {
    mesh::Mesh mesh(world, plan.grid);
    Engine engine(plan, mesh);
    std::vector<double> losses;
    go_on(engine, world.rank(), 0, 2, losses);
    checkpoint::CommunicatorGroup group(world.control());
    checkpoint::SaveRequest request;
    request.directory = directory;
    request.step = 2;
    request.state = checkpoint::blobs_of(engine.state_entries());
    (void)checkpoint::save_step(request, group);
    {
      const std::lock_guard lock(mutex);
      collect(engine, saved.state);
      saved.scalars = engine.scalars();
    }
    losses.clear();
    go_on(engine, world.rank(), 2, 4, losses);
    const std::string hash = engine.weights_hash();
    const std::lock_guard lock(mutex);
    saved.hash = hash;
    saved.losses = losses;
  });
  return saved;
}

// Loads, compares every bit, goes on; returns the hash at the end.
std::string load_and_go_on(const TinyRun& run, const std::filesystem::path& directory,
                           const Saved& saved) {
  std::string last;
  std::mutex mutex;
  Whole loaded;
  const plan::Plan plan = make_tiny_plan(run);
  test::run_ranks(run.ranks, [&](comm::Communicator world) {
    mesh::Mesh mesh(world, plan.grid);
    Engine engine(plan, mesh, {.initializes = false});
    checkpoint::CommunicatorGroup group(world.control());
    const auto step =
        checkpoint::find_newest_good_step(directory, checkpoint::Verify::kFull, group).value();
    auto blobs = checkpoint::blobs_of(engine.state_entries());
    (void)checkpoint::load_state(step, blobs);
    engine.restore(saved.scalars);
    {
      const std::lock_guard lock(mutex);
      collect(engine, loaded);
    }
    std::vector<double> losses;
    go_on(engine, world.rank(), 2, 4, losses);
    const std::string hash = engine.weights_hash();
    const std::lock_guard lock(mutex);
    last = hash;
    for (size_t i = 0; i < losses.size(); ++i) EXPECT_NEAR(losses[i] / saved.losses[i], 1, 2e-3);
  });
  EXPECT_EQ(loaded.size(), saved.state.size());
  for (const auto& [key, tensor] : loaded) EXPECT_TRUE(tensor.equal(saved.state.at(key))) << key;
  return last;
}

TEST_P(NarrowMoments, CheckpointCarriesEveryBit) {
  const test::TempDir folder("moments");
  const TinyRun run = make_run(GetParam(), 2, {"parallel.zero.stage=2"});
  const Saved saved = train_and_save(run, folder.path());
  EXPECT_EQ(load_and_go_on(run, folder.path(), saved), saved.hash) << "the same layout";
  const std::vector<std::pair<int, std::vector<std::string>>> others = {
      {1, {}},
      {2, {"parallel.tensor=2"}},
      {4, {"parallel.zero.stage=3"}},
      {1, {"parallel.zero.stage=1", "parallel.zero.offload=optimizer"}}};
  for (const auto& [ranks, layout] : others) {
    if (is_int8(GetParam()) && layout.size() == 1 && layout[0] == "parallel.tensor=2")
      continue;  // rows of 256 elements are not cut
    (void)load_and_go_on(make_run(GetParam(), ranks, layout), folder.path(), saved);
  }
}

// Heads of 128 and 512 features: tensor ranks hold rows of whole blocks.
TEST(EightBitMoments, TensorRanks_CutRowsBetweenBlocks) {
  for (Form form : kForms) {
    if (!is_int8(form)) continue;
    SCOPED_TRACE(form.name);
    form.overrides.emplace_back("model.head_dim=128");
    const test::TempDir folder("moments");
    const TinyRun run = make_run(form, 2, {"parallel.zero.stage=2"});
    const Saved saved = train_and_save(run, folder.path());
    (void)load_and_go_on(make_run(form, 2, {"parallel.tensor=2"}), folder.path(), saved);
  }
}

TEST_P(NarrowMoments, LossIsThatOfWideOnes) {
  TinyRun narrow = make_run(GetParam(), 1, {}), wide = narrow;
  narrow.steps = wide.steps = 8;
  wide.overrides.emplace_back("optimizer.moments=auto");
  const TinyResult a = train(narrow), b = train(wide);
  for (size_t i = 0; i < a.reports.size(); ++i)
    EXPECT_NEAR(a.reports[i].loss / b.reports[i].loss, 1, 0.01) << "step " << i;
  EXPECT_EQ(a.hash == b.hash, GetParam().name == std::string("lion"));
}

INSTANTIATE_TEST_SUITE_P(Forms, NarrowMoments, ::testing::ValuesIn(kForms),
                         [](const auto& one) { return std::string(one.param.name); });

}  // namespace
}  // namespace capstan::engine::testing
