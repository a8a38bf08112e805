// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What readers of a mixture-of-experts model share: names, capacity, and how many parameters and
// exchanges a token causes. The families themselves are in the registry (family.h): `mixtral`, and
// `moe`, which has every option.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "capstan/plan/family.h"

namespace capstan::plan {

struct Plan;

// Names of the parameters of one layer, below "model.layers.<n>." and without ".weight".
struct ExpertNames {
  std::string router;            // [experts, hidden]
  std::string expert;            // prefix of an expert's number
  std::string gate, up, down;    // within an expert
  std::string shared;            // prefix of the shared expert
  std::string shared_gate;       // [1, hidden]
  std::string router_bias;       // state of balancing by bias, no parameter
  std::string router_fractions;  // state of the global auxiliary loss, no parameter

  [[nodiscard]] std::string of(int number, const std::string& part) const {
    return expert + std::to_string(number) + "." + part;
  }
};
[[nodiscard]] const ExpertNames& expert_names(const std::string& family);

// Most tokens of one row that an expert takes: ceil(factor x row_tokens x per_token / count), at
// least 1; row_tokens when nothing is dropped.
[[nodiscard]] int64_t expert_capacity(const ExpertShape& experts, int64_t row_tokens);

// Most rows of an expert that a rank with these rows and tokens of them can have to hand over: what
// fixed exchanges have room for. Only with a capacity.
[[nodiscard]] int64_t expert_room(const ExpertShape& experts, int64_t rows, int64_t row_tokens,
                                  int64_t tokens);
// The same on a GPU that holds all experts, which then get as many rows each, unused ones zero; 0
// where that is over a sixteenth more than the rows of all choices, and without a capacity.
[[nodiscard]] int64_t own_expert_room(const ExpertShape& experts, int64_t rows, int64_t row_tokens,
                                      int64_t tokens);
// Whether the host knows how many rows each expert of a rank gets where one product takes them all:
// they travel, or all have room.
[[nodiscard]] bool knows_expert_rows(const Plan& plan);

// Parameters that one token meets: of the experts, per_token of count.
[[nodiscard]] int64_t count_active_parameters(const ModelShape& shape,
                                              const std::vector<ParamSpec>& table);

// The exchanges of tokens over `ep` ranks by one layer and micro-batch, from forward to backward:
// rows of hidden_size elements of the compute dtype, on axis "ep", operation "all_to_all_v". What a
// rank sends to the experts is exact when nothing is dropped; what it sends back depends on what
// they were sent. Over all ranks of the axis both are equal.
struct ExpertExchange {
  int64_t calls = 0;           // of one rank: out and back in the forward, the same in the backward
  int64_t rows_out = 0;        // a rank's tokens x per_token, per direction pair; capacity: at most
  int64_t rows_back_most = 0;  // the least is 0
  int64_t bytes_least = 0, bytes_most = 0;  // of all calls of one rank
  int64_t group_bytes = 0;  // of all calls of all ranks of the axis; capacity: at most
};
// tokens: of this rank, after splits over cp and tp. recomputed: the forward runs twice.
[[nodiscard]] ExpertExchange expert_exchange(const ModelShape& shape, int ep, int64_t tokens,
                                             DType compute, bool recomputed);

}  // namespace capstan::plan
