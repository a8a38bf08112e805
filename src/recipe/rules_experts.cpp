// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Rules about experts.
#include <fmt/format.h>

#include <string>

#include "recipe/rules_internal.h"
#include "recipe/schema_internal.h"

namespace capstan::recipe {
namespace {

constexpr const char* kKeys[] = {
    "model.experts.per_token",        "model.experts.intermediate_size",
    "model.experts.shared_gate",      "model.experts.shared_intermediate_size",
    "model.experts.router",           "model.experts.normalize_weights",
    "model.experts.groups",           "model.experts.groups_per_token",
    "model.experts.scaling",          "model.experts.auxiliary_loss",
    "model.experts.auxiliary_scope",  "model.experts.z_loss",
    "model.experts.bias_update_rate", "model.experts.capacity_factor"};
// Those that Mixtral has no room for.
constexpr const char* kNotMixtral[] = {"model.experts.shared_intermediate_size",
                                       "model.experts.shared_gate",
                                       "model.experts.router",
                                       "model.experts.normalize_weights",
                                       "model.experts.groups",
                                       "model.experts.groups_per_token",
                                       "model.experts.scaling",
                                       "model.experts.bias_update_rate"};

void check_family(RuleContext& c) {
  if (!c.has({"model.family", "model.experts.count"})) return;
  const Model& m = c.recipe().model;
  const bool wants = m.family == "mixtral" || m.family == "moe";
  const bool is_dense =
      m.family == "llama" || m.family == "gpt2";  // of families of users, plan knows the parameters
  if (wants && m.experts.count == 0)
    c.add("model.experts.count", "0", "at least 1", "model.family is " + m.family);
  if (is_dense && m.experts.count > 0)
    c.add("model.experts.count", std::to_string(m.experts.count), "0",
          "model.family " + m.family + " has no experts", "Use family moe or mixtral");
  if (m.experts.count == 0 && !wants)
    for (const char* key : kKeys)
      need_default(c, key, "model.experts.count is 0", "Leave the key out");
  if (m.family == "mixtral")
    for (const char* key : kNotMixtral)
      need_default(c, key, "model.family is mixtral", "Use family moe, or leave the key out");
}

void check_choice(RuleContext& c) {
  if (!c.has({"model.experts.count", "model.experts.per_token", "model.experts.groups",
              "model.experts.groups_per_token"}))
    return;
  const Experts& e = c.recipe().model.experts;
  if (e.count == 0) return;
  if (e.per_token > e.count)
    c.add("model.experts.per_token", std::to_string(e.per_token),
          fmt::format("at most model.experts.count {}", e.count), "");
  if (e.count % e.groups != 0) {
    c.add("model.experts.groups", std::to_string(e.groups),
          fmt::format("a divisor of model.experts.count {}", e.count),
          "groups have as many experts each");
    return;
  }
  if (e.groups == 1) return;  // check_switches says that there is nothing to choose
  if (e.groups_per_token > e.groups)
    c.add("model.experts.groups_per_token", std::to_string(e.groups_per_token),
          fmt::format("at most model.experts.groups {}", e.groups), "");
  else if (e.count / e.groups * e.groups_per_token < e.per_token && e.per_token <= e.count)
    c.add("model.experts.groups_per_token", std::to_string(e.groups_per_token),
          fmt::format("at least {}", (e.per_token + e.count / e.groups - 1) / (e.count / e.groups)),
          fmt::format("{} experts are chosen from groups of {}", e.per_token, e.count / e.groups));
}

void check_switches(RuleContext& c) {
  const Experts& e = c.recipe().model.experts;
  if (c.has({"model.experts.auxiliary_loss"}) && e.auxiliary_loss == 0)
    need_default(c, "model.experts.auxiliary_scope", "model.experts.auxiliary_loss is 0",
                 "Leave the key out");
  if (c.has({"model.experts.shared_intermediate_size"}) && e.shared_intermediate_size == 0)
    need_default(c, "model.experts.shared_gate", "there is no shared expert", "Leave the key out");
  if (c.has({"model.experts.groups"}) && e.groups == 1)
    need_default(c, "model.experts.groups_per_token", "there is one group", "Leave the key out");
}

}  // namespace

std::vector<Rule> expert_rules() {
  return {
      {"`model.experts.count` is above 0 exactly with `model.family` mixtral or moe; without "
       "experts the other keys of `model.experts` keep their defaults, and with mixtral those that "
       "it does not know (shared expert, router, groups, scaling, bias).",
       check_family},
      {"`model.experts.per_token` is at most the count; groups divide the count, and the groups of "
       "a token have that many experts.",
       check_choice},
      {"`model.experts.auxiliary_scope` is for an auxiliary loss, `shared_gate` for a shared "
       "expert, `groups_per_token` for groups.",
       check_switches},
  };
}

}  // namespace capstan::recipe
