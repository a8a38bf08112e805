// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// A timeline as a self-contained SVG file.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <set>

#include "capstan/base/check.h"
#include "plan/schedule_internal.h"

namespace capstan::plan {
namespace {

using schedules::compute_label;
using schedules::is_compute;

constexpr double kLeft = 70, kTop = 64, kRight = 16, kRow = 30, kBar = 24, kFoot = 28;
constexpr double kDigit = 6.2;  // width of a character at 10 pixels

struct Colour {
  Op op;
  const char* meaning;
  const char* even;  // chunks 0, 2, ...
  const char* odd;
};
constexpr Colour kColours[] = {
    {Op::kForward, "forward", "#9ec5fe", "#cfe2ff"},
    {Op::kBackward, "backward", "#a3cfbb", "#d1e7dd"},
    {Op::kBackwardInput, "backward, input half", "#a6e9d5", "#d2f4ea"},
    {Op::kBackwardWeight, "backward, weight half", "#feb272", "#ffe5d0"},
};
const Colour& colour_of(Op op) {
  return *std::find_if(std::begin(kColours), std::end(kColours),
                       [&](const Colour& colour) { return colour.op == op; });
}

class Drawing {
 public:
  Drawing(const Schedule& schedule, const Timeline& timeline)
      : schedule_(schedule), timeline_(timeline) {
    double shortest = timeline.makespan;
    for_each_computation([&](size_t, const Instruction& i, const Span& span) {
      if (span.end > span.start) shortest = std::min(shortest, span.end - span.start);
      label_size_ = std::max(label_size_, label_of(0, i).size());
      ops_.insert(i.op);
      chunks_ = std::max(chunks_, i.chunk + 1);
    });
    // Wide enough for every label, unless the file would become wider than screens scroll.
    const double wish = static_cast<double>(label_size_) * kDigit + 4;
    constexpr double kMostPixels = 16000;
    scale_ = timeline.makespan > 0
                 ? std::min(std::max(wish, 14.0) / shortest, kMostPixels / timeline.makespan)
                 : 0;
  }

  std::string draw() {
    const double width = std::max(kLeft + timeline_.makespan * scale_ + kRight, 800.0);
    const double height = kTop + kRow * static_cast<double>(schedule_.ranks.size()) + kFoot;
    text_ = fmt::format(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{0:.0f}\" height=\"{1:.0f}\" "
        "viewBox=\"0 0 {0:.0f} {1:.0f}\" font-family=\"Helvetica, Arial, sans-serif\" "
        "font-size=\"10\">\n",
        width, height);
    text_ +=
        fmt::format("<rect width=\"{:.0f}\" height=\"{:.0f}\" fill=\"#ffffff\"/>\n", width, height);
    draw_title();
    draw_legend();
    draw_rows();
    for_each_computation(
        [&](size_t rank, const Instruction& i, const Span& span) { draw_bar(rank, i, span); });
    draw_axis();
    return text_ + "</svg>\n";
  }

 private:
  template <class Visit>
  void for_each_computation(Visit visit) const {
    for (size_t rank = 0; rank < schedule_.ranks.size(); ++rank)
      for (size_t i = 0; i < schedule_.ranks[rank].size(); ++i)
        if (is_compute(schedule_.ranks[rank][i].op))
          visit(rank, schedule_.ranks[rank][i], timeline_.spans[rank][i]);
  }
  [[nodiscard]] std::string label_of(size_t rank, const Instruction& i) const {
    return compute_label(i, schedule_.stage_of[rank].size() > 1);
  }
  [[nodiscard]] double x(double time) const { return kLeft + time * scale_; }
  [[nodiscard]] static double y(size_t rank) { return kTop + kRow * static_cast<double>(rank); }

  void draw_title() {
    double idle = 0;
    for (const double bubble : timeline_.bubble)
      idle += bubble / static_cast<double>(timeline_.bubble.size());
    std::string name;  // kinds of users may carry any name
    for (const char c : schedule_.name)
      name += c == '<' ? "&lt;" : c == '&' ? "&amp;" : c == '>' ? "&gt;" : std::string(1, c);
    text_ += fmt::format(
        "<text x=\"12\" y=\"20\" font-size=\"14\" font-weight=\"bold\">{}: {} pipeline ranks, {} "
        "stages, {} micro-batches, idle {:.1f} %</text>\n",
        name, schedule_.ranks.size(), schedule_.stages, schedule_.micro_batches, 100 * idle);
  }

