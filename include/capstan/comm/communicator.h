// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Communicator: collectives over a named group of ranks. A small handle, cheap to copy; copies
// share the group.
//
// Asynchrony: a call only issues the operation and returns a Work; operations of one communicator
// run in the order of issue. Until wait() returned (or is_done() is true) inputs may not be written
// and outputs may not be read. The operation keeps its tensors alive. Tensors are contiguous;
// autograd does not see the operation. They are on the CPU, or on the accelerator where the
// communicator is one of nccl.h, which says what differs there.
//
// Order: all ranks of a group issue the same collectives in the same order (a breach ends in an
// error that names both ranks on the threads backend, in a deadline report on gloo). send and recv
// are first in, first out per pair of ranks; a send completes only when it was received, so two
// ranks that send to each other issue both sends and both receives before the first wait.
//
// Numbers: sums run in rank order with accumulators of at least fp32 and round once: the same bits
// in every run and on every CPU backend. Max and min propagate NaN; kOr is bitwise (logical for
// bool) and refuses floating point.
//
// Threads: one thread per rank issues on a communicator; a Work may be waited for by any thread.
//
// Graphs: an operation on the accelerator that is issued while it records a graph becomes part of
// the graph; all ranks of a group record the same ones, and launch() them together. The first
// operation of a group is never one of a graph. wait() of a recorded operation belongs to the same
// recording; CPU tensors and barriers are refused in one. Graphs are destroyed before the groups
// whose operations they hold.
//
// Deadline: when an operation lasts longer than the timeout (threads: its wait; gloo: counted from
// the moment its turn came), wait() throws EnvError naming collective, axis, sequence number and
// the ranks that are missing, and the job is aborted. In a group of one rank every call is at most
// a copy and is not counted. A group destroyed with operations under way closes its connections.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "capstan/base/error.h"
#include "capstan/comm/flight_recorder.h"
#include "capstan/comm/ledger.h"

namespace capstan::comm {

using at::Tensor;

enum class ReduceOp { kSum, kMax, kMin, kOr };

// Thrown on ranks that stopped because another rank failed first (the text names it); never the
// root cause.
class AbortedError : public EnvError {
 public:
  using EnvError::EnvError;
  const char* class_name() const override { return "AbortedError"; }
};

class Backend;
class WorkState;
struct Request;

class [[nodiscard]] Work {
 public:
  Work() = default;  // done
  explicit Work(std::shared_ptr<WorkState> state) : state_(std::move(state)) {}
  void wait();                         // blocks; throws what made the operation fail
  [[nodiscard]] bool is_done() const;  // never blocks; true after a failure as well

 private:
  std::shared_ptr<WorkState> state_;
};

class Communicator {
 public:
  Communicator();  // a group of one: rank 0 of 1
  Communicator(std::shared_ptr<Backend> backend, std::string axis);

  [[nodiscard]] int rank() const;                       // in this group
  [[nodiscard]] int size() const;                       // of this group
  [[nodiscard]] int world_rank() const;                 // in the job
  [[nodiscard]] const std::vector<int>& ranks() const;  // the members' world ranks, in group order
  [[nodiscard]] const std::string& axis() const { return axis_; }
  [[nodiscard]] std::string backend_name() const;  // "threads", "gloo", "nccl", "fake", "single"
  // For backends that are built on another one.
  [[nodiscard]] const std::shared_ptr<Backend>& backend() const { return backend_; }

  // Collective over: this group, all of the below; peers and roots are ranks of this group.
  Work all_reduce(const Tensor& inout, ReduceOp op = ReduceOp::kSum) const;
  // out holds size() times in, in rank order; in may be this rank's part of out.
  Work all_gather(const Tensor& out, const Tensor& in) const;
  // in holds size() times out, in rank order; out may be this rank's part of in.
  Work reduce_scatter(const Tensor& out, const Tensor& in, ReduceOp op = ReduceOp::kSum) const;
  Work all_to_all(const Tensor& out,
                  const Tensor& in) const;  // equal parts along dim 0; no overlap of out and in
  // Part r of `in` (in_rows[r] rows of dim 0) goes to rank r; out_rows[r] rows arrive from rank r.
  Work all_to_all_v(const Tensor& out, const Tensor& in, std::vector<int64_t> out_rows,
                    std::vector<int64_t> in_rows) const;
  Work broadcast(const Tensor& inout, int root) const;
  Work barrier() const;
  // Between two ranks only.
  Work send(const Tensor& in, int to) const;
  Work recv(const Tensor& out, int from) const;

  // The group of the given ranks of this group (ascending, this rank among them). The ranks of all
  // callers must form a partition; checked. Collective over: this group.
  [[nodiscard]] Communicator split(const std::string& axis, const std::vector<int>& ranks) const;
  // The same group and the same order of operations; traffic is counted under another axis.
  [[nodiscard]] Communicator renamed(std::string axis) const;
  // renamed("control"): flags, counts and barriers that the traffic prediction leaves out.
  [[nodiscard]] Communicator control() const { return renamed("control"); }

  // Calls `launch`, which queues a graph with operations of this rank's communicators on the
  // current stream. `traffic` is what the ledger took back after they were recorded; it is counted
  // here. Deadline and failures are those of one operation, from where the stream reaches the graph
  // to the graph's end. Collective over: this group, which holds all ranks of those operations.
  void launch(const Ledger::Table& traffic, const std::function<void()>& launch) const;
  // Throws what ended the job, if that has happened: before results are believed.
  void check_job() const;

  // Deadline of every later wait of this rank, in all communicators of the job.
  void set_timeout(double seconds) const;
  [[nodiscard]] double timeout() const;
  // Ends all waits of all ranks with AbortedError; the first reason is the one reported. Never
  // throws.
  void abort(const std::string& reason) const noexcept;
  [[nodiscard]] bool is_aborted() const;

  // Of this rank, over all communicators of the job.
  [[nodiscard]] Ledger& ledger() const;
  [[nodiscard]] FlightRecorder& flight_recorder() const;

 private:
  Work issue(Request request) const;
  std::shared_ptr<Backend> backend_;
  std::string axis_;
};

}  // namespace capstan::comm
