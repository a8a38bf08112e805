// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The experts of one layer on the tokens of one rank: route, permute, compute, combine. One body
// for every layout; what happens between ranks comes in through ExpertCut. docs/design/moe.md has
// the rules. Legend: N tokens of this rank, D hidden, E experts, k choices of a token, R rows
// (chosen and kept), S rows of the micro-batch (samples).
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <vector>

#include "capstan/nn/seams.h"
#include "capstan/ops/router.h"

namespace capstan::nn {

// The weights of one expert layer. Of the experts, those that this rank holds, by rising number.
struct ExpertInput {
  plan::ExpertShape shape;
  Projection router;                      // [E, D]
  std::vector<Projection> gate_up, down;  // gate and up in one projection
};

// Which token of which row each local token is; on the device of the tokens.
struct TokenPlaces {
  Tensor row_N;    // int64, row of the micro-batch
  Tensor place_N;  // int64, place in the whole row
  int64_t rows = 0, row_length = 0;
};

// The steps between ranks. Every rank makes the same calls in the same order. Default: one device,
// which holds all experts and whole rows.
struct ExpertCut {
  // Sums a tensor in place over the ranks that share rows.
  std::function<void(const Tensor&)> sum_rows;
  // keep_within_capacity() for the local tokens, with those of the ranks that share rows.
  std::function<Tensor(const Tensor& experts_Nk, const TokenPlaces&, const ops::CapacitySpec&)>
      keep;
  // Rows to the ranks of their experts and back.
  struct Exchange {
    std::vector<int64_t> counts;               // rows of each expert held here
    std::function<Tensor(const Tensor&)> out;  // in expert order, all experts -> those held here
    std::function<Tensor(const Tensor&)> back;
  };
  std::function<Exchange(const std::vector<int64_t>& counts_E)> exchange;
  // The same with room for as many rows of every expert on every rank: no rank has to know how many
  // there are. Beside `exchange`.
  std::function<Exchange(int64_t experts, int64_t room)> exchange_room;
  int64_t most_tokens = 0;  // of a rank
};

// x [N, D] -> sum over the chosen experts, [N, D]. Auxiliary losses enter as gradients of the
// router; statistics go to context.stats in Mode::kTrain, each the part of this rank's tokens, so
// that sums over micro-batches and over all ranks but those along pp are those of the step:
//   expert_tokens [E] int64, before capacity | expert_dropped | router_tokens  int64
//   router_entropy  sum over tokens, nats, of the shares
//   router_auxiliary_loss, router_z_loss  as in the loss of the step, without its scale
//   chosen_experts [N, k], router_scores [N, E]  no sums: what was decided, and by what
// Collective over: the ranks of `cut`.
[[nodiscard]] Tensor run_experts(const Context& context, int layer, const Tensor& x_ND,
                                 const ExpertInput& input, const TokenPlaces& places,
                                 const ExpertCut& cut);

// Places of tokens [B, T] that lie in order: token t of a row is row_index_T[first + t], or
// first + t when the map has no index.
[[nodiscard]] TokenPlaces places_of(const param::RowMap& rows, int64_t batch, int64_t tokens,
                                    int64_t first, int64_t row_length, at::Device device);

}  // namespace capstan::nn
