// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <regex>
#include <sstream>

#include "capstan/base/error.h"
#include "capstan/plan/schedule.h"

namespace capstan::plan {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

Schedule build(const char* kind, int ranks, int micro_batches, int chunks = 1) {
  return build_schedule(kind, Pass::kTrain, ranks * chunks, micro_batches, chunks);
}
std::string draw(const Schedule& schedule, int columns = 120, const ScheduleCosts& costs = {}) {
  return draw_timeline(schedule, simulate_schedule(schedule, costs), columns);
}
size_t count(const std::string& text, const std::string& word) {
  size_t found = 0;
  for (size_t at = text.find(word); at != std::string::npos; at = text.find(word, at + 1)) ++found;
  return found;
}

TEST(DrawTimeline, OneRowPerRankOneColumnPerUnit) {
  EXPECT_EQ(draw(build("1f1b", 2, 3)),
            "    time | 0              5              10\n"
            "  rank 0 | F0 F1 .. .. B0 -- F2 B1 -- .. B2 --\n"
            "  rank 1 | .. F0 B0 -- F1 B1 -- F2 B2 -- .. ..\n"
            "F forward, B backward, F3 micro-batch 3, -- goes on, .. idle\n"
            "12 units of time, ranks idle for 25.0 %\n");
}

TEST(DrawTimeline, ShowsHalvesAndChunks) {
  const std::string text = draw(build("zero_bubble", 2, 2, 2));
  EXPECT_THAT(text, HasSubstr("  rank 1 | ..   F0.0 F0.1 F1.0 F1.1 I0.1"));
  EXPECT_THAT(text, HasSubstr("I input half and W weight half of the backward, F3.1 micro-batch 3 "
                              "of chunk 1"));
}

TEST(DrawTimeline, KeepsToItsWidthAndLength) {
  const std::string text = draw(build("1f1b", 16, 64), 100);
  std::istringstream lines(text);
  size_t rows = 0, bands = 0;
  for (std::string line; std::getline(lines, line);) {
    EXPECT_LE(line.size(), 100u) << line;
    ++rows;
    if (line.rfind("    time |", 0) == 0) ++bands;
  }
  EXPECT_EQ(bands, 4u);
  EXPECT_LE(rows, 4u * 17 + 3);
  EXPECT_THAT(text, HasSubstr("columns left out"));
  EXPECT_THAT(text, HasSubstr("B63"));
  EXPECT_EQ(count(draw(build("1f1b", 4, 8), 40), "rank 3"), 4u);
}

TEST(DrawTimeline, DurationsNeedNotBeMultiples) {
  // The unit is the shortest computation, 1; a forward of 1.6 fills two columns for the most part.
  const std::string text =
      draw(build("gpipe", 1, 1), 120, {.forward = {1.6}, .backward_input = {0}});
  EXPECT_THAT(text, HasSubstr("  rank 0 | F0 -- B0\n"));
  // Far apart durations do not make the drawing endless.
  EXPECT_LT(draw(build("gpipe", 1, 1), 120, {.forward = {1e-9}}).size(), 2000u);
  EXPECT_EQ(draw(build("gpipe", 2, 2), 120,
                 {.forward = {0}, .backward_input = {0}, .backward_weight = {0}}),
            "nothing takes time\n");
}

TEST(DrawTimeline, RefusesATimelineOfAnotherSchedule) {
  const Schedule two = build("gpipe", 2, 2), three = build("gpipe", 3, 2);
  EXPECT_THROW((void)draw_timeline(two, simulate_schedule(three, {})), InternalError);
  EXPECT_THROW((void)draw_timeline_svg(two, simulate_schedule(three, {})), InternalError);
}

TEST(DrawTimelineSvg, HasABarPerComputationAndALegend) {
  const Schedule schedule = build("1f1b", 8, 16);
  const std::string svg = draw_timeline_svg(schedule, simulate_schedule(schedule, {}));
  EXPECT_EQ(svg.rfind("<svg xmlns=\"http://www.w3.org/2000/svg\"", 0), 0u);
  EXPECT_EQ(count(svg, "<title>"), 8u * 16 * 2);
  EXPECT_EQ(count(svg, ">F15<"), 8u);  // every label has room
  EXPECT_EQ(count(svg, ">B15<"), 8u);
  EXPECT_THAT(svg, HasSubstr(">F forward</text>"));
  EXPECT_THAT(svg, HasSubstr(">B backward</text>"));
  EXPECT_THAT(svg, HasSubstr(">idle</text>"));
  EXPECT_THAT(svg, HasSubstr("8 pipeline ranks, 8 stages, 16 micro-batches, idle 30.4 %"));
  EXPECT_THAT(svg, Not(HasSubstr("weight half")));
  for (const char* outside : {"href", "<script", "url("}) EXPECT_THAT(svg, Not(HasSubstr(outside)));
}

TEST(DrawTimelineSvg, IsWellFormed) {
  Schedule schedule = build("zero_bubble", 4, 8, 2);
  schedule.name = "own <kind> & more";
  const std::string svg = draw_timeline_svg(schedule, simulate_schedule(schedule, {}));
  EXPECT_THAT(svg, HasSubstr("own &lt;kind&gt; &amp; more"));
  std::vector<std::string> open;
  const std::regex tag("<(/?)([a-z]+)([^<>]*)>");
  size_t tags = 0;
  for (std::sregex_iterator it(svg.begin(), svg.end(), tag), end; it != end; ++it, ++tags) {
    if ((*it)[1] == "/") {
      ASSERT_FALSE(open.empty());
      ASSERT_EQ(open.back(), (*it)[2]);
      open.pop_back();
    } else if ((*it)[3].str().empty() || (*it)[3].str().back() != '/') {
      open.push_back((*it)[2]);
    }
  }
  EXPECT_TRUE(open.empty());
  EXPECT_EQ(tags, count(svg, "<"));
  EXPECT_THAT(svg, HasSubstr("chunk 1</text>"));
}

TEST(DrawTimelineSvg, LongStepsStayWithinAWidthThatCanBeShown) {
  const Schedule schedule = build("zero_bubble", 16, 512, 2);
  const std::string svg = draw_timeline_svg(schedule, simulate_schedule(schedule, {}));
  EXPECT_THAT(svg, HasSubstr("width=\"16086\""));
  EXPECT_EQ(count(svg, ">F511.1<"), 0u);  // no room: only in the tooltip
  EXPECT_THAT(svg, HasSubstr("<title>F511.1, stage 31"));
}

}  // namespace
}  // namespace capstan::plan
