// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Schedules as text: lists of instructions, and time lines.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "capstan/base/check.h"
#include "capstan/base/text.h"
#include "plan/schedule_internal.h"

namespace capstan::plan {
namespace {

using schedules::compute_label;
using schedules::is_compute;

std::string list_word(const Instruction& i, bool chunked) {
  switch (i.op) {
    case Op::kSendActivation:
      return fmt::format(">{}", i.peer);
    case Op::kReceiveActivation:
      return fmt::format("{}>", i.peer);
    case Op::kSendGradient:
      return fmt::format("<{}", i.peer);
    case Op::kReceiveGradient:
      return fmt::format("{}<", i.peer);
    case Op::kReduce:
      return chunked ? fmt::format("reduce.{}", i.chunk) : "reduce";
    case Op::kStep:
      return "step";
    default:
      return compute_label(i, chunked);
  }
}

// The words of one pipeline rank, one per unit of time.
using Row = std::vector<std::string>;

// The shortest computation, but no more columns than anybody reads.
double unit_of_time(const Schedule& schedule, const Timeline& timeline) {
  constexpr double kMostColumns = 20000;
  double shortest = timeline.makespan;
  for (size_t rank = 0; rank < schedule.ranks.size(); ++rank)
    for (size_t i = 0; i < schedule.ranks[rank].size(); ++i) {
      const Span& span = timeline.spans[rank][i];
      if (is_compute(schedule.ranks[rank][i].op) && span.end > span.start)
        shortest = std::min(shortest, span.end - span.start);
    }
  return std::max(shortest, timeline.makespan / kMostColumns);
}

// A column names the computation that fills most of it, so that durations which are no multiples of
// the unit stay readable.
Row timeline_row(const Schedule& schedule, const Timeline& timeline, size_t rank, double unit) {
  const auto columns = static_cast<size_t>(std::ceil(timeline.makespan / unit - 1e-6));
  Row row(columns, "..");
  std::vector<double> filled(columns, unit / 2 * (1 - 1e-9));  // less than half counts as idle
  for (size_t i = 0; i < schedule.ranks[rank].size(); ++i) {
    const Instruction& work = schedule.ranks[rank][i];
    if (!is_compute(work.op)) continue;
    const Span& span = timeline.spans[rank][i];
    std::string word = compute_label(work, schedule.stage_of[rank].size() > 1);
    for (auto c = static_cast<size_t>(span.start / unit); c < columns; ++c) {
      const double begin = static_cast<double>(c) * unit;
      if (begin >= span.end) break;
      const double part = std::min(span.end, begin + unit) - std::max(span.start, begin);
      if (part <= filled[c]) continue;
      filled[c] = part;
      row[c] = word;
      word = "--";
    }
  }
  return row;
}

// Columns [begin, end) of all rows below a ruler with the time of every fifth column.
std::string draw_band(const std::vector<Row>& rows, size_t begin, size_t end, size_t width) {
  std::string text = fmt::format("{:>8} |", "time");
  for (size_t c = begin; c < end; c += 5)
    text += fmt::format(" {:<{}}", c, (width + 1) * std::min<size_t>(5, end - c) - 1);
  text.erase(text.find_last_not_of(' ') + 1);
  text += "\n";
  for (size_t rank = 0; rank < rows.size(); ++rank) {
    std::string line = fmt::format("{:>8} |", fmt::format("rank {}", rank));
    for (size_t c = begin; c < end; ++c) line += fmt::format(" {:<{}}", rows[rank][c], width);
    line.erase(line.find_last_not_of(' ') + 1);
    text += line + "\n";
  }
  return text;
}

std::string draw_bands(const std::vector<Row>& rows, int columns) {
  constexpr size_t kMostBands = 4;
  size_t width = 2;
  for (const Row& row : rows)
    for (const std::string& word : row) width = std::max(width, word.size());
  const size_t total = rows.front().size();
  const size_t room = static_cast<size_t>(std::max(columns, 40)) - 10;
  const size_t per_band = std::max<size_t>(room / (width + 1), 1);
  const size_t bands = (total + per_band - 1) / per_band;
  std::string text;
  for (size_t band = 0; band < bands; ++band) {
    const size_t begin = band * per_band;
    if (bands > kMostBands && band == kMostBands / 2) {
      band = bands - kMostBands / 2;
      text += fmt::format("     ... | {} columns left out\n", band * per_band - begin);
    }
    text += draw_band(rows, band * per_band, std::min(total, (band + 1) * per_band), width);
  }
  return text;
}

std::string legend(const Schedule& schedule) {
  std::string text = "F forward";
  bool full = false, split = false, chunked = false;
  for (size_t rank = 0; rank < schedule.ranks.size(); ++rank) {
    chunked = chunked || schedule.stage_of[rank].size() > 1;
    for (const Instruction& i : schedule.ranks[rank]) {
      full = full || i.op == Op::kBackward;
      split = split || i.op == Op::kBackwardInput;
    }
  }
  if (full) text += ", B backward";
  if (split) text += ", I input half and W weight half of the backward";
  text += chunked ? ", F3.1 micro-batch 3 of chunk 1" : ", F3 micro-batch 3";
  return text + ", -- goes on, .. idle\n";
}

}  // namespace

std::string schedules::compute_label(const Instruction& instruction, bool chunked) {
  const char* letter = "?";
  if (instruction.op == Op::kForward) letter = "F";
  if (instruction.op == Op::kBackward) letter = "B";
  if (instruction.op == Op::kBackwardInput) letter = "I";
  if (instruction.op == Op::kBackwardWeight) letter = "W";
  return chunked ? fmt::format("{}{}.{}", letter, instruction.micro_batch, instruction.chunk)
                 : fmt::format("{}{}", letter, instruction.micro_batch);
}

std::string draw_schedule(const Schedule& schedule, int columns) {
  std::string text;
  for (size_t rank = 0; rank < schedule.ranks.size(); ++rank) {
    const bool chunked = schedule.stage_of[rank].size() > 1;
    std::vector<std::string> words;
    for (const Instruction& i : schedule.ranks[rank]) words.push_back(list_word(i, chunked));
    std::string line = join(words, " ");
    const auto room = static_cast<size_t>(std::max(columns, 40));
    if (line.size() > room) {
      const size_t head = line.rfind(' ', room / 2),
                   tail = line.find(' ', line.size() - room / 2 + 5);
      line = line.substr(0, head) + " ..." + line.substr(tail);
    }
    text += fmt::format("rank {} | {}\n", rank, line);
  }
  return text;
}

std::string draw_timeline(const Schedule& schedule, const Timeline& timeline, int columns) {
  CAPSTAN_CHECK(timeline.spans.size() == schedule.ranks.size() && !schedule.ranks.empty(),
                "a timeline of {} ranks for a schedule of {}", timeline.spans.size(),
                schedule.ranks.size());
  const double unit = unit_of_time(schedule, timeline);
  if (unit <= 0) return "nothing takes time\n";
  std::vector<Row> rows;
  for (size_t rank = 0; rank < schedule.ranks.size(); ++rank)
    rows.push_back(timeline_row(schedule, timeline, rank, unit));
  std::string text = draw_bands(rows, columns) + legend(schedule);
  const auto [least, most] = std::minmax_element(timeline.bubble.begin(), timeline.bubble.end());
  text += fmt::format("{:g} units of time, ranks idle for ", timeline.makespan / unit);
  text += *most - *least < 5e-4 ? fmt::format("{:.1f} %\n", 100 * *most)
                                : fmt::format("{:.1f} to {:.1f} %\n", 100 * *least, 100 * *most);
  return text;
}

}  // namespace capstan::plan
