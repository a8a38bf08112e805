// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/base/log.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <thread>
#include <vector>

#include "capstan/base/check.h"
#include "capstan/base/error.h"
#include "capstan/base/trace.h"

namespace capstan {
namespace {

using testing::HasSubstr;
using testing::MatchesRegex;

constexpr const char* kTime = "\\[[0-9]{2}:[0-9]{2}:[0-9]{2}\\.[0-9]{3}\\] ";

template <class Function>
std::string logged(Function&& function) {
  testing::internal::CaptureStderr();
  function();
  return testing::internal::GetCapturedStderr();
}

TEST(Log, Line_HasTimeRankModule) {
  log::set_thread_rank(3);
  EXPECT_THAT(logged([] { log::info("data", "{} rows", 5); }),
              MatchesRegex(std::string(kTime) + "\\[rank 3\\] \\[data\\] 5 rows\n"));
  log::set_thread_rank(-1);
  EXPECT_THAT(logged([] { log::warning("data", "late"); }),
              MatchesRegex(std::string(kTime) + "\\[data\\] warning: late\n"));
  EXPECT_THAT(logged([] { log::error("data", "bad"); }), HasSubstr("[data] error: bad\n"));
}

TEST(Log, Rank_IsPerThreadOverPerProcess) {
  log::set_process_rank(1);
  log::set_thread_rank(2);
  const std::string text = logged([] {
    std::thread([] { log::info("x", "helper"); }).join();
    log::info("x", "main");
  });
  log::set_thread_rank(-1);
  log::set_process_rank(-1);
  EXPECT_THAT(text, HasSubstr("[rank 1] [x] helper"));
  EXPECT_THAT(text, HasSubstr("[rank 2] [x] main"));
  EXPECT_EQ(log::thread_rank(), -1);
}

TEST(Log, Level_FiltersAndIsParsed) {
  EXPECT_EQ(log::parse_level("warning"), log::Level::kWarning);
  EXPECT_EQ(log::parse_level("off"), log::Level::kOff);
  EXPECT_THROW((void)log::parse_level("loud"), ConfigError);
  log::set_level(log::Level::kWarning);
  EXPECT_EQ(logged([] { log::info("x", "hidden"); }), "");
  EXPECT_THAT(logged([] { log::warning("x", "shown"); }), HasSubstr("shown"));
  log::set_level(log::Level::kOff);
  EXPECT_EQ(logged([] { log::error("x", "hidden"); }), "");
  log::set_level(log::Level::kInfo);
  EXPECT_EQ(logged([] { log::debug("x", "hidden"); }), "");
}

struct Seen {
  std::vector<std::string> lines;
  static void add(void* context, log::Level level, std::string_view module, std::string_view text) {
    static_cast<Seen*>(context)->lines.push_back(
        fmt::format("{} {} {}", static_cast<int>(level), module, text));
    log::warning("observer", "from inside");  // must not come back here
  }
};

TEST(Log, Observer_GetsWarningsAndErrorsEvenWhenHidden) {
  Seen seen;
  log::set_observer(&Seen::add, &seen);
  (void)logged([] {
    log::info("x", "not seen");
    log::warning("x", "w {}", 1);
    log::set_level(log::Level::kOff);
    log::error("x", "e");
    log::set_level(log::Level::kInfo);
  });
  log::set_observer(nullptr, nullptr);
  (void)logged([] { log::warning("x", "after"); });
  EXPECT_THAT(seen.lines, testing::ElementsAre("2 x w 1", "3 x e"));
}

TEST(Check, LogOnly_DoesNotThrow) {
  const std::string text = logged([] { CAPSTAN_CHECK_LOG_ONLY(1 == 2, "number {}", 5); });
  EXPECT_THAT(text, HasSubstr("error: check '1 == 2' failed"));
  EXPECT_THAT(text, HasSubstr("number 5"));
}

struct Collector : trace::Sink {
  void add(trace::Event event) override { events.push_back(std::move(event)); }
  std::vector<trace::Event> events;
};

TEST(Trace, Spans_GoToTheSinkWithTheirRank) {
  { const trace::Span span("compute", "nobody listens"); }
  Collector collector;
  trace::set_sink(&collector);
  EXPECT_TRUE(trace::is_on());
  log::set_thread_rank(4);
  {
    const trace::Span outer("compute", "outer");
    const trace::Span inner("comm", std::string("inner"));
  }
  log::set_thread_rank(-1);
  trace::set_sink(nullptr);
  EXPECT_FALSE(trace::is_on());
  { const trace::Span span("compute", "nobody listens"); }
  ASSERT_EQ(collector.events.size(), 2u);
  const trace::Event &inner = collector.events[0], &outer = collector.events[1];
  EXPECT_EQ(inner.name, "inner");
  EXPECT_STREQ(inner.category, "comm");
  EXPECT_EQ(inner.rank, 4);
  EXPECT_EQ(inner.thread, outer.thread);
  EXPECT_LE(outer.begin_ns, inner.begin_ns);
  EXPECT_LE(inner.begin_ns, inner.end_ns);
  EXPECT_LE(inner.end_ns, outer.end_ns);
}

}  // namespace
}  // namespace capstan
