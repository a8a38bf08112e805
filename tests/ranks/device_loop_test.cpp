// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The trainer's loop with reports that come one step late: the run of the CPU, line by line, in
// order and to the last step, whatever ends it.
#include <gtest/gtest.h>

#include <csignal>
#include <mutex>

#include "capstan/checkpoint/load.h"
#include "capstan/checkpoint/saver.h"
#include "capstan/ops/device_kernels.h"
#include "capstan/trainer/stop.h"
#include "ranks/loop_data.h"
#include "support/fake_device/device_ranks.h"
#include "support/fake_device/fake_device.h"
#include "support/fake_device/fake_kernels.h"
#include "support/run_ranks.h"
#include "trainer/loop.h"
#include "trainer/resume.h"

namespace capstan::trainer {
namespace {

constexpr int kRanks = 2;
using Lines = std::vector<std::pair<int64_t, double>>;  // step, loss

LoopData& data() {
  static LoopData made;
  return made;
}

struct Run {
  std::string name;
  std::vector<std::string> overrides;
  bool resumes = false;
  std::function<void(int64_t step)> on_step;  // of rank 0
};
struct Ended {
  TrainResult result;
  Lines lines;  // as on_step saw them on rank 0
  std::string hash;
};

void load(const checkpoint::FoundStep& step, engine::Engine& engine, const ResumePoint& point) {
  const checkpoint::HostState state(engine.state_entries());
  std::vector<checkpoint::StateBlob> blobs = state.blobs();
  (void)checkpoint::load_state(step, blobs);
  state.write_back();
  engine.restore(point.scalars);
}

Ended train_on_rank(const Run& run, const comm::Communicator& world) {
  Ended ended;
  TrainOptions options{.recipe = data().recipe(run.overrides), .local_size = kRanks};
  options.console = false;
  options.on_step = [&](int64_t step, double loss) {
    ended.lines.emplace_back(step, loss);
    if (run.on_step && world.rank() == 0) run.on_step(step);
  };
  const text::Tokenizer tokenizer = text::Tokenizer::load(*options.recipe.recipe.data.tokenizer);
  plan::Topology topology{.world_size = kRanks, .local_size = kRanks, .physical_cores = 2};
  const plan::Plan plan =
      plan::make_plan(options.recipe, topology, {.tokenizer_vocab_size = tokenizer.vocab_size()});
  const data::TrainLoader loader(data::make_data_options(plan.resolved, tokenizer.fingerprint()));
  const Path folder = data().folder(run.name);
  mesh::Mesh mesh(world, plan.grid);
  engine::Engine engine(plan, mesh);
  checkpoint::CommunicatorGroup group(world);
  int64_t resumed = 0;
  if (run.resumes) {
    const auto point = find_resume_point(folder, "auto", checkpoint::Verify::kFull, group);
    load(point->step, engine, *point);
    resumed = point->scalars.step;
  }
  Loop loop({.options = options,
             .plan = plan,
             .loader = loader,
             .tokenizer_fingerprint = tokenizer.fingerprint(),
             .run_directory = folder,
             .resumed_step = resumed},
            engine, mesh);
  ended.result = loop.run();
  ended.hash = engine.weights_hash();
  return ended;
}

template <class Runner>
Ended run_with(const Runner& runner, const Run& run) {
  std::filesystem::create_directories(data().folder(run.name));
  Ended ended;
  std::mutex mutex;
  runner([&](comm::Communicator world) {
    Ended mine = train_on_rank(run, world);
    const std::lock_guard lock(mutex);
    if (world.rank() == 0) ended = std::move(mine);
  });
  return ended;
}
Ended on_the_cpu(const Run& run) {
  return run_with([](const auto& fn) { test::run_ranks(kRanks, fn); }, run);
}
Ended on_the_device(const Run& run) {
  return run_with([](const auto& fn) { test::run_device_ranks(kRanks, fn); }, run);
}

// Before there is a device.
class Expected : public ::testing::Environment {
 public:
  static Ended& run() {
    static Ended of_cpu;
    return of_cpu;
  }
  void SetUp() override {
    run() = on_the_cpu({.name = "cpu"});
    test::install_fake_device();
  }
  void TearDown() override { clear_stop(); }
};
const auto* const expected = ::testing::AddGlobalTestEnvironment(new Expected);

void expect_lines(const Lines& got, int64_t first) {
  const Lines& all = Expected::run().lines;
  ASSERT_EQ(got.size() + static_cast<size_t>(first) - 1, all.size());
  for (size_t i = 0; i < got.size(); ++i) {
    const auto& line = all[i + static_cast<size_t>(first) - 1];
    EXPECT_EQ(got[i].first, line.first);
    EXPECT_NEAR(got[i].second, line.second, 1e-9) << "step " << line.first;
  }
}

class DeviceLoop : public ::testing::TestWithParam<bool> {
 public:
  void SetUp() override {
    clear_stop();
    if (GetParam()) ops::install_device_kernels(&test::fake_kernels());
  }
  void TearDown() override { ops::install_device_kernels(nullptr); }
  [[nodiscard]] std::string name(const std::string& test) const {
    return test + (GetParam() ? " kernels" : " aten");
  }
};

TEST_P(DeviceLoop, EveryStepIsReportedOnceAndInOrder) {
  const Ended ended = on_the_device({.name = name("whole")});
  EXPECT_EQ(ended.result.exit_code, 0);
  EXPECT_EQ(ended.result.step, 7);
  expect_lines(ended.lines, 1);
  EXPECT_NEAR(ended.result.loss, Expected::run().result.loss, 1e-9);
}

TEST_P(DeviceLoop, StoppedAndResumed_ItIsTheSameRunBitForBit) {
  const Ended whole = on_the_device({.name = name("uncut")});
  const std::string folder = name("cut");
  const Ended first = on_the_device({.name = folder, .on_step = [](int64_t step) {
                                       if (step == 2) request_stop(SIGUSR1);
                                     }});
  clear_stop();
  EXPECT_EQ(first.result.exit_code, 90);
  ASSERT_LT(first.result.step, 7);
  EXPECT_EQ(first.lines.back().first, first.result.step);  // the last one was drained
  const Ended second = on_the_device({.name = folder, .resumes = true});
  expect_lines(second.lines, first.result.step + 1);
  EXPECT_EQ(second.hash, whole.hash);
}

INSTANTIATE_TEST_SUITE_P(Forms, DeviceLoop, ::testing::Bool(),
                         [](const auto& one) { return one.param ? "ByOurKernels" : "ByAten"; });

}  // namespace
}  // namespace capstan::trainer
