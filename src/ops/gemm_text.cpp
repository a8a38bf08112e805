// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Choices as text: a line that names the format, one for what they were measured on, and one for
// each of them: A, B, D (type, rows, columns, leading), flags, microseconds, algorithm.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <sstream>

#include "capstan/base/error.h"
#include "capstan/ops/gemm.h"

namespace capstan::ops {
namespace {

constexpr const char* kFormat = "capstan products 2";

std::string text_of(const LtMatrix& m) {
  return fmt::format("{} {} {} {}", static_cast<int>(m.type), m.rows, m.columns, m.leading);
}

std::string text_of(const LtProblem& p) {
  return fmt::format("{} {} {} {:d} {:d} {:d} {} {} {}", text_of(p.a), text_of(p.b), text_of(p.d),
                     p.a_transposed, p.b_transposed, p.accumulates, static_cast<int>(p.epilogue),
                     static_cast<int>(p.scale), p.alignment);
}

[[noreturn]] void refuse(const std::string& got) {
  throw ConfigError(ErrorText{.module = "ops",
                              .what = "reading choices of products",
                              .got = got,
                              .need = std::string("a file that begins with '") + kFormat + "'",
                              .fix = "Remove the file: products are measured anew"});
}

template <class Enum>
bool read(std::istream& in, Enum& value, Enum last) {
  int number = -1;
  in >> number;
  value = static_cast<Enum>(number);
  return number >= 0 && number <= static_cast<int>(last);
}

bool read(std::istream& in, LtMatrix& m) {
  return read(in, m.type, LtType::kE5m2) && (in >> m.rows >> m.columns >> m.leading) &&
         m.rows > 0 && m.columns > 0 && m.leading >= m.rows;
}

bool read(std::istream& in, LtProblem& p) {
  return read(in, p.a) && read(in, p.b) && read(in, p.d) &&
         (in >> p.a_transposed >> p.b_transposed >> p.accumulates) &&
         read(in, p.epilogue, LtEpilogue::kBiasGradient) && read(in, p.scale, LtScale::kRow) &&
         static_cast<bool>(in >> p.alignment);
}

bool read(std::istream& in, GemmChoice& choice) {
  bool has_algorithm = false;
  if (!read(in, choice.problem) || !(in >> choice.us >> choice.rival_us >> has_algorithm))
    return false;
  if (!has_algorithm) return true;
  LtAlgorithm algorithm;
  in >> algorithm.workspace_bytes >> std::hex;
  for (uint64_t& word : algorithm.bits) in >> word;
  choice.algorithm = algorithm;
  return static_cast<bool>(in) && algorithm.workspace_bytes >= 0;
}

}  // namespace

std::string text_of(const std::vector<GemmChoice>& choices, const std::string& identity) {
  std::string text = fmt::format("{}\n{}\n", kFormat, identity);
  for (const GemmChoice& c : choices) {
    text += fmt::format("{} {:.3f} {:.3f} {:d}", text_of(c.problem), c.us, c.rival_us,
                        c.algorithm.has_value());
    if (c.algorithm)
      text +=
          fmt::format(" {} {:x}", c.algorithm->workspace_bytes, fmt::join(c.algorithm->bits, " "));
    text += '\n';
  }
  return text;
}

std::vector<GemmChoice> parse_choices(const std::string& text, const std::string& identity) {
  std::istringstream lines(text);
  std::string line;
  if (!std::getline(lines, line) || line != kFormat) refuse("'" + line.substr(0, 80) + "'");
  if (!std::getline(lines, line) || line != identity) return {};
  std::vector<GemmChoice> choices;
  for (int number = 3; std::getline(lines, line); ++number) {
    std::istringstream in(line);
    GemmChoice choice;
    std::string rest;
    if (!read(in, choice) || in >> rest) refuse(fmt::format("a broken line {}", number));
    choices.push_back(choice);
  }
  return choices;
}

}  // namespace capstan::ops
