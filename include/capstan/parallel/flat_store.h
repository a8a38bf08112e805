// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// FlatStore: the parameters of one flat buffer behind param::Param, whole or cut over the shard
// axes (ZeRO, Rajbhandari et al. 2020). What a rank keeps of a buffer of n elements in s shards:
//
//   stage      values, compute dtype      gradients                      master and moments
//   0          n                          n, in its bucket               n
//   1          n                          n, summed into its own part    n / s
//   2          n                          n / s + transient n            n / s
//   3          n / s, n while open        n / s + transient n            n / s
//
// Values and master are one storage when their dtypes agree (and nothing is offloaded). What is
// offloaded lies in pinned memory beside a device; gradients go there and values come back on
// streams of their own (HostLink), so that neither the host nor the computing stream waits.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "capstan/comm/communicator.h"
#include "capstan/parallel/host_link.h"
#include "capstan/parallel/shard.h"
#include "capstan/param/param.h"
#include "capstan/plan/layout.h"
#include "capstan/plan/plan.h"

namespace capstan::parallel {

[[nodiscard]] at::ScalarType scalar_type_of(DType dtype);  // of the float types, bytes

struct StorageTypes {
  at::ScalarType compute = at::kFloat, master = at::kFloat, gradients = at::kFloat;
};
[[nodiscard]] StorageTypes storage_types(const plan::PrecisionPlan& precision);

// Where the weight half of a backward goes while a schedule separates it from the input half.
struct WeightQueue {
  using Work = std::deque<std::function<void()>>;
  Work* target = nullptr;  // null: run at once
};

struct StoreOptions {
  StorageTypes types;
  at::Device device = at::kCPU;
  int zero_stage = 0;
  bool reshard_after_forward = true;  // stage 3: false keeps values from first use to end of step
  bool offload_optimizer = false;     // master, moments and the gradient they read: host memory
  bool offload_parameters = false;    // the shard of the values as well (stage 3)
  const HostLink* link = nullptr;     // where the device is not the CPU and something is offloaded
  bool counts_in_norm = true;         // of the ranks that hold this part, this one counts it
  comm::Communicator shard;           // the shard axes; one rank at stage 0
  WeightQueue* queue = nullptr;       // null: nothing is ever deferred
};

// Not thread-safe: belongs to one rank.
class FlatStore final : public param::ParamStore {
 public:
  // gradient: memory of types.gradients, 1-d and zero; undefined when frozen. At stage 0 its slice
  // of the bucket, layout.numel elements. At stage 1 as many, at stages 2 and 3 those of the shard,
  // where stores share it in turn; undefined where they do not. `table` must outlive the store.
  FlatStore(plan::FlatBuffer layout, const std::vector<plan::ParamSpec>& table,
            StoreOptions options, Tensor gradient);

  [[nodiscard]] const plan::FlatBuffer& layout() const { return layout_; }
  [[nodiscard]] const std::vector<plan::ParamSpec>& table() const { return table_; }
  [[nodiscard]] const StoreOptions& options() const { return options_; }
  [[nodiscard]] std::optional<int> find(const std::string& name) const;  // index for Param
  // Initial values of (seed, model, name, global index); padding stays zero. Collective over: the
  // shard axes.
  void initialize(uint64_t seed, const std::string& model);

  // Between open and close values may be read; calls nest. Opening gathers what is not here.
  // Collective over: the shard axes (stage 3; after an update also stages 1 and 2).
  void open();
  void close();
  // Starts the gather that the next open would wait for.
  void prefetch();
  // Waits for a gather under way, as the next open would.
  void settle() { wait_for_gather(); }
  [[nodiscard]] bool is_whole() const { return full_.defined(); }

  // Gradients of one optimizer step: begin_step, then passes of accumulate ... take_gradient, then
  // end_step.
  void begin_step();
  // Closes a pass: the whole gradient collected since the last one, with zeros where nobody wrote.
  // After the last pass of a step adding more is an error.
  [[nodiscard]] Tensor take_gradient(bool is_last_pass);
  // What the sum of a taken gradient is written to: [shard_numel], in the type that `taken` has on
  // its way. Hand it back by add_to_shard, in the order of the calls.
  [[nodiscard]] Tensor reduction_target(const Tensor& taken);
  void add_to_shard(const Tensor& summed);
  void end_step();
  [[nodiscard]] bool is_finished() const { return finished_; }
  // The gradient of the step is summed: starts its way to an optimizer on the host. Once per step,
  // before end_step; does nothing where nothing is offloaded.
  void send_gradient();
  // The host waits for it, and for what it last wrote to have left. Then the optimizer may run.
  void await_gradient();

