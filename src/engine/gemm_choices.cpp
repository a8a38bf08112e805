// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "engine/gemm_choices_internal.h"

#include <c10/util/Exception.h>

#include <chrono>
#include <filesystem>
#include <set>

#include "capstan/base/error.h"
#include "capstan/base/log.h"
#include "capstan/comm/gather_text.h"

namespace capstan::engine {
namespace {

using Clock = std::chrono::steady_clock;

std::string time_text(const ops::LtProblem& problem, double us) {
  return fmt::format("{:.1f} us ({:.0f} TFLOP/s)", us, ops::flops_of(problem) / us * 1e-6);
}

void log_choice(const ops::GemmChoice& c) {
  const std::string shape = ops::shape_text(c.problem);
  const char* const rival = ops::is_fused(c.problem) ? "in parts" : "LibTorch";
  if (c.us == 0)
    return log::info("engine", "product {}: {}, cuBLASLt has no algorithm", shape, rival);
  const std::string lt = time_text(c.problem, c.us);
  if (c.rival_us == 0) return log::info("engine", "product {}: cuBLASLt {}", shape, lt);
  const std::string other = time_text(c.problem, c.rival_us);
  if (c.algorithm)
    log::info("engine", "product {}: cuBLASLt {}, {} {}", shape, lt, rival, other);
  else
    log::info("engine", "product {}: {} {}, cuBLASLt {}", shape, rival, other, lt);
}

// Empty where there is nothing to go by: broken and foreign files cost a measurement, no more.
std::string read_choices(const Path& file, const std::string& identity) {
  if (file.empty() || !std::filesystem::exists(file)) return "";
  try {
    std::string text = read_file(file);
    if (!ops::parse_choices(text, identity).empty()) return text;
    log::info("engine", "{} is of another GPU, driver or cuBLASLt: products are measured anew",
              file.string());
  } catch (const Error& error) {
    log::warning("engine", "{}: {}", file.string(), error.what());
  }
  return "";
}

// The same on all ranks. Those with another GPU than rank 0 ask for nothing.
std::vector<ops::LtProblem> wanted_by(const std::vector<std::string>& texts,
                                      const std::string& identity) {
  std::set<ops::LtProblem> wanted;
  for (const std::string& text : texts)
    for (const ops::GemmChoice& c : ops::parse_choices(text, identity)) wanted.insert(c.problem);
  return {wanted.begin(), wanted.end()};
}

}  // namespace

std::unique_ptr<GemmChoices> GemmChoices::make(const recipe::Run& run,
                                               const comm::Communicator& world, Path file) {
  const bool is_auto = run.gemm == "auto";
  if (run.gemm == "libtorch" || (is_auto && !ops::installed_lt_api())) return nullptr;
  return std::make_unique<GemmChoices>(
      ops::Gemm::share(is_auto ? ops::GemmLibrary::kAuto : ops::GemmLibrary::kCublaslt),
      !run.deterministic, world, std::move(file));
}

GemmChoices::GemmChoices(std::shared_ptr<ops::Gemm> gemm, bool measures, comm::Communicator world,
                         Path file)
    : gemm_(std::move(gemm)),
      measures_(measures),
      world_(std::move(world)),
      file_(std::move(file)) {}

void GemmChoices::before_step() {
  if (!measures_ || steps_ > 1) return;
  if (++steps_ == 1) return read();
  measure();
  gemm_->close();
}

void GemmChoices::read() {
  const std::string mine = world_.rank() == 0 ? read_choices(file_, gemm_->identity()) : "";
  const std::string text = comm::gather_text(world_, mine).front();
  if (!text.empty()) take(text);
}

void GemmChoices::take(const std::string& text) {
  const auto choices = ops::parse_choices(text, gemm_->identity());
  const int64_t kept = gemm_->adopt(choices);
  if (kept < static_cast<int64_t>(choices.size()))
    log::info("engine", "{} of {} choices of products are not for this GPU and run.gemm",
              static_cast<int64_t>(choices.size()) - kept, choices.size());
}

void GemmChoices::measure() {
  std::vector<ops::GemmChoice> mine;
  for (const ops::LtProblem& problem : gemm_->unmeasured())
    mine.push_back({.problem = problem, .algorithm = std::nullopt});
  const std::string identity = comm::gather_text(world_, gemm_->identity()).front();
  if (identity != gemm_->identity())
    log::warning("engine", "rank 0 has '{}', this rank '{}': its products are not measured",
                 identity, gemm_->identity());
  const auto texts = comm::gather_text(world_, ops::text_of(mine, gemm_->identity()));
  const std::vector<ops::LtProblem> wanted = wanted_by(texts, identity);
  if (wanted.empty()) return;
  std::string text;
  if (world_.rank() == 0) text = ops::text_of(measured(wanted), gemm_->identity());
  take(comm::gather_text(world_, text).front());
  if (world_.rank() == 0 && !file_.empty())
    write_file_atomic(file_, ops::text_of(gemm_->choices(), gemm_->identity()));
}

std::vector<ops::GemmChoice> GemmChoices::measured(
    const std::vector<ops::LtProblem>& wanted) const {
  const auto start = Clock::now();
  std::vector<ops::GemmChoice> choices;
  int64_t by_lt = 0;
  for (const ops::LtProblem& problem : wanted) {
    try {
      choices.push_back(gemm_->measure(problem));
    } catch (const c10::OutOfMemoryError&) {
      log::warning("engine", "product {}: no memory left to measure it, it stays as it was",
                   ops::shape_text(problem));
      continue;
    }
    log_choice(choices.back());
    by_lt += choices.back().algorithm.has_value();
  }
  log::info("engine", "{} products measured in {:.1f} s: {} by cuBLASLt, {} not", choices.size(),
            std::chrono::duration<double>(Clock::now() - start).count(), by_lt,
            static_cast<int64_t>(choices.size()) - by_lt);
  return choices;
}

}  // namespace capstan::engine
