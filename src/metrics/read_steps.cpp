// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <cmath>
#include <fstream>
#include <limits>

#include "capstan/base/json.h"
#include "capstan/metrics/metrics_file.h"

namespace capstan::metrics {

namespace {

using json::Json;

double number_of(const Json& line, const char* key) {
  const auto found = line.find(key);
  const bool has = found != line.end() && found->is_number();
  return has ? found->get<double>() : std::numeric_limits<double>::quiet_NaN();
}

int64_t integer_of(const Json& line, const char* key) {
  const auto found = line.find(key);
  return found != line.end() && found->is_number_integer() ? found->get<int64_t>() : 0;
}

std::optional<double> maybe_number(const Json& line, const char* key) {
  const double value = number_of(line, key);
  return std::isnan(value) ? std::nullopt : std::optional(value);
}

StepRecord step_of(const Json& line) {
  StepRecord record{.attempt = static_cast<int>(integer_of(line, "attempt")),
                    .step = integer_of(line, "step"),
                    .tokens = integer_of(line, "tokens"),
                    .samples = integer_of(line, "samples"),
                    .loss = number_of(line, "loss"),
                    .grad_norm = number_of(line, "grad_norm"),
                    .lr = number_of(line, "lr"),
                    .step_ms = number_of(line, "step_ms"),
                    .data_wait_ms = number_of(line, "data_wait_ms"),
                    .tokens_per_s = number_of(line, "tokens_per_s"),
                    .mfu = maybe_number(line, "mfu"),
                    .peak_bytes = integer_of(line, "peak_bytes"),
                    .rss_bytes = integer_of(line, "rss_bytes"),
                    .target_tokens = integer_of(line, "target_tokens"),
                    .loss_scale = maybe_number(line, "loss_scale"),
                    .elapsed_s = number_of(line, "elapsed_s")};
  const auto skipped = line.find("skipped");
  if (skipped != line.end() && skipped->is_string()) record.skipped = skipped->get<std::string>();
  return record;
}

}  // namespace

std::map<int64_t, StepRecord> read_steps(const Path& path) {
  std::map<int64_t, StepRecord> steps;
  std::ifstream file(path);
  for (std::string text; std::getline(file, text);) {
    const Json line = Json::parse(text, nullptr, false);
    if (!line.is_object()) continue;
    const auto kind = line.find("kind");
    if (kind == line.end() || *kind != "step") continue;
    StepRecord record = step_of(line);
    const auto [found, is_new] = steps.try_emplace(record.step, record);
    if (!is_new && record.attempt >= found->second.attempt) found->second = std::move(record);
  }
  return steps;
}

}  // namespace capstan::metrics
