// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Context: what ops and layers know of the pass they run in. Plain data, made by the engine per
// micro-batch.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>
#include <utility>
#include <vector>

namespace capstan::param {

using at::Tensor;

enum class Mode { kTrain, kRecompute, kEval, kDecode };

// Dropout keys (seed, epoch, sample, position, site, channel); no dropout in the families of this
// build.
struct DropoutKey {
  uint64_t seed = 0, epoch = 0;
};

// Which global token each local token is.
struct RowMap {
  std::vector<int64_t> samples;  // global sample number of each local row
  Tensor positions_BT;           // int64; restarts at documents under `documents: separate`
  // Attention never crosses a boundary: the first key each query may see, as an index into its row;
  // undefined = 0 (joined).
  Tensor first_key_BT;             // int32
  bool positions_are_rows = true;  // every row is 0 .. T-1, so one table row serves all
};

// Keys and values of earlier tokens, per layer. Implemented by infer.
class KvCache {
 public:
  virtual ~KvCache() = default;
  // Appends k, v [B, T, K, H] of the layer and returns all of them [B, S, K, H] so far.
  virtual std::pair<Tensor, Tensor> append(int layer, const Tensor& k_BTKH,
                                           const Tensor& v_BTKH) = 0;
  [[nodiscard]] virtual int64_t length() const = 0;  // tokens cached before the current pass
};

// Statistics of a pass (expert load, ...). Recompute and evaluation pass none.
class StatSink {
 public:
  virtual ~StatSink() = default;
  virtual void add(const char* name, int layer, const Tensor& value) = 0;
};

struct Context {
  DropoutKey key;
  Mode mode = Mode::kTrain;
  int micro_batch = 0;
  int adapter_set = 0;
  const RowMap* rows = nullptr;  // never null inside a pass
  KvCache* cache = nullptr;      // kDecode only
  StatSink* stats = nullptr;
};

}  // namespace capstan::param