  void draw_legend() {
    double at = 12;
    const auto add = [&](const char* fill, const std::string& meaning) {
      text_ += fmt::format(
          "<rect x=\"{:.1f}\" y=\"32\" width=\"14\" height=\"14\" fill=\"{}\" "
          "stroke=\"#495057\" stroke-width=\"0.5\"/>\n<text x=\"{:.1f}\" y=\"43\" "
          "font-size=\"11\">{}</text>\n",
          at, fill, at + 19, meaning);
      at += 40 + 6.0 * static_cast<double>(meaning.size());
    };
    for (const Colour& colour : kColours) {
      if (!ops_.contains(colour.op)) continue;
      const std::string letter(1, compute_label({colour.op}, false).front());
      add(colour.even, letter + " " + colour.meaning);
      if (chunks_ > 1) add(colour.odd, chunks_ > 2 ? "odd chunks" : "chunk 1");
    }
    add("#f1f3f5", "idle");
  }

  void draw_rows() {
    for (size_t rank = 0; rank < schedule_.ranks.size(); ++rank)
      text_ += fmt::format(
          "<text x=\"12\" y=\"{:.1f}\" font-size=\"12\">rank {}</text>\n<rect x=\"{:.1f}\" "
          "y=\"{:.1f}\" width=\"{:.1f}\" height=\"{:.0f}\" fill=\"#f1f3f5\"/>\n",
          y(rank) + 16, rank, kLeft, y(rank), timeline_.makespan * scale_, kBar);
  }

  void draw_bar(size_t rank, const Instruction& i, const Span& span) {
    const double width = (span.end - span.start) * scale_;
    const std::string label = label_of(rank, i);
    const Colour& colour = colour_of(i.op);
    text_ += fmt::format(
        "<rect x=\"{:.1f}\" y=\"{:.1f}\" width=\"{:.1f}\" height=\"{:.0f}\" fill=\"{}\" "
        "stroke=\"#495057\" stroke-width=\"0.5\"><title>{}, stage {}: {:g} to "
        "{:g}</title></rect>\n",
        x(span.start), y(rank), width, kBar, i.chunk % 2 == 0 ? colour.even : colour.odd, label,
        schedule_.stage_of[rank][static_cast<size_t>(i.chunk)], span.start, span.end);
    if (width >= static_cast<double>(label.size()) * kDigit)
      text_ += fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" text-anchor=\"middle\">{}</text>\n",
                           x((span.start + span.end) / 2), y(rank) + 16, label);
  }

  // About one mark per 100 pixels, at 1, 2 or 5 times a power of ten.
  void draw_axis() {
    if (scale_ <= 0) return;
    const double wish = 100 / scale_, power = std::pow(10, std::floor(std::log10(wish)));
    const double step = power * (wish / power < 2 ? 1 : wish / power < 5 ? 2 : 5);
    const double base = y(schedule_.ranks.size());
    for (int k = 0; k * step <= timeline_.makespan * (1 + 1e-9); ++k)
      text_ += fmt::format(
          "<line x1=\"{0:.1f}\" y1=\"{1:.1f}\" x2=\"{0:.1f}\" y2=\"{2:.1f}\" "
          "stroke=\"#868e96\"/>\n<text x=\"{0:.1f}\" y=\"{3:.1f}\" "
          "text-anchor=\"middle\">{4:g}</text>\n",
          x(k * step), base - 4, base, base + 12, k * step);
  }

  const Schedule& schedule_;
  const Timeline& timeline_;
  std::set<Op> ops_;
  int chunks_ = 1;
  size_t label_size_ = 2;
  double scale_ = 0;  // pixels per unit of time
  std::string text_;
};

}  // namespace

std::string draw_timeline_svg(const Schedule& schedule, const Timeline& timeline) {
  CAPSTAN_CHECK(timeline.spans.size() == schedule.ranks.size() && !schedule.ranks.empty(),
                "a timeline of {} ranks for a schedule of {}", timeline.spans.size(),
                schedule.ranks.size());
  return Drawing(schedule, timeline).draw();
}

}  // namespace capstan::plan
