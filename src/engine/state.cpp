// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <map>
#include <utility>

#include "capstan/base/error.h"
#include "capstan/base/hash.h"
#include "engine/state_internal.h"

namespace capstan::engine {
namespace {

using at::Tensor;
using parallel::FlatStore;

// Shares the writing of replicated state out among the replicas, largest load last. Every replica
// lists the same entries in the same order, so all come to the same choice.
class Writers {
 public:
  explicit Writers(int replicas) : load_(static_cast<size_t>(replicas), 0) {}
  int next(int64_t bytes) {
    const auto least = std::min_element(load_.begin(), load_.end());
    *least += bytes;
    return static_cast<int>(least - load_.begin());
  }

 private:
  std::vector<int64_t> load_;
};

struct Lister {
  const parallel::ParallelModel& model;
  mesh::Mesh& mesh;
  std::map<unsigned, Writers> writers;  // by the axes that hold the same state
  std::vector<mesh::StateEntry> entries;

  // A value of `flat` for every `block` elements of the shard, side by side along the last
  // dimension.
  void add(const FlatStore& store, const std::string& kind, const Tensor& flat, int64_t block = 1) {
    const auto axes = store.layout().replica_axes();
    auto& share = writers.try_emplace(axes.bits(), mesh.size(axes)).first->second;
    const int64_t begin = store.shard().begin;
    for (const auto& piece :
         plan::pieces_of(store.layout(), store.table(), begin, begin + flat.numel() * block)) {
      mesh::StateEntry entry;
      entry.model = model.name;
      entry.kind = kind;
      entry.name = store.spec(piece.param).name;
      entry.global_shape = store.spec(piece.param).shape;
      entry.box = piece.box;
      for (int64_t* const size :
           {&entry.global_shape.back(), &entry.box.begin.back(), &entry.box.extent.back()})
        *size /= block;
      entry.tensor = flat.narrow(0, piece.offset / block, entry.box.numel());
      const int writer = share.next(static_cast<int64_t>(entry.tensor.nbytes()));
      entry.writes = store.local(piece.param).counted && writer == mesh.index(axes);
      entries.push_back(std::move(entry));
    }
  }
};

// A bijective mixer of 64 bits: the finaliser of SplitMix64.
inline uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
  return x ^ (x >> 31);
}

template <class T>
uint64_t sum_run(const T* values, int64_t count, uint64_t key, int64_t global_index) {
  uint64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto place = static_cast<uint64_t>(global_index + i) * 0x9e3779b97f4a7c15ULL;
    sum += mix(key ^ mix(place + static_cast<uint64_t>(values[i])));
  }
  return sum;
}

constexpr int64_t kTaskElements = 65536;

// Over the real elements of one parameter, [begin, end) of its local elements. `flat` begins at
// element `origin` of the buffer.
uint64_t sum_range(const FlatStore& store, int index, const parallel::Shard& shard, int64_t begin,
                   int64_t end) {
  const auto& local = store.local(index);
  const auto& spec = store.spec(index);
  const Tensor& flat = shard.master;
  const uint64_t key = xxh3_64(spec.name, flat.element_size());
  uint64_t sum = 0;
  plan::for_each_run(local, spec.shape, begin, end, [&](int64_t global, int64_t at, int64_t count) {
    const auto* data = static_cast<const std::byte*>(flat.const_data_ptr()) +
                       (local.flat_begin - shard.begin + at) * flat.element_size();
    if (flat.element_size() == 8)
      sum += sum_run(reinterpret_cast<const uint64_t*>(data), count, key, global);
    else
      sum += sum_run(reinterpret_cast<const uint32_t*>(data), count, key, global);
  });
  return sum;
}

uint64_t sum_store(const FlatStore& store) {
  parallel::Shard shard = store.shard();
  shard.master = shard.master.cpu();
  uint64_t total = 0;
  for (int p = 0; p < static_cast<int>(store.layout().params.size()); ++p) {
    const auto& local = store.local(p);
    if (!local.counted) continue;
    const int64_t first = std::max<int64_t>(0, shard.begin - local.flat_begin);
    const int64_t last =
        std::min(local.numel(), shard.begin + shard.master.numel() - local.flat_begin);
    if (first >= last) continue;
    std::vector<uint64_t> parts(
        static_cast<size_t>((last - first + kTaskElements - 1) / kTaskElements));
    at::parallel_for(0, static_cast<int64_t>(parts.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        parts[static_cast<size_t>(i)] = sum_range(store, p, shard, first + i * kTaskElements,
                                                  std::min(last, first + (i + 1) * kTaskElements));
    });
    for (const uint64_t part : parts) total += part;
  }
  return total;
}

void check_replicas(uint64_t sum, const comm::Communicator& replicas) {
  const Tensor mine = at::full({1}, static_cast<int64_t>(sum), at::kLong);
  const Tensor all = at::empty({replicas.size()}, at::kLong);
  replicas.all_gather(all, mine).wait();
  for (int64_t r = 0; r < all.numel(); ++r) {
    if (all[r].equal(mine[0])) continue;
    throw InternalError(ErrorText{
        .module = "engine",
        .what = "comparing the weights of data-parallel ranks",
        .got = "rank " + std::to_string(replicas.ranks()[static_cast<size_t>(r)]) + " with " +
               hex64(static_cast<uint64_t>(all[r].item<int64_t>())),
        .need = hex64(sum),
        .why = "replicas apply the same updates to the same weights",
        .fix =
            "Resume from the last checkpoint; if it happens again, test the memory of the hosts"});
  }
}

}  // namespace

std::vector<mesh::StateEntry> list_state(const parallel::ParallelModel& model,
                                         optim::Optimizer* optimizer,
                                         const std::vector<size_t>& optimizer_stores,
                                         mesh::Mesh& mesh) {
  Lister lister{model, mesh, {}, {}};
  for (const auto& store : model.stores) lister.add(*store, "model", store->shard().master);
  if (!optimizer) return std::move(lister.entries);
  for (const auto& state : optimizer->states())
    lister.add(*model.stores.at(optimizer_stores.at(state.shard)), "optimizer." + state.kind,
               state.values, state.block);
  return std::move(lister.entries);
}

std::string hash_weights(const parallel::ParallelModel& model, mesh::Mesh& mesh) {
  // What is equal along some axes counts once, on the first rank along them.
  std::map<unsigned, std::pair<plan::AxisSet, uint64_t>> sums;
  for (const auto& store : model.stores) {
    const plan::AxisSet axes = store->layout().replica_axes();
    auto& [same, sum] = sums[axes.bits()];
    same = axes;
    sum += sum_store(*store);
  }
  uint64_t own = 0;
  for (const auto& [bits, group] : sums) {
    const auto& [axes, sum] = group;
    check_replicas(sum, mesh.along(axes).control());
    if (mesh.index(axes) == 0) own += sum;
  }
  const at::Tensor total = at::full({1}, static_cast<int64_t>(own), at::kLong);
  mesh.world().control().all_reduce(total).wait();
  return hex64(static_cast<uint64_t>(total.item<int64_t>()));
}

}  // namespace capstan::engine
