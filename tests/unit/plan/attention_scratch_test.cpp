// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What attention takes of a GPU in the backward, by hand.
#include "plan/attention_scratch_internal.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <numeric>

#include "capstan/base/bytes.h"
#include "plan/llama_internal.h"
#include "plan/memory_internal.h"
#include "plan/resolve_internal.h"
#include "recipes.h"

namespace capstan::plan {
namespace {

using ::testing::Contains;
using ::testing::Key;
using testing::machine;
using testing::plan_of;
using testing::resolved;

Topology gpus(int ranks) {
  Topology topology = machine(ranks, 16);
  topology.device = "cuda";
  topology.fast_bf16 = true;
  topology.memory_bytes = ranks * 80 * kGiB;
  return topology;
}

using Bytes = std::map<std::string, int64_t>;

// Of one call, by name; as they are asked for.
Bytes scratch_of(const ActivationQuery& query, const AttentionCall& call) {
  Bytes bytes;
  for (const ScratchTensor& tensor : attention_scratch(query, call))
    bytes[tensor.name] += tensor.elements * static_cast<int64_t>(size_of(tensor.dtype));
  return bytes;
}
int64_t sum_of(const Bytes& bytes) {
  return std::accumulate(bytes.begin(), bytes.end(), int64_t{0},
                         [](int64_t sum, const auto& entry) { return sum + entry.second; });
}

// Two samples of 1,000 tokens, eight heads of 80 features.
AttentionCall call_of(int64_t key_heads, int64_t documents = 0) {
  return {.samples = 2,
          .queries = 1000,
          .keys = 1000,
          .heads = 8,
          .key_heads = key_heads,
          .head_size = 80,
          .documents = documents};
}

ActivationQuery query_of(AttentionKernel kernel, DType compute, int64_t multiprocessors = 0) {
  ActivationQuery query;
  query.compute = compute;
  query.on_gpu = true;
  query.attention = kernel;
  query.ordered_multiprocessors = multiprocessors;
  return query;
}

TEST(AttentionScratch, Flash_RowsOfWholeBlocks) {
  const ActivationQuery query = query_of(AttentionKernel::kFlash, DType::kBf16);
  const Bytes bytes = scratch_of(query, call_of(8));
  EXPECT_EQ(bytes.at("attention, gradient of query"), 2'560'000);  // 2 x 1,000 x 8 x 80 x 2
  EXPECT_EQ(bytes.at("attention, gradient of key"), 2'560'000);
  EXPECT_EQ(bytes.at("attention, gradient of value"), 2'560'000);
  EXPECT_EQ(bytes.at("attention, products with the output"), 65'536);  // 2 x 8 x 1,024 x 4
  EXPECT_EQ(bytes.at("attention, sums for queries"), 6'291'456);       // 2 x 1,024 x 8 x 96 x 4
  EXPECT_EQ(sum_of(bytes), 3 * 2'560'000 + 65'536 + 6'291'456);
}

// Gradients of two key heads, and of their eight query heads' keys.
TEST(AttentionScratch, Flash_GroupedHeads) {
  const ActivationQuery query = query_of(AttentionKernel::kFlash, DType::kBf16);
  const Bytes bytes = scratch_of(query, call_of(2));
  EXPECT_EQ(bytes.at("attention, gradient of key"), 640'000);
  EXPECT_EQ(bytes.at("attention, gradient of every head's key"), 2'560'000);
  EXPECT_EQ(sum_of(bytes), 2'560'000 + 2 * 640'000 + 65'536 + 6'291'456 + 2 * 2'560'000);
}

// Heads go by 32 features up to 128, then by 64.
TEST(AttentionScratch, Flash_HeadsAreRoundedUp) {
  const ActivationQuery query = query_of(AttentionKernel::kFlash, DType::kBf16);
  for (const auto& [head, rounded] : std::map<int64_t, int64_t>{
           {8, 32}, {64, 64}, {72, 96}, {128, 128}, {136, 192}, {192, 192}, {200, 256}}) {
    AttentionCall call = call_of(8);
    call.head_size = head;
    EXPECT_EQ(scratch_of(query, call).at("attention, sums for queries"), 2 * 1024 * 8 * rounded * 4)
        << head;
  }
}

// In lengths 128 queries of room for each of 16 documents: 2,000 + 2,048.
TEST(AttentionScratch, Flash_Documents) {
  const Bytes bytes = scratch_of(query_of(AttentionKernel::kFlash, DType::kBf16), call_of(8, 16));
  EXPECT_EQ(bytes.at("attention, products with the output"), 129'536);  // 4,048 x 8 x 4
  EXPECT_EQ(bytes.at("attention, sums for queries"), 12'435'456);       // 4,048 x 8 x 96 x 4
}

// 132 multiprocessors over 16 heads of samples: nine sums; over 128 heads of documents two.
TEST(AttentionScratch, Flash_InOneOrder_HasSumsForMultiprocessors) {
  const ActivationQuery query = query_of(AttentionKernel::kFlash, DType::kBf16, 132);
  EXPECT_EQ(scratch_of(query, call_of(8)).at("attention, sums for queries"), 9 * 6'291'456);
  EXPECT_EQ(scratch_of(query, call_of(8, 16)).at("attention, sums for queries"), 2 * 12'435'456);
  AttentionCall many = call_of(8);
  many.samples = 64;
  EXPECT_EQ(scratch_of(query, many).at("attention, sums for queries"), 32 * 6'291'456);
}

// Heads of 80: blocks of 128 queries x two of 64 features, four numbers for a lock beside each.
TEST(AttentionScratch, Efficient_HasABufferForEveryBlock) {
  const ActivationQuery query = query_of(AttentionKernel::kEfficient, DType::kFp32);
  const Bytes bytes = scratch_of(query, call_of(2));
  EXPECT_EQ(bytes.at("attention, every head's key"), 5'120'000);
  EXPECT_EQ(bytes.at("attention, gradient of value"), 5'120'000);
  EXPECT_EQ(bytes.at("attention, log-sum-exp in rows"), 65'536);       // 2 x 8 x 1,024 x 4
  EXPECT_EQ(bytes.at("attention, products with the output"), 64'000);  // 2 x 8 x 1,000 x 4
  EXPECT_EQ(bytes.at("attention, sums for queries"), 8'392'704);       // 2 x 8 x 8 x 2 x 8,196 x 4
  EXPECT_EQ(sum_of(bytes), 5 * 5'120'000 + 65'536 + 64'000 + 8'392'704);
  EXPECT_EQ(scratch_of(query, call_of(8)).count("attention, every head's key"), 0u);
  // Each of 16 documents has rows as long as the longest may be.
  EXPECT_EQ(scratch_of(query, call_of(2, 16)).at("attention, sums for queries"), 8 * 8'392'704);
}

// Small heads in whole blocks: the product of output and gradient is as large, with its sums.
TEST(AttentionScratch, Efficient_TheLargerOfTwoMoments) {
  const ActivationQuery query = query_of(AttentionKernel::kEfficient, DType::kFp32);
  AttentionCall call = call_of(8);
  call.head_size = 64;
  call.queries = call.keys = 1024;
  const Bytes bytes = scratch_of(query, call);
  // 2 x 8 x 16 x 4,100 x 4 = 4,198,400 are less than 2 x 1,024 x 8 x 65 x 4.
  EXPECT_EQ(bytes.count("attention, sums for queries"), 0u);
  EXPECT_EQ(bytes.at("attention, output x gradient"), 4'259'840);
}

TEST(AttentionScratch, KernelIsThatOfOps) {
  const auto kernel = [](const std::vector<std::string>& overrides, bool on_gpu = true) {
    return attention_kernel(plan_of(resolved(overrides), on_gpu ? gpus(1) : machine(1)));
  };
  EXPECT_EQ(kernel({"precision.compute=bf16"}), AttentionKernel::kFlash);
  EXPECT_EQ(kernel({"precision.compute=fp16"}), AttentionKernel::kFlash);
  EXPECT_EQ(kernel({"precision.compute=bf16", "model.head_dim=100"}), AttentionKernel::kPlain);
  EXPECT_EQ(kernel({"precision.compute=bf16", "model.head_dim=264"}), AttentionKernel::kPlain);
  EXPECT_EQ(kernel({"precision.compute=fp32"}), AttentionKernel::kEfficient);
  EXPECT_EQ(kernel({"precision.compute=fp32", "model.head_dim=66"}), AttentionKernel::kPlain);
  EXPECT_EQ(kernel({"precision.compute=fp64"}), AttentionKernel::kPlain);
  EXPECT_EQ(kernel({"precision.compute=bf16"}, false), AttentionKernel::kOwn);
  EXPECT_EQ(kernel({"precision.compute=fp16"}, false), AttentionKernel::kLibTorch);
  EXPECT_EQ(kernel({"precision.compute=fp16", "model.sliding_window=9"}, false),
            AttentionKernel::kPlain);
}

Bytes terms_of(const std::vector<std::string>& overrides, int ranks) {
  Bytes bytes;
  for (const ActivationTerm& term :
       activation_bytes_of(plan_of(resolved(overrides), gpus(ranks))).terms)
    if (term.part == ActivationTerm::Part::kLayerWorkspace && term.phase == kAttention)
      bytes[term.name] += term.bytes;
  return bytes;
}

// Four samples of 256 tokens, four query heads of 64 and two of keys, with the joined gradient.
TEST(AttentionScratch, IsWorkspaceOfTheAttentionsMoment) {
  const Bytes bytes = terms_of({"precision.compute=bf16"}, 1);
  EXPECT_EQ(bytes.at("gradient of query, key, value"), 4 * 256 * 512 * 2);
  EXPECT_EQ(bytes.at("attention, sums for queries"), 4 * 256 * 4 * 64 * 4);
  EXPECT_EQ(bytes.at("attention, gradient of every head's key"), 4 * 256 * 4 * 64 * 2);
  const Bytes by_heads =
      terms_of({"precision.compute=bf16", "parallel.context={size: 2, method: all_to_all}"}, 2);
  EXPECT_EQ(by_heads.at("attention, sums for queries"), 4 * 256 * 2 * 64 * 4);
}

// 128 tokens of each of four samples in two chunks of 64, which are rounded up to 128.
TEST(AttentionScratch, ARing_TakesThatOfItsLargestPair) {
  const std::vector<std::string> ring = {"precision.compute=bf16", "parallel.context.size=2"};
  const Bytes bytes = terms_of(ring, 2);
  EXPECT_EQ(bytes.at("attention, sums for queries"), 4 * 128 * 4 * 64 * 4);
  EXPECT_EQ(bytes.at("attention, gradient of every head's key") % (4 * 64 * 4 * 64 * 2), 0);
  EXPECT_THAT(bytes, Contains(Key("ring, gradients of one block")));
  std::vector<std::string> documents = ring;
  documents.emplace_back("data.documents=separate");
  // A pair of chunks: 4 x 64 queries, and 128 more for each of four documents.
  EXPECT_EQ(terms_of(documents, 2).at("attention, sums for queries"), (256 + 512) * 4 * 64 * 4);
  std::vector<std::string> window = ring;
  window.emplace_back("model.sliding_window=100");
  // Scores of a pair, 4 x 4 x 64 x 64 in fp32 five times, are more than the kernel takes.
  EXPECT_EQ(terms_of(window, 2).at("attention, probabilities"), 4 * 4 * 64 * 64 * 4);
  EXPECT_TRUE(has_plain_parts(plan_of(resolved(window), gpus(2))));
  EXPECT_FALSE(has_plain_parts(plan_of(resolved(ring), gpus(2))));
}

TEST(AttentionScratch, CpusTakeNone) {
  for (const ActivationTerm& term :
       activation_bytes_of(plan_of(resolved({"precision.compute=bf16"}), machine(1))).terms)
    EXPECT_FALSE(term.name.starts_with("attention, sums")) << term.name;
}

TEST(AttentionScratch, DocumentsAreCountedWithRows) {
  EXPECT_EQ(assumed_documents(1, 100), 1);
  EXPECT_EQ(assumed_documents(4, 256), 4);
  EXPECT_EQ(assumed_documents(1, 257), 2);
  EXPECT_EQ(assumed_documents(3, 1024), 16);
}

TEST(AttentionScratch, GpusRoundTo512Bytes) {
  EXPECT_EQ(allocation_bytes(1, true), 512);
  EXPECT_EQ(allocation_bytes(513, true), 1024);
  EXPECT_EQ(allocation_bytes(100'000, true), 100'352);
  EXPECT_EQ(allocation_bytes(100'000), 106'496);
}

}  // namespace
}  // namespace capstan::plan
