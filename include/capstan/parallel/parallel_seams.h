// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Seams of the tensor, sequence and context parallel layouts. Everything between ranks is a sum or
// a rearrangement, placed in recorded nodes whose backward is written out.
//
// Sequence parallel: outside of column and row layers a rank of the tensor axis holds consecutive
// tokens of the rows (of its context part of them). Context parallel: a rank holds its zig-zag part
// (context_split.h) and RowMap says which. In Mode::kDecode both are off: rows are whole on every
// rank of the tensor axis, and ranks of the context axis are independent.
// Collective over: the tensor and the context axis, all overrides.
#pragma once
#include <ATen/core/Tensor.h>

#include <memory>
#include <vector>

#include "capstan/comm/communicator.h"
#include "capstan/nn/seams.h"
#include "capstan/ops/fp8_linear.h"

namespace capstan::parallel {

using at::Tensor;

struct ParallelSeamsOptions {
  comm::Communicator tensor;       // tp axis (size 1: none)
  comm::Communicator context;      // cp axis
  bool sequence_parallel = false;  // only with a tensor axis
  bool all_to_all = false;         // context by all-to-all (Ulysses) instead of ring
  // Sequence parallel: gathers and reduce-scatters go round the ring in chunks, each travelling
  // while the product of the one before is computed.
  bool overlap_chunks = false;
  comm::Communicator expert;  // ep axis
  comm::Communicator rows;    // cp x tp; needed by models with experts
  // Column and row layers multiply in fp8, except in Mode::kDecode.
  std::shared_ptr<ops::Fp8Linear> fp8;
};

// How the tensor axis cuts one pass.
struct TensorCut {
  comm::Communicator group;
  bool sequence = false;  // tokens are cut over it outside of column and row layers
  bool overlap = false;
  ops::LinearMode linear;
};

// Belongs to one rank; copies of the communicators keep their groups alive.
class ParallelSeams : public nn::Seams {
 public:
  explicit ParallelSeams(ParallelSeamsOptions options);

  Tensor embed(const nn::Context& context, const Tensor& ids_BT, const nn::Param& table_VD,
               at::ScalarType residual) override;
  Tensor positions(const nn::Context& context, const Tensor& ids_BT) override;
  std::vector<Tensor> column(const nn::Context& context, const Tensor& x_BTD,
                             std::span<const nn::Projection> projections) override;
  Tensor row(const nn::Context& context, const Tensor& y_BTO,
             const nn::Projection& projection) override;
  ops::Activated column_gelu(const nn::Context& context, const Tensor& x_BTD,
                             const nn::Projection& projection, ops::GeluForm form) override;
  Tensor row(const nn::Context& context, const ops::Activated& y_BTO,
             const nn::Projection& projection) override;
  Tensor attend(const nn::Context& context, int layer, const Tensor& qkv_BTX,
                const nn::AttentionInput& input) override;
  // Collective over: ep as well.
  Tensor experts(const nn::Context& context, int layer, const Tensor& x_BTD,
                 const nn::ExpertInput& input) override;
  // Targets, weights and results are those of all tokens of this rank's context part, the same on
  // every rank of the tensor axis: sums over ranks count them once.
  nn::TokenScores score(const nn::Context& context, const Tensor& hidden_BTD,
                        const nn::Projection& head, const Tensor& targets_BT,
                        const nn::ScoreRequest& request) override;
  Tensor last_tokens(const nn::Context& context, const Tensor& x_BTD, int64_t count) override;
  Tensor logits(const nn::Context& context, const Tensor& hidden_BTD,
                const nn::Projection& head) override;

 private:
  [[nodiscard]] TensorCut cut(const nn::Context& context) const;
  [[nodiscard]] ops::LinearMode linear(const nn::Context& context) const;
  [[nodiscard]] bool splits_rows(const nn::Context& context) const;

  ParallelSeamsOptions options_;
};

}  // namespace capstan::parallel
