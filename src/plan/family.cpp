// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/plan/family.h"

#include <algorithm>
#include <bit>
#include <list>
#include <mutex>

#include "capstan/base/bytes.h"
#include "capstan/base/check.h"
#include "capstan/base/error.h"
#include "capstan/base/text.h"
#include "capstan/recipe/values.h"
#include "plan/gpt2_internal.h"
#include "plan/llama_internal.h"
#include "plan/moe_internal.h"

namespace capstan::plan {
namespace {

// Families by name. Entries are never removed, so that references handed out stay valid; of two
// with the same name the later one counts.
struct Registry {
  std::mutex mutex;
  std::list<FamilyDef> families = {llama_family(), mixtral_family(), moe_family(), gpt2_family()};

  const FamilyDef* find(const std::string& name) const {
    const auto it = std::find_if(families.rbegin(), families.rend(),
                                 [&](const FamilyDef& family) { return family.name == name; });
    return it == families.rend() ? nullptr : &*it;
  }
};

Registry& registry() {
  static Registry instance;
  return instance;
}

std::vector<std::string> names_of(const Registry& r) {
  std::vector<std::string> names;
  for (const FamilyDef& family : r.families) names.push_back(family.name);
  std::sort(names.begin(), names.end());
  names.erase(std::unique(names.begin(), names.end()), names.end());
  return names;
}

}  // namespace

int64_t numel(const Shape& shape) {
  int64_t product = 1;
  for (const int64_t size : shape) {
    const auto next = checked_multiply(product, size);
    CAPSTAN_CHECK(size >= 0 && next, "a tensor shape has more elements than 64 bits count");
    product = *next;
  }
  return product;
}

const FamilyDef& find_family(const std::string& name) {
  Registry& r = registry();
  const std::lock_guard lock(r.mutex);
  if (const FamilyDef* family = r.find(name)) return *family;
  const std::vector<std::string> names = names_of(r);
  const auto nearest = nearest_name(name, names);
  throw ConfigError(ErrorText{.module = "plan",
                              .what = "model.family",
                              .got = quote(name),
                              .need = "one of " + join(names, ", "),
                              .fix = nearest ? "Did you mean '" + *nearest + "'?" : ""});
}

void register_family(FamilyDef family) {
  CAPSTAN_CHECK(
      !family.name.empty() && family.param_table && family.forward_flops && family.activation_bytes,
      "a model family needs a name, a parameter table, FLOPs and activation bytes");
  Registry& r = registry();
  const std::lock_guard lock(r.mutex);
  recipe::add_choice("model.family", family.name);
  r.families.push_back(std::move(family));
}

std::vector<std::string> family_names() {
  Registry& r = registry();
  const std::lock_guard lock(r.mutex);
  return names_of(r);
}

int64_t count_parameters(const std::vector<ParamSpec>& table) {
  int64_t count = 0;
  for (const ParamSpec& spec : table) count += numel(spec.shape);
  return count;
}

// About four million logits at a time keep the chunk near the last-level cache; below 256 rows the
// products with the head weight lose speed, above 1024 nothing is gained.
int64_t head_chunk_tokens(int64_t vocab_size, int64_t tokens) {
  constexpr int64_t kLogits = 4 << 20, kFewest = 256, kMost = 1024;
  const auto rows =
      std::bit_floor(static_cast<uint64_t>(kLogits / std::max<int64_t>(vocab_size, 1)));
  const int64_t chunk = std::clamp(static_cast<int64_t>(rows), kFewest, kMost);
  return std::max<int64_t>(1, std::min(chunk, tokens));
}

int64_t label_tokens(int64_t vocab_size, int64_t tokens) {
  constexpr int64_t kScores = 1 << 20;
  const int64_t rows = std::max<int64_t>(1, kScores / std::max<int64_t>(vocab_size, 1));
  return std::max<int64_t>(1, std::min(rows, tokens));
}

}  // namespace capstan::plan
