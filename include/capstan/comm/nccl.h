// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Communicators whose requests on the accelerator's tensors go to NCCL, those on CPU tensors and
// barriers to the communicator they are built on ("control"). The contract of communicator.h holds,
// with these differences.
//
// Asynchrony: an operation starts when the work queued on the issuing thread's current stream so
// far is done. Work::wait() makes the current stream wait for the operation; the host goes on.
// Tensors are held until such a wait on the stream that issued, else until the device is done, so
// memory may be reused in the order of that stream. An operation that failed is reported by wait()
// or by the next call on any communicator of the rank.
//
// Order: each group has a stream and an NCCL communicator of its own for collectives, and one of
// each for every pair and direction that messages use. So groups, and messages in the two
// directions, do not hold each other up. Messages of one pair and direction are issued in the same
// order on both sides, whatever device their tensors are on: the first one on the device is
// preceded by an identifier on the control communicator. The instructions of a pipeline schedule
// are issued in the order of the plan; no grouping is needed. NCCL may connect at the first call of
// a kind and then hold the issuing thread until the other ranks have made that call as well.
//
// Life: NCCL communicators are made at their first use, by a thread of their own, so axes without
// traffic on the device cost no device memory and no first call blocks its issuer; only wait() of a
// first operation blocks until all members have issued it. Identifiers of groups are exchanged by
// split() itself, whose order is the same on all ranks. Communicators are of NCCL's blocking kind:
// the other kind starts a thread for each call.
//
// Deadline: counted on each rank from the moment the operation was at the head of its stream and
// the device had reached it. A watcher thread looks every 20 ms for deadlines, asynchronous NCCL
// errors and the end of the job elsewhere; any of them aborts all NCCL communicators of the rank.
//
// Numbers: the order of sums is NCCL's, and its max and min need not keep NaN. Or is for bool only.
#pragma once
#include <memory>

#include "capstan/comm/nccl_api.h"

namespace capstan::comm {

// What a plug-in brought; null without one. Set once, before the first communicator.
[[nodiscard]] std::shared_ptr<NcclApi> installed_nccl_api();
void install_nccl_api(std::shared_ptr<NcclApi> api);

// `control`: threads or gloo, and not used for messages or collectives by others from here on. The
// accelerator has its device set and outlives the communicators. Collective over: control.
[[nodiscard]] Communicator make_nccl_communicator(const Communicator& control,
                                                  std::shared_ptr<NcclApi> api,
                                                  device::Accelerator& accelerator);

}  // namespace capstan::comm