  [[nodiscard]] Shard shard() const;
  // The same with ranges cut so that the index of each element in the model is known.
  [[nodiscard]] Shard numbered_shard() const;
  [[nodiscard]] Tensor gradient_shard() const;  // summed so far
  // After the master shard changed by the optimizer, which wrote the copy too: everybody sees it.
  // Offloaded values are sent to the device; the next open() is ordered behind.
  // Collective over: the shard axes (stages 1 and 2).
  void publish();
  // The two halves of publish(), for a step in a graph, which holds the gather alone.
  void note_update();
  void gather_update();
  // After the master was written from outside (load): rounds the copy again and publishes.
  void refresh();

  [[nodiscard]] const plan::ParamSpec& spec(int index) const override;
  [[nodiscard]] const plan::LocalParam& local(int index) const override;
  [[nodiscard]] bool trainable(int) const override { return layout_.trainable; }
  [[nodiscard]] Tensor value(int index) const override;
  [[nodiscard]] at::ScalarType compute_dtype() const override { return options_.types.compute; }
  [[nodiscard]] uint64_t version(int) const override { return version_; }
  [[nodiscard]] uint64_t version() const { return version_; }
  void accumulate(int index, const param::AddGradient& add, param::When when) override;
  [[nodiscard]] Tensor anchor(int) const override { return anchor_; }
  [[nodiscard]] Tensor anchor() const { return anchor_; }
  [[nodiscard]] Tensor joined_value(std::span<const int> indices) const override;
  void accumulate_joined(std::span<const int> indices, const param::AddGradient& add,
                         param::When when) override;

 private:
  // Of what ops read: the compute dtype, or the master's where the buffer is kept wide.
  [[nodiscard]] at::ScalarType value_dtype() const {
    return layout_.wide ? options_.types.master : options_.types.compute;
  }
  void allocate();
  [[nodiscard]] Tensor on_host(at::ScalarType type) const;  // [shard_numel], zero
  [[nodiscard]] Tensor host_values() const;
  void send_values();
  void receive(const Tensor& from, const Tensor& to);
  void gather(const Tensor& shard);
  void make_views();
  void drop_full();
  void wait_for_gather();
  [[nodiscard]] Tensor empty(at::ScalarType type) const;  // [numel], on the device
  [[nodiscard]] Tensor own_part(const Tensor& full) const;
  [[nodiscard]] Tensor view(const Tensor& flat, int index) const;
  [[nodiscard]] bool is_side_by_side(std::span<const int> indices) const;
  [[nodiscard]] Tensor joined_view(const Tensor& flat, std::span<const int> indices) const;
  void check_open_for_gradients(int index) const;
  void settle_overwrite(std::span<const int> indices);
  void accumulate_now(int index, const param::AddGradient& add);
  void accumulate_joined_now(std::span<const int> indices, const param::AddGradient& add);
  [[nodiscard]] bool is_deferred(param::When when) const {
    return when == param::When::kDeferrable && options_.queue && options_.queue->target;
  }

  plan::FlatBuffer layout_;
  const std::vector<plan::ParamSpec>& table_;
  StoreOptions options_;
  int64_t shard_begin_ = 0, shard_numel_ = 0;  // of master and moments within the buffer
  Tensor master_;                              // [shard_numel]
  Tensor copy_;            // [shard_numel], value dtype; the master itself when nothing differs
  Tensor full_;            // [numel], value dtype; at stage 3 only while gathered
  Tensor gradient_;        // [numel]; at stages 2 and 3 only between first write and reduction
  Tensor gradient_shard_;  // [shard_numel], stages 2 and 3; else a view of gradient_
  Tensor host_gradient_;   // [shard_numel], what an offloaded optimizer reads
  Tensor staged_;          // [shard_numel], value dtype: on its way from there to copy_
  std::unique_ptr<StreamMark> gradient_there_, values_here_;  // copies to and from the host
  Tensor arriving_;  // [shard_numel], on its way from copy_, where that is on the host
  bool is_sending_ = false, is_arriving_ = false, is_read_ = false;
  Tensor anchor_;
  std::vector<Tensor> values_;    // views of full_, one per parameter
  std::vector<bool> is_written_;  // gradient of the parameter holds numbers of this pass
  comm::Work gather_;
  bool is_gathering_ = false, keeps_full_ = false;
  bool finished_ = true, has_shard_sum_ = false;
  int open_ = 0;
  uint64_t version_ = 1;
};

}  // namespace capstan::parallel
