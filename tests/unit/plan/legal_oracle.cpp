// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "legal_oracle.h"

#include <fmt/format.h>

#include <algorithm>
#include <numeric>

#include "capstan/base/text.h"

namespace capstan::plan::testing {
namespace {

const std::string kHeads = "model.num_attention_heads", kKvHeads = "model.num_key_value_heads",
                  kFfn = "model.intermediate_size", kLayers = "model.num_hidden_layers",
                  kExperts = "model.experts.count",
                  kShared = "model.experts.shared_intermediate_size",
                  kGlobal = "batch.global_samples", kMicro = "batch.micro_samples",
                  kLength = "batch.sequence_length", kData = "parallel.data",
                  kTensor = "parallel.tensor", kSequence = "parallel.sequence",
                  kPipeline = "parallel.pipeline.size", kSchedule = "parallel.pipeline.schedule",
                  kChunks = "parallel.pipeline.chunks", kSplit = "parallel.pipeline.split",
                  kContext = "parallel.context.size", kMethod = "parallel.context.method",
                  kExpert = "parallel.expert", kStage = "parallel.zero.stage",
                  kShards = "parallel.zero.shard_size", kReduce = "parallel.zero.reduce",
                  kReshard = "parallel.zero.reshard_after_forward",
                  kOffload = "parallel.zero.offload";

using Choices = std::vector<std::pair<std::string, std::vector<std::string>>>;
const Choices& choices() {
  static const Choices table = {
      {kHeads, {"6", "8", "12", "12", "5"}},
      {kKvHeads, {"1", "2", "3", "4", "6", "6"}},
      {kFfn, {"96", "50", "30"}},
      {kLayers, {"1", "2", "3", "4", "6", "8"}},
      {kExperts, {"4", "6", "8", "12"}},
      {kShared, {"16", "18", "24"}},
      {kGlobal, {"6", "8", "12", "24", "48", "64", "7"}},
      {kMicro, {"2", "3", "4"}},
      {kLength, {"32", "48", "24", "12", "20", "18", "7"}},
      {kData, {"1", "2", "3", "4", "6", "8"}},
      {kTensor, {"2", "3", "4", "6", "8"}},
      {kSequence, {"true"}},
      {kPipeline, {"2", "3", "4", "5", "6", "9"}},
      {kSchedule, {"1f1b", "interleaved", "zero_bubble"}},
      {kChunks, {"2", "3", "4"}},
      {kSplit, {"drawn"}},
      {kContext, {"2", "3", "4"}},
      {kMethod, {"all_to_all"}},
      {kExpert, {"2", "3", "4", "6", "8"}},
      {kStage, {"1", "2", "3"}},
      {kShards, {"1", "2", "3", "4", "6"}},
      {kReduce, {"step", "micro_batch"}},
      {kReshard, {"false"}},
      {kOffload, {"optimizer", "all"}},
      {"parallel.recompute.mode", {"block"}},
  };
  return table;
}

std::string text_of(const Draw& draw, const std::string& key, const std::string& otherwise) {
  const auto found = draw.values.find(key);
  return found == draw.values.end() ? otherwise : found->second;
}
int64_t number_of(const Draw& draw, const std::string& key, int64_t otherwise) {
  return std::stoll(text_of(draw, key, std::to_string(otherwise)));
}

std::vector<int64_t> numbers_in(const std::string& list) {  // "[1, 2]"
  std::vector<int64_t> numbers;
  for (size_t at = list.find_first_of("0123456789"); at != std::string::npos;
       at = list.find_first_of("0123456789", at)) {
    size_t length = 0;
    numbers.push_back(std::stoll(list.substr(at), &length));
    at += length;
  }
  return numbers;
}

// What the reasons read of a draw.
struct Sizes {
  explicit Sizes(const Draw& draw)
      : heads(number_of(draw, kHeads, 4)),
        kv_heads(number_of(draw, kKvHeads, heads)),
        layers(number_of(draw, kLayers, 4)),
        experts(number_of(draw, kExperts, 0)),
        features(experts > 0 ? number_of(draw, kShared, 0) : number_of(draw, kFfn, 48)),
        length(number_of(draw, kLength, 32)),
        samples(number_of(draw, kGlobal, 8)),
        micro(number_of(draw, kMicro, 1)),
        tensor(number_of(draw, kTensor, 1)),
        pipeline(number_of(draw, kPipeline, 1)),
        chunks(number_of(draw, kChunks, 1)),
        context(number_of(draw, kContext, 1)),
        expert(number_of(draw, kExpert, 1)),
        stage(number_of(draw, kStage, 0)),
        sequence(text_of(draw, kSequence, "false") == "true") {
    for (int64_t d = 1; d <= draw.world; ++d)
      if (d * tensor * pipeline * context == draw.world) data = d;
    if (draw.values.contains(kData) && number_of(draw, kData, 0) != data.value_or(0)) data.reset();
    shards = stage == 0 ? 1 : number_of(draw, kShards, data.value_or(1));
  }
  int64_t heads, kv_heads, layers, experts, features, length, samples, micro, tensor, pipeline,
      chunks, context, expert, stage;
  bool sequence;
  std::optional<int64_t> data;  // none: the axes do not fill the world
  int64_t shards = 1;
};

// `things` in a row, cut into `parts` runs of the same length.
bool cuts_evenly(int64_t things, int64_t parts) { return things / parts * parts == things; }

// Cuts query heads, each with the key/value head it reads, over ranks; every rank brings the heads
// that its queries read. Even: all ranks have as many of both, and on every rank each key/value
// head serves as many queries.
std::optional<std::vector<std::vector<int64_t>>> deal_heads(const std::vector<int64_t>& kv_of_query,
                                                            int64_t ranks) {
  const auto count = static_cast<int64_t>(kv_of_query.size());
  if (!cuts_evenly(count, ranks)) return std::nullopt;
  std::vector<std::vector<int64_t>> hands;
  std::set<std::vector<int64_t>> uses_of_ranks;
  for (int64_t rank = 0; rank < ranks; ++rank) {
    const auto first = kv_of_query.begin() + rank * (count / ranks);
    hands.emplace_back(first, first + count / ranks);
    std::map<int64_t, int64_t> uses;
    for (const int64_t kv : hands.back()) ++uses[kv];
    std::vector<int64_t> numbers;
    for (const auto& [kv, times] : uses) numbers.push_back(times);
    if (std::set<int64_t>(numbers.begin(), numbers.end()).size() > 1) return std::nullopt;
    uses_of_ranks.insert(numbers);
  }
  if (uses_of_ranks.size() > 1) return std::nullopt;
  return hands;
}

void check_heads(const Draw& draw, const Sizes& s, std::vector<Reason>& reasons) {
  if (!cuts_evenly(s.heads, s.kv_heads)) {
    reasons.push_back({"queries per key/value head",
                       {kHeads, kKvHeads},
                       {"query heads over tensor", "key/value heads over tensor",
                        "heads over tensor, then context"}});
    return;
  }
  std::vector<int64_t> kv_of_query;
  for (int64_t q = 0; q < s.heads; ++q) kv_of_query.push_back(q / (s.heads / s.kv_heads));
  const auto hands = deal_heads(kv_of_query, s.tensor);
  if (!hands) {
    const bool queries = cuts_evenly(s.heads, s.tensor);
    // Another tensor axis cuts rows and takes experts otherwise.
    reasons.push_back({queries ? "key/value heads over tensor" : "query heads over tensor",
                       {kHeads, kKvHeads, kTensor},
                       {"tokens over tensor", "experts over replicas"}});
  }
  if (s.context == 1 || text_of(draw, kMethod, "ring") != "all_to_all") return;
  const auto uneven = [&](const auto& hand) { return !deal_heads(hand, s.context).has_value(); };
  if (!hands || std::any_of(hands->begin(), hands->end(), uneven))
    reasons.push_back({"heads over tensor, then context", {kMethod, kContext, kHeads, kKvHeads}});
}

// Embedding and head are blocks like the layers, at the ends.
void check_stages(const Draw& draw, const Sizes& s, std::vector<Reason>& reasons) {
  const int64_t stages = s.pipeline * s.chunks, blocks = s.layers + 2;
  if (stages > blocks)
    reasons.push_back({"a stage without a block",
                       {kPipeline, kChunks, kLayers, kSplit},
                       {"rounds of interleaved"}});
  if (!draw.values.contains(kSplit)) return;
  std::vector<int64_t> held = numbers_in(draw.values.at(kSplit));
  if (!held.empty()) ++held.front(), ++held.back();
  const bool all = std::accumulate(held.begin(), held.end(), int64_t{0}) == blocks;
  const bool none_empty = std::find(held.begin(), held.end(), 0) == held.end();
  if (static_cast<int64_t>(held.size()) != stages || !all || !none_empty)
    reasons.push_back({"split holds every block once", {kSplit}});
}

std::string draw_split(std::mt19937_64& random, const Draw& draw) {
  const Sizes s(draw);
  std::vector<std::string> parts;
  int64_t left = s.layers;
  const int64_t stages = s.pipeline * s.chunks;
  for (int64_t stage = 0; stage < stages; ++stage) {
    const auto share = static_cast<int64_t>(random() % static_cast<uint64_t>(left / 2 + 2));
    const int64_t layers = stage + 1 == stages && random() % 4 ? left : std::min(left, share);
    left -= layers;
    parts.push_back(std::to_string(layers));
  }
  return "[" + join(parts, ", ") + "]";
}

// Half of the numbers that have to fit others do.
void settle(std::mt19937_64& random, Draw& draw) {
  const auto likely = [&] { return random() % 4 != 0; };
  const Sizes s(draw);
  const int64_t rest = s.tensor * s.pipeline * s.context;
  const int64_t data = number_of(draw, kData, int64_t{1} << (random() % 3));
  draw.world = likely() ? rest * data : 1 + static_cast<int64_t>(random() % 48);
  if (likely()) {
    const auto micro_batches = static_cast<int64_t>(random() % 6) + 1;
    draw.values[kGlobal] = std::to_string(s.micro * data * micro_batches);
  }
}

}  // namespace

std::vector<std::string> Draw::overrides() const {
  std::vector<std::string> list;
  for (const auto& [key, value] : values) list.push_back(key + "=" + value);
  if (values.contains(kExperts)) list.emplace_back("model.family=moe");
  return list;
}

std::string Draw::describe() const {
  return fmt::format("{} ranks, --set {}", world, join(overrides(), " --set "));
}

Draw draw_recipe(std::mt19937_64& random) {
  Draw draw;
  const uint64_t rarity = 2 + random() % 8;  // simple and crowded recipes
  for (const auto& [key, values] : choices())
    if (random() % rarity == 0) draw.values[key] = values[random() % values.size()];
  if (random() % 4 == 0) {  // many heads in many ways
    draw.values[kHeads] = "12";
    draw.values[kKvHeads] = std::to_string(random() % 2 == 0 ? 4 : 6);
    draw.values[kTensor] = random() % 2 == 0 ? "4" : "6";
  }
  if (!draw.values.contains(kExperts)) draw.values.erase(kShared);
  if (text_of(draw, kSchedule, "gpipe") == "interleaved" && random() % 4 != 0)
    draw.values[kChunks] = "2";
  const bool has_split = draw.values.erase(kSplit) > 0;
  if (has_split) draw.values[kSplit] = draw_split(random, draw);
  settle(random, draw);
  return draw;
}

std::vector<Reason> contradictions(const Draw& draw) {
  const Sizes s(draw);
  std::vector<Reason> reasons;
  const auto need = [&](bool holds, const char* name, std::set<std::string> keys,
                        std::set<std::string> hides = {}) {
    if (!holds) reasons.push_back({name, std::move(keys), std::move(hides)});
  };
  check_heads(draw, s, reasons);
  need(cuts_evenly(s.features, s.tensor), "features over tensor", {kFfn, kShared, kTensor});
  need(s.data.has_value(), "axes fill the world", {kData, kTensor, kPipeline, kContext},
       {"samples over ranks and micro-batches", "shards of every copy", "experts over replicas",
        "rounds of interleaved"});
  // Zig-zag: a rank of the context axis takes one piece from the front and its mirror image.
  need(s.context == 1 || cuts_evenly(s.length, 2 * s.context), "pieces of a row over context",
       {kLength, kContext});
  need(!s.sequence ||
           (cuts_evenly(s.length, s.context) && cuts_evenly(s.length / s.context, s.tensor)),
       "tokens over tensor", {kLength, kSequence, kTensor});
  check_stages(draw, s, reasons);
  const int64_t data = s.data.value_or(1);
  need(cuts_evenly(s.samples, data) && cuts_evenly(s.samples / data, s.micro),
       "samples over ranks and micro-batches", {kGlobal, kMicro, kData});
  need(s.stage == 0 || cuts_evenly(data, s.shards), "shards of every copy", {kShards, kData},
       {"experts over replicas"});
  need(s.experts == 0 || cuts_evenly(s.experts, s.expert), "experts over ranks",
       {kExpert, kExperts});
  return reasons;
}

std::vector<Reason> limits(const Draw& draw) {
  const Sizes s(draw);
  std::vector<Reason> reasons;
  const auto limit = [&](bool breaks, const char* name, std::set<std::string> keys) {
    if (breaks) reasons.push_back({name, std::move(keys)});
  };
  const std::string schedule = text_of(draw, kSchedule, "gpipe");
  const bool plain = schedule == "gpipe" || schedule == "1f1b";
  limit((plain && s.chunks > 1) || (schedule == "interleaved" && s.chunks < 2) ||
            (schedule == "zero_bubble" && s.chunks > 2),
        "chunks of the schedule", {kChunks, kSchedule});
  const int64_t micro_batches = s.samples / s.data.value_or(1) / s.micro;
  limit(schedule == "interleaved" && !cuts_evenly(micro_batches, s.pipeline),
        "rounds of interleaved", {kGlobal, kMicro, kSchedule});
  limit(s.sequence && s.tensor == 1, "sequence without tensor", {kSequence});
  limit(text_of(draw, kReduce, "auto") == "micro_batch" && s.stage < 2, "reduce below stage 2",
        {kReduce, kStage});
  limit(text_of(draw, kReshard, "true") == "false" && s.stage < 3, "reshard below stage 3",
        {kReshard, kStage});
  limit(number_of(draw, kShards, 1) != 1 && s.stage == 0, "shards at stage 0", {kShards, kStage});
  limit(text_of(draw, kOffload, "none") == "all" && s.stage < 3, "offload of everything",
        {kOffload, kStage});
  limit(s.expert > 1 && s.experts == 0, "expert axis without experts", {kExpert, kExperts});
  // Experts never spread over replicas.
  const bool has_shards = s.stage == 0 || cuts_evenly(s.data.value_or(1), s.shards);
  limit(s.experts > 0 && s.data && has_shards &&
            !cuts_evenly(s.shards * s.context * s.tensor, s.expert),
        "experts over replicas", {kExpert, kStage, kShards});
  return reasons;
}

const std::vector<std::string>& reason_names() {
  static const std::vector<std::string> names = {"queries per key/value head",
                                                 "query heads over tensor",
                                                 "key/value heads over tensor",
                                                 "heads over tensor, then context",
                                                 "features over tensor",
                                                 "axes fill the world",
                                                 "pieces of a row over context",
                                                 "tokens over tensor",
                                                 "a stage without a block",
                                                 "split holds every block once",
                                                 "samples over ranks and micro-batches",
                                                 "shards of every copy",
                                                 "experts over ranks",
                                                 "chunks of the schedule",
                                                 "rounds of interleaved",
                                                 "sequence without tensor",
                                                 "reduce below stage 2",
                                                 "reshard below stage 3",
                                                 "shards at stage 0",
                                                 "offload of everything",
                                                 "expert axis without experts",
                                                 "experts over replicas"};
  return names;
}

}  // namespace capstan::plan::testing
