// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Shard: the part of a flat buffer that this rank's optimizer updates. Without ZeRO the whole
// buffer. Optimizers, norms and checkpoints work on shards and never ask how a buffer was cut.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "capstan/plan/layout.h"

namespace capstan::parallel {

using at::Tensor;

// Real elements [begin, end) of a shard that are treated alike; padding lies between ranges.
struct ShardRange {
  int64_t begin = 0, end = 0;
  bool decay = true;
  bool counted = true;  // this rank counts them in norms; of all their holders exactly one does
  // Of the first element in the model: elements of earlier parameters of the table, plus its place
  // in its global tensor. Set by FlatStore::numbered_shard, whose ranges run on in this order too.
  uint64_t index = 0;
};

// Views of live storage, all 1-d and of equal length.
struct Shard {
  Tensor master;      // master dtype
  Tensor copy;        // compute dtype; undefined when the parameters are the master
  Tensor gradient;    // gradients' dtype; undefined when frozen
  int64_t begin = 0;  // first element within the flat buffer
  std::vector<ShardRange> ranges;
  plan::UpdateKind update = plan::UpdateKind::kElementwise;
};

}  // namespace capstan::parallel
