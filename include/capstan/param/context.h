// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Context: what ops and layers know of the pass they run in. Plain data, made by the engine per
// micro-batch.
#pragma once
#include <ATen/core/Tensor.h>

#include <array>
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

// The documents of whole rows, one row behind the other: what kernels of variable lengths take.
struct DocumentStarts {
  // int32: the first token of each document among the B*T of the micro-batch, then B*T, repeated.
  Tensor starts;
  int64_t longest = 0;  // tokens; no document has more
  // Of rows cut into C equal chunks: row c has the starts of what lies in chunk c of each row,
  // among the tokens of all those chunks. What has no token there is empty. Undefined: rows are
  // whole.
  Tensor chunks_CE;
};
// From first_key_BT on the CPU (RowMap). Room for a power of two of documents, so that shapes are
// few. Throws DataError for keys that are no documents' starts.
[[nodiscard]] DocumentStarts document_starts(const Tensor& first_key_BT);
// DocumentStarts::chunks_CE; `chunks` divides the tokens of a row.
[[nodiscard]] Tensor chunk_starts(const Tensor& starts_E, int64_t row_length, int64_t chunks);

// Which global token each local token is.
struct RowMap {
  std::vector<int64_t> samples;  // global sample number of each local row
  Tensor positions_BT;           // int64; restarts at documents under `documents: separate`
  // Attention never crosses a boundary: the first key each query may see, as an index into its row
  // (the whole row, also where a rank holds parts of it); undefined = 0 (joined).
  Tensor first_key_BT;             // int32
  DocumentStarts documents;        // the same of the whole rows; undefined on the CPU
  bool positions_are_rows = true;  // every row is 0 .. T-1, so one table row serves all
  // Context parallel: a rank holds parts of each row.
  Tensor row_index_T;  // int64, place of each local token in the whole row; undefined = 0 .. T-1
  int64_t row_length = 0;  // tokens of the whole row; 0 = those held here
  // Of the two halves of what is held here: no row has a first key before it. 0 leaves it open.
  std::array<int64_t, 2> lowest_first_key = {0, 0};
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
  // What costs work is made only when wanted.
  [[nodiscard]] virtual bool wants(const char* /*name*/) const { return true; }
};

// What the balancing of one layer's experts keeps from step to step; undefined where unused.
struct RouterState {
  Tensor bias_E;       // added to the scores for the choice alone
  Tensor fractions_E;  // share of the previous step's choices that fell on each expert
};

struct Context {
  DropoutKey key;
  Mode mode = Mode::kTrain;
  int micro_batch = 0;
  int adapter_set = 0;
  const RowMap* rows = nullptr;  // never null inside a pass
  KvCache* cache = nullptr;      // kDecode only
  StatSink* stats = nullptr;
  double rows_of_step = 0;  // samples of the whole optimizer step; losses on routers need it
  double loss_scale = 1;    // that of the token weights; 0: no losses on routers
  std::span<const RouterState> routers;  // by layer of the model
};

}  // namespace capstan::param
