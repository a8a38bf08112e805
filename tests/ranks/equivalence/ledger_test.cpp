// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The traffic that the plan predicts is the traffic of a step, call by call and byte by byte, on
// every rank of random layouts. CAPSTAN_LEDGERS sets the number of cases, CAPSTAN_LAYOUT_SEED the
// seed.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <mutex>
#include <set>

#include "capstan/base/text.h"
#include "capstan/engine/engine.h"
#include "ranks/engine_fixture.h"
#include "ranks/equivalence/layout_case.h"
#include "support/run_ranks.h"

namespace capstan::test {
namespace {

using Table = comm::Ledger::Table;

uint64_t number_from(const char* variable, uint64_t otherwise) {
  const char* text = std::getenv(variable);
  return text ? std::stoull(text) : otherwise;
}

Table table_of(const plan::Traffic& traffic) {
  Table table;
  for (const auto& [key, entry] : traffic) table[key] = {entry.calls, entry.bytes};
  return table;
}

Table without_control(Table table) {
  std::erase_if(table, [](const auto& entry) { return entry.first.starts_with("control/"); });
  return table;
}

// "tp/all_reduce: predicted 2 calls, 512 bytes; counted 3 calls, 768 bytes"; empty when equal.
std::string first_difference(const Table& predicted, const Table& counted) {
  std::set<std::string> keys;
  for (const auto& [key, traffic] : predicted) keys.insert(key);
  for (const auto& [key, traffic] : counted) keys.insert(key);
  const auto find = [](const Table& table, const std::string& key) {
    const auto found = table.find(key);
    return found == table.end() ? comm::Traffic{} : found->second;
  };
  for (const std::string& key : keys) {
    const comm::Traffic p = find(predicted, key), c = find(counted, key);
    // Routing without capacity decides the bytes of this exchange; its calls are exact.
    const bool is_routed = key.ends_with("/all_to_all_v");
    if (is_routed ? p.calls != c.calls : p != c)
      return fmt::format("{}: predicted {} calls, {} bytes; counted {} calls, {} bytes", key,
                         p.calls, p.bytes, c.calls, c.bytes);
  }
  return {};
}

struct Compared {
  std::string difference;  // of the first rank that has one
  std::set<std::string> keys;
  int ranks = 0;
};

// One step on thread ranks.
Compared compare_ledgers(const plan::Plan& plan) {
  Compared result;
  std::mutex mutex;
  run_ranks(plan.grid.size(), [&](comm::Communicator world) {
    const int rank = world.rank();
    mesh::Mesh mesh(world, plan.grid);
    engine::Engine engine(plan, mesh);
    const auto objective = engine::make_next_token_objective();
    const auto batches =
        engine::testing::make_batches(plan, plan.grid.data_parallel_index(rank), 0);
    world.ledger().reset();
    (void)engine.step(batches, *objective);
    const Table counted = without_control(world.ledger().table());
    const std::string difference =
        first_difference(table_of(plan::predict_traffic(plan, rank)), counted);
    const std::lock_guard lock(mutex);
    for (const auto& [key, traffic] : counted) result.keys.insert(key);
    if (!difference.empty() && result.difference.empty())
      result.difference = fmt::format("rank {}, {}", rank, difference);
    ++result.ranks;
  });
  return result;
}

TEST(Ledger, RandomLayouts_SendWhatThePlanPredicts) {
  const auto count = static_cast<size_t>(number_from("CAPSTAN_LEDGERS", 120));
  std::vector<LayoutCase> cases =
      draw_cases(number_from("CAPSTAN_LAYOUT_SEED", 21), static_cast<int>(count));
  cases.resize(std::min(cases.size(), count));
  std::set<std::string> keys;
  int ranks = 0, failed = 0;
  for (const LayoutCase& layout : cases) {
    const Compared result = compare_ledgers(make_case_plan(layout));
    keys.insert(result.keys.begin(), result.keys.end());
    ranks += result.ranks;
    if (result.difference.empty()) continue;
    ADD_FAILURE() << layout.describe() << "\n  " << result.difference
                  << "\n  reproduce: " << layout.ranks() << " ranks, --set "
                  << join(layout.overrides(), " --set ");
    if (++failed == 10) break;
  }
  fmt::print("{} layouts, {} ranks: {}\n", cases.size(), ranks,
             join(std::vector<std::string>(keys.begin(), keys.end()), ", "));
  for (const char* key : {"pp/send", "pp/recv", "tp/all_reduce", "tp/all_gather",
                          "tp/reduce_scatter", "cp/send", "cp/all_to_all", "dp_shard+cp/all_gather",
                          "dp_shard+cp/reduce_scatter", "dp_replicate+dp_shard+cp/all_reduce"})
    EXPECT_TRUE(keys.contains(key) || count < 100) << key << " is in no case";
}

// What the generator leaves out: narrow types, several chunks of the head, deep prefetch, frozen
// blocks.
struct OddCase {
  const char* name;
  engine::testing::TinyRun run;
};

TEST(Ledger, OddLayouts_SendWhatThePlanPredicts) {
  const std::string bf16 = "precision.compute=bf16";
  const std::vector<std::string> zero_3 = {"parallel.zero.stage=3", "parallel.zero.prefetch=3",
                                           "model.num_hidden_layers=4"};
  const std::vector<std::string> cut = {"parallel.tensor=2", "parallel.sequence=true",
                                        "batch.sequence_length=16", "parallel.context.size=2"};
  const std::string bias_only = "model.frozen=['*', '!*.1.*.bias', '!*.0.self_attn.o_proj.bias']";
  const std::vector<std::string> gpt2 = {"parallel.tensor=2", "parallel.sequence=true",
                                         "model.family=gpt2", "model.num_key_value_heads=4"};
  const auto with = [](std::vector<std::string> list, const std::vector<std::string>& more) {
    list.insert(list.end(), more.begin(), more.end());
    return list;
  };
  const OddCase cases[] = {
      {"bf16, tensor, sequence and context", {.ranks = 4, .overrides = with(cut, {bf16})}},
      {"bf16, overlapped sequence",
       {.ranks = 4, .overrides = with(cut, {bf16, "parallel.sequence_overlap=true"})}},
      {"bf16 pipeline", {.ranks = 2, .overrides = {bf16, "parallel.pipeline.size=2"}}},
      {"bf16 ZeRO 2", {.ranks = 2, .overrides = {bf16, "parallel.zero.stage=2"}}},
      {"bf16 ZeRO 3, norms and an MLP kept in fp32",
       {.ranks = 2,
        .overrides = with(zero_3, {bf16, "precision.keep_fp32=['*norm*', '*.1.mlp.*']"})}},
      {"three chunks of the head",
       {.ranks = 2,
        .overrides = {"parallel.tensor=2", "batch.sequence_length=300", "model.vocab_size=40000"}}},
      {"prefetch 3", {.ranks = 2, .overrides = zero_3}},
      {"prefetch 0", {.ranks = 2, .overrides = with(zero_3, {"parallel.zero.prefetch=0"})}},
      {"frozen middle", {.ranks = 2, .overrides = zero_3, .frozen_blocks = {2, 3}}},
      {"frozen front under tensor parallel",
       {.ranks = 4, .overrides = cut, .frozen_blocks = {0, 1}}},
      {"frozen all but the head",
       {.ranks = 2,
        .overrides = {"parallel.tensor=2", "model.tie_word_embeddings=false"},
        .frozen_blocks = {0, 1, 2}}},
      {"frozen all but biases",
       {.ranks = 4, .overrides = with(cut, {"model.attention_bias=true", bias_only})}},
      {"norms of heads",
       {.ranks = 4,
        .overrides = with(cut, {"model.qk_norm=true", "model.attention_bias=true",
                                "model.attention_output_bias=false"})}},
      {"frozen all but norms of heads",
       {.ranks = 2,
        .overrides = {"parallel.tensor=2", "model.qk_norm=true",
                      "model.frozen=['*', '!*.1.*.k_norm.weight']"}}},
      {"gpt2, frozen all but biases",
       {.ranks = 2, .overrides = with(gpt2, {"model.frozen=['*', '!*.1.*proj.bias']"})}},
      {"gpt2, frozen all but positions",
       {.ranks = 2, .overrides = with(gpt2, {"model.frozen=['*', '!*wpe*']"})}},
      {"gpt2, frozen all but one bias of the MLP",
       {.ranks = 2, .overrides = with(gpt2, {"model.frozen=['*', '!*.1.mlp.c_fc.bias']"})}},
      {"frozen all but outputs",
       {.ranks = 2,
        .overrides = {"parallel.tensor=2", "parallel.sequence=true",
                      "model.frozen=['*', '!*.0.self_attn.o_proj.*', '!*.1.mlp.down_proj.*']"}}},
      {"frozen all but norms",
       {.ranks = 4, .overrides = with(cut, {"model.frozen=['*', '!*.1.*norm.weight']"})}},
      {"sums in bf16",
       {.ranks = 4,
        .overrides = {"precision.reduction=bf16", "parallel.zero.stage=2",
                      "parallel.zero.shard_size=2", "parallel.pipeline.size=2"}}},
      {"sums in fp32, hybrid shards",
       {.ranks = 4,
        .overrides = {"precision.reduction=fp32", "parallel.zero.stage=3",
                      "parallel.zero.shard_size=2"}}},
      {"copies summed in bf16, tied over stages",
       {.ranks = 4,
        .overrides = {"precision.reduction=bf16", "parallel.pipeline.size=2"},
        .bucket_bytes = 4096}},
      {"large buckets",
       {.ranks = 4,
        .overrides = {"parallel.tensor=2", "parallel.sequence=true"},
        .bucket_bytes = 1 << 20}},
  };
  for (const OddCase& odd : cases)
    EXPECT_EQ(compare_ledgers(engine::testing::make_tiny_plan(odd.run)).difference, "") << odd.name;
}

}  // namespace
}  // namespace capstan::test
