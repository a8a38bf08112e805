// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "trainer/resume.h"

#include <fmt/format.h>

#include <algorithm>

#include "capstan/base/error.h"
#include "capstan/base/json.h"
#include "capstan/base/log.h"

namespace capstan::trainer {
namespace {

using json::Json;

std::vector<double> get_doubles(const Json& root, const char* key, const std::string& origin) {
  std::vector<double> values;
  for (const Json& value : json::field(root, key, origin))
    values.push_back(value.is_number() ? value.get<double>() : 0.0);
  return values;
}

engine::EngineScalars parse_scalars(const Json& root, const std::string& origin) {
  constexpr int64_t kMost = int64_t{1} << 62;
  engine::EngineScalars s;
  s.step = json::get_int(root, "step", 0, kMost, origin);
  s.optimizer_count = json::get_int(root, "optimizer_count", 0, kMost, origin);
  s.tokens = json::get_int(root, "tokens", 0, kMost, origin);
  s.samples = json::get_int(root, "samples", 0, kMost, origin);
  s.nonfinite_in_row = json::get_int(root, "nonfinite_in_row", 0, kMost, origin);
  s.skipped_total = json::get_int(root, "skipped_total", 0, kMost, origin);
  s.loss_scale = json::get_double(root, "loss_scale", origin);
  s.good_steps_at_scale = json::get_int(root, "good_steps_at_scale", 0, kMost, origin);
  s.spike_losses = get_doubles(root, "spike_losses", origin);
  s.spike_norms = get_doubles(root, "spike_norms", origin);
  return s;
}

ResumePoint read_point(checkpoint::FoundStep step) {
  const std::string recipe_origin = (step.path / "recipe.yaml").string(),
                    state_origin = (step.path / "state.json").string();
  const std::string recipe_text = checkpoint::read_step_file(step.path, "recipe.yaml");
  const Json state = json::parse(checkpoint::read_step_file(step.path, "state.json"), state_origin);
  ResumePoint point;
  point.recipe = recipe::parse_recipe(recipe_text, recipe_origin).recipe;
  point.scalars = parse_scalars(json::field(state, "engine", state_origin), state_origin);
  point.data_fingerprint = json::get_string(state, "data", state_origin);
  point.step = std::move(step);
  return point;
}

bool is_allowed(const std::string& key, const std::vector<std::string>& allowed) {
  return std::any_of(allowed.begin(), allowed.end(), [&](const std::string& name) {
    return key == name || (key.size() > name.size() && key.rfind(name, 0) == 0 &&
                           (key[name.size()] == '.' || key[name.size()] == '['));
  });
}

}  // namespace

std::optional<ResumePoint> find_resume_point(const Path& run_directory, const std::string& resume,
                                             checkpoint::Verify verify,
                                             checkpoint::CommitGroup& group) {
  const Path checkpoints = run_directory / "checkpoints";
  if (resume == "auto") {
    auto found = checkpoint::find_newest_good_step(checkpoints, verify, group);
    return found ? std::optional(read_point(std::move(*found))) : std::nullopt;
  }
  if (resume == "none") return std::nullopt;  // the directory was found unused before it was opened
  const Path folder = resume;
  std::error_code ignored;
  if (!std::filesystem::is_regular_file(folder / "manifest.json", ignored))
    throw ConfigError({.module = "trainer",
                       .what = "--resume " + resume,
                       .got = "no committed step there",
                       .need = "auto, none or a step-* folder"});
  checkpoint::Manifest manifest = checkpoint::verify_step(folder, verify, group);
  return read_point({folder, std::move(manifest)});
}

void adopt_fixed_values(recipe::Recipe& recipe, const recipe::Recipe& stored) {
  const auto adopt = [](auto& value, const auto& fixed) {
    if (!value) value = fixed;
  };
  const auto adopt_auto = [](std::string& value, const std::string& fixed) {
    if (value == "auto") value = fixed;
  };
  adopt(recipe.model.vocab_size, stored.model.vocab_size);
  adopt(recipe.model.num_key_value_heads, stored.model.num_key_value_heads);
  adopt(recipe.model.head_dim, stored.model.head_dim);
  adopt(recipe.model.max_position_embeddings, stored.model.max_position_embeddings);
  adopt_auto(recipe.run.device, stored.run.device);
  adopt_auto(recipe.precision.compute, stored.precision.compute);
  adopt_auto(recipe.precision.residual, stored.precision.residual);
  adopt_auto(recipe.parallel.zero.reduce, stored.parallel.zero.reduce);
}

void check_same_run(const ResumePoint& point, const recipe::Recipe& now,
                    const data::DataFingerprint& data, const std::vector<std::string>& allowed) {
  std::string refused;
  for (const recipe::Difference& d : recipe::compare_recipes(point.recipe, now)) {
    if (d.free_at_resume) continue;
    if (is_allowed(d.key, allowed))
      log::warning("trainer", "resume: {} changes from {} to {} (allowed by name)", d.key, d.before,
                   d.after);
    else
      refused += fmt::format("\n  {}: {} in the checkpoint, {} now", d.key, d.before, d.after);
  }
  if (point.data_fingerprint != data.text()) {
    if (is_allowed("data", allowed))
      log::warning("trainer", "resume: the training data changes (allowed by name)");
    else
      refused += fmt::format("\n  data: content was\n{}\n  and is now\n{}", point.data_fingerprint,
                             data.text());
  }
  if (refused.empty()) return;
  throw ConfigError({.module = "trainer",
                     .what = "resuming from " + point.step.path.string(),
                     .got = "a recipe that differs where it may not",
                     .need = "the recipe of the run",
                     .fix = "Undo the change, name it with --allow-change KEY, or start a new run "
                            "(--set run.name=NAME):" +
                            refused});
}

std::string state_text(const engine::EngineScalars& s, const data::DataFingerprint& data) {
  Json engine = {{"step", s.step},
                 {"optimizer_count", s.optimizer_count},
                 {"tokens", s.tokens},
                 {"samples", s.samples},
                 {"nonfinite_in_row", s.nonfinite_in_row},
                 {"skipped_total", s.skipped_total},
                 {"loss_scale", s.loss_scale},
                 {"good_steps_at_scale", s.good_steps_at_scale},
                 {"spike_losses", s.spike_losses},
                 {"spike_norms", s.spike_norms}};
  const Json root = {
      {"engine", engine}, {"data", data.text()}, {"data_position", {{"samples", s.samples}}}};
  return root.dump(1) + "\n";
}

}  // namespace capstan::trainer
