// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/metrics/step_line.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <unistd.h>

#include <cmath>
#include <vector>

namespace capstan::metrics {
namespace {

using testing::HasSubstr;
using testing::Not;

StepLine example() {
  return {.step = 120,
          .total_steps = 900,
          .loss = 5.0493,
          .grad_norm = 1.204,
          .lr = 0.00287,
          .step_ms = 271.1,
          .tokens_per_s = 7557,
          .mfu = 0.412,
          .peak_bytes = 654982512,
          .eta_s = 211};
}

TEST(StepLine, OneRank_IsAsDocumented) {
  EXPECT_EQ(format_step_line(example()),
            "step    120/900 | loss 5.0493 | norm 1.204 | lr 2.87e-03 | 271 ms | 7557 tok/s | "
            "MFU 41.2% | peak 0.61 GiB | ETA 3m31s");
}

TEST(StepLine, MoreRanksAndASkip_AddTheirParts) {
  StepLine line = example();
  line.world_size = 2;
  line.skipped = "nonfinite gradient";
  EXPECT_THAT(format_step_line(line), HasSubstr("| 7557 tok/s | 3778 tok/s/rank | MFU"));
  EXPECT_THAT(format_step_line(line), testing::EndsWith(" | skipped: nonfinite gradient"));
  EXPECT_THAT(format_step_line(line), Not(HasSubstr("\x1b")));
  EXPECT_THAT(format_step_line(line, true),
              testing::EndsWith("\x1b[33mskipped: nonfinite gradient\x1b[0m"));
}

TEST(StepLine, UnknownParts_AreLeftOut) {
  EXPECT_EQ(format_step_line({.step = 3,
                              .loss = std::nan(""),
                              .grad_norm = 0.00123456,
                              .lr = 0,
                              .step_ms = 4.256,
                              .tokens_per_s = 12.4}),
            "step      3 | loss nan | norm 0.001235 | lr 0.00e+00 | 4.26 ms | 12 tok/s");
}

struct FakeClock {
  double now = 100;
  LinePacer pacer(bool terminal) {
    return LinePacer(
        {.terminal = terminal, .interval_steps = 10, .clock_s = [this] { return now; }});
  }
};

TEST(LinePacer, Terminal_PrintsEveryInterval) {
  FakeClock clock;
  LinePacer pacer = clock.pacer(true);
  std::vector<int64_t> printed;
  for (int64_t step = 1; step <= 45; ++step) {
    if (pacer.should_print(step, step == 45)) printed.push_back(step);
  }
  EXPECT_THAT(printed, testing::ElementsAre(1, 10, 20, 30, 40, 45));
}

TEST(LinePacer, Elsewhere_PrintsAtMostEveryTenSeconds) {
  FakeClock clock;
  LinePacer pacer = clock.pacer(false);
  std::vector<int64_t> printed;
  for (int64_t step = 1; step <= 95; ++step, clock.now += 0.3) {
    if (pacer.should_print(step, step == 95)) printed.push_back(step);
  }
  // 10 s are 34 steps of 0.3 s; lines fall on the interval only.
  EXPECT_THAT(printed, testing::ElementsAre(1, 40, 80, 95));
}

TEST(LinePacer, ResumedRun_PrintsItsFirstStep) {
  FakeClock clock;
  LinePacer pacer = clock.pacer(false);
  EXPECT_TRUE(pacer.should_print(503, false));
  EXPECT_FALSE(pacer.should_print(510, false));
}

TEST(Color, IsForTerminalsThatWantIt) {
  const int master = ::posix_openpt(O_RDWR | O_NOCTTY);
  if (master < 0 || ::grantpt(master) != 0 || ::unlockpt(master) != 0) {
    GTEST_SKIP() << "no pseudo terminal on this machine";
  }
  const int terminal = ::open(::ptsname(master), O_RDWR | O_NOCTTY);
  ASSERT_GE(terminal, 0);
  int ends[2];
  ASSERT_EQ(::pipe(ends), 0);
  ::unsetenv("NO_COLOR");
  ::setenv("TERM", "xterm", 1);
  EXPECT_TRUE(is_terminal(terminal));
  EXPECT_FALSE(is_terminal(ends[1]));
  EXPECT_TRUE(wants_color(terminal));
  EXPECT_FALSE(wants_color(ends[1]));
  ::setenv("NO_COLOR", "1", 1);
  EXPECT_FALSE(wants_color(terminal));
  ::setenv("NO_COLOR", "", 1);
  EXPECT_TRUE(wants_color(terminal)) << "an empty value counts as unset";
  ::setenv("TERM", "dumb", 1);
  EXPECT_FALSE(wants_color(terminal));
  for (const int descriptor : {master, terminal, ends[0], ends[1]}) ::close(descriptor);
}

}  // namespace
}  // namespace capstan::metrics
