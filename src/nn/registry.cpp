// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <map>
#include <mutex>

#include "capstan/base/error.h"
#include "capstan/base/text.h"
#include "capstan/nn/model.h"
#include "nn/gpt2_internal.h"
#include "nn/llama_internal.h"

namespace capstan::nn {
namespace {

struct Registry {
  std::mutex mutex;
  std::map<std::string, ModelBuilder> builders = {
      {"llama", build_llama}, {"mixtral", build_moe}, {"moe", build_moe}, {"gpt2", build_gpt2}};
};

Registry& registry() {
  static auto& instance = *new Registry;
  return instance;
}

ModelBuilder find_builder(const std::string& family) {
  Registry& r = registry();
  const std::scoped_lock lock(r.mutex);
  if (const auto it = r.builders.find(family); it != r.builders.end()) return it->second;
  std::string known;
  for (const auto& [name, builder] : r.builders) known += (known.empty() ? "" : ", ") + name;
  throw ConfigError(ErrorText{.module = "nn",
                              .what = "building a model of family '" + family + "'",
                              .got = "no builder of that name",
                              .need = "one of " + known,
                              .why = "plan::register_family and nn::register_builder go together",
                              .fix = "Register the builder before the engine is made"});
}

}  // namespace

Model build_model(const plan::ModelShape& shape, const ModelOptions& options,
                  const FindParam& find) {
  return find_builder(shape.family)(shape, options, find);
}

void register_builder(const std::string& family, ModelBuilder builder) {
  Registry& r = registry();
  const std::scoped_lock lock(r.mutex);
  r.builders[family] = std::move(builder);
}

}  // namespace capstan::nn
