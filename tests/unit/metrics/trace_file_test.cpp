// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/metrics/trace_file.h"

#include <gtest/gtest.h>

#include <fstream>
#include <map>
#include <thread>

#include "capstan/base/json.h"
#include "capstan/base/log.h"
#include "unit/metrics/temporary_folder.h"

namespace capstan::metrics {
namespace {

using json::Json;
using TraceFile = TemporaryFolder;

std::vector<Json> spans_of(const Path& path) {
  std::vector<Json> spans;
  const Json file = json::parse(read_file(path), "trace");
  for (const Json& event : file["traceEvents"]) {
    if (event["ph"] == "X") spans.push_back(event);
  }
  return spans;
}

TEST_F(TraceFile, OneFilePerRank_WithNestedSpansInOrder) {
  TraceCollector collector;
  trace::set_sink(&collector);
  const auto work = [](int rank) {
    log::set_thread_rank(rank);
    const trace::Span step("compute", "step \"1\"");
    const trace::Span reduce("comm", "all_reduce");
  };
  std::thread(work, 0).join();
  std::thread(work, 1).join();
  { const trace::Span span("data", "no rank"); }
  trace::set_sink(nullptr);
  EXPECT_EQ(collector.size(), 5);
  const std::vector<Path> files = collector.write(folder_, 100, 1);
  ASSERT_EQ(files.size(), 2u);
  EXPECT_EQ(files[0], folder_ / "trace" / "step-00000100.rank-0.json");
  EXPECT_EQ(files[1], folder_ / "trace" / "step-00000100.rank-1.json");
  const std::vector<Json> spans = spans_of(files[0]);
  ASSERT_EQ(spans.size(), 2u);
  EXPECT_EQ(spans[0]["name"], "step \"1\"") << "the outer span first";
  EXPECT_EQ(spans[0]["cat"], "compute");
  EXPECT_EQ(spans[1]["cat"], "comm");
  EXPECT_EQ(spans[1]["pid"], 0);
  EXPECT_EQ(spans[0]["tid"], spans[1]["tid"]);
  EXPECT_LE(spans[0]["ts"].get<double>(), spans[1]["ts"].get<double>());
  EXPECT_EQ(spans_of(files[1]).size(), 3u) << "the span without a rank goes to the default";
  EXPECT_TRUE(collector.write(folder_, 101, 0).empty()) << "spans are written once";
}

TEST_F(TraceFile, Times_AreMicrosecondsWithNanoseconds) {
  TraceCollector collector;
  collector.add({"late", "compute", 0, 5, 2000001, 2000001});
  collector.add({"early", "compute", 0, 5, 1234567, 2234570});
  const std::vector<Path> files = collector.write(folder_, 1, 0);
  ASSERT_EQ(files.size(), 1u);
  const std::string text = read_file(files[0]);
  EXPECT_NE(text.find("\"ts\":1234.567,\"dur\":1000.003,"), std::string::npos) << text;
  EXPECT_EQ(spans_of(files[0])[0]["name"], "early");
}

TEST_F(TraceFile, Limit_CountsTheRest) {
  TraceCollector collector(3);
  for (int i = 0; i < 10; ++i) collector.add({"x", "compute", 0, 1, i, i + 1});
  EXPECT_EQ(collector.size(), 3);
  EXPECT_EQ(collector.dropped(), 7);
}

TEST_F(TraceFile, FailureToWrite_IsNoException) {
  std::ofstream(folder_ / "trace") << "a file in the place of the folder";
  TraceCollector collector;
  collector.add({"x", "compute", 0, 1, 0, 1});
  log::set_level(log::Level::kOff);
  EXPECT_TRUE(collector.write(folder_, 1, 0).empty());
  log::set_level(log::Level::kInfo);
}

}  // namespace
}  // namespace capstan::metrics
