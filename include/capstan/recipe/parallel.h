// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Layout over ranks; part of recipe.h, whose rules hold here.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace capstan::recipe {

struct Pipeline {
  int64_t size = 1;
  std::string schedule = "gpipe";
  int64_t chunks = 1;
  std::optional<std::vector<int64_t>> split;  // auto
};
struct ContextParallel {
  int64_t size = 1;
  std::string method = "ring";
};
struct Zero {
  int64_t stage = 0;
  std::optional<int64_t> shard_size;  // auto
  std::string reduce = "auto";        // auto | step | micro_batch
  bool reshard_after_forward = true;
  int64_t prefetch = 1;          // blocks gathered ahead of their use
  std::string offload = "none";  // none | optimizer | all
};
struct Recompute {
  std::string mode = "none";       // none | block | selective
  std::vector<std::string> parts;  // attention, mlp, norm
};
struct Parallel {
  std::optional<int64_t> data;  // auto = world size / (tensor x pipeline x context)
  int64_t tensor = 1;
  bool sequence = false, sequence_overlap = false;
  Pipeline pipeline;
  ContextParallel context;
  int64_t expert = 1;
  Zero zero;
  Recompute recompute;
  bool offload_activations = false;
  int64_t bucket_mib = 25;
};

}  // namespace capstan::recipe
