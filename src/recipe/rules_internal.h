// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Rules between keys that need no world size. One table; each rule has the sentence that the
// documentation prints and a function that reports what breaks it.
#pragma once
#include <functional>
#include <initializer_list>
#include <string>
#include <vector>

#include "capstan/recipe/load.h"

namespace capstan::recipe {

// A recipe under check. Rules ask has() first, so that a value that was refused causes no second
// complaint.
class RuleContext {
 public:
  using OriginOf = std::function<Origin(const std::string& key)>;
  using IsGood = std::function<bool(const std::string& key)>;
  RuleContext(Resolved& resolved, std::vector<Problem>& problems, OriginOf origin_of,
              IsGood is_good)
      : resolved_(resolved),
        problems_(problems),
        origin_of_(std::move(origin_of)),
        is_good_(std::move(is_good)) {}

  [[nodiscard]] const Recipe& recipe() const { return resolved_.recipe; }
  [[nodiscard]] Recipe& mutable_recipe() { return resolved_.recipe; }
  [[nodiscard]] bool has(std::initializer_list<const char*> keys) const;
  [[nodiscard]] bool is_written(const std::string& key) const;  // in a file or by --set
  void derive(const std::string& key) { resolved_.origins[key] = {"auto", 0, 0}; }
  void add(const std::string& key, std::string got, std::string need, std::string why,
           std::string fix = "");

 private:
  Resolved& resolved_;
  std::vector<Problem>& problems_;
  OriginOf origin_of_;
  IsGood is_good_;
};

// Reports a value that is not the default.
void need_default(RuleContext& c, const char* path, const std::string& why, const std::string& fix);

struct Rule {
  const char* text;
  void (*check)(RuleContext&);
};
[[nodiscard]] const std::vector<Rule>& rules();
// Parts of the table, by subject.
[[nodiscard]] std::vector<Rule> model_rules();
[[nodiscard]] std::vector<Rule> expert_rules();
[[nodiscard]] std::vector<Rule> gpt2_rules();
[[nodiscard]] std::vector<Rule> run_rules();

}  // namespace capstan::recipe
