// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "cuda/nccl_api.h"

#include <fmt/format.h>
#include <nccl.h>

#include <cstring>
#include <mutex>
#include <set>

namespace capstan::cuda {
namespace {

using comm::NcclCall;
using comm::NcclComm;
using comm::NcclReduce;
using comm::NcclResult;
using comm::NcclType;

static_assert(NCCL_VERSION_CODE >= NCCL_VERSION(2, 28, 0));
static_assert(sizeof(ncclUniqueId) == sizeof(comm::NcclUniqueId::bytes));

// The results have NCCL's numbers, apart from those that a newer library may add.
static_assert(static_cast<int>(NcclResult::kSuccess) == ncclSuccess &&
              static_cast<int>(NcclResult::kUnhandledCudaError) == ncclUnhandledCudaError &&
              static_cast<int>(NcclResult::kSystemError) == ncclSystemError &&
              static_cast<int>(NcclResult::kInternalError) == ncclInternalError &&
              static_cast<int>(NcclResult::kInvalidArgument) == ncclInvalidArgument &&
              static_cast<int>(NcclResult::kInvalidUsage) == ncclInvalidUsage &&
              static_cast<int>(NcclResult::kRemoteError) == ncclRemoteError &&
              static_cast<int>(NcclResult::kInProgress) == ncclInProgress);

NcclResult ours(ncclResult_t result) {
  const bool is_known = result >= ncclSuccess && result <= ncclInProgress;
  return is_known ? static_cast<NcclResult>(result) : NcclResult::kInternalError;
}

ncclComm_t theirs(NcclComm comm) { return static_cast<ncclComm_t>(comm.handle); }
cudaStream_t stream_of(const NcclCall& call) {
  return static_cast<cudaStream_t>(call.stream.handle);
}

ncclDataType_t theirs(NcclType type) {
  switch (type) {
    case NcclType::kInt8:
      return ncclInt8;
    case NcclType::kUint8:
      return ncclUint8;
    case NcclType::kInt32:
      return ncclInt32;
    case NcclType::kInt64:
      return ncclInt64;
    case NcclType::kFloat16:
      return ncclFloat16;
    case NcclType::kFloat32:
      return ncclFloat32;
    case NcclType::kFloat64:
      return ncclFloat64;
    case NcclType::kBfloat16:
      return ncclBfloat16;
  }
  return ncclNumTypes;  // refused by NCCL
}

ncclRedOp_t theirs(NcclReduce reduce) {
  switch (reduce) {
    case NcclReduce::kSum:
      return ncclSum;
    case NcclReduce::kMax:
      return ncclMax;
    case NcclReduce::kMin:
      return ncclMin;
  }
  return ncclNumOps;
}

class LibraryNccl final : public comm::NcclApi {
 public:
  NcclResult get_unique_id(comm::NcclUniqueId& id) override {
    ncclUniqueId made;
    const ncclResult_t result = ncclGetUniqueId(&made);
    std::memcpy(id.bytes.data(), &made, sizeof(made));
    return ours(result);
  }
  NcclResult comm_init_rank(NcclComm& comm, int size, const comm::NcclUniqueId& id, int rank,
                            const comm::NcclConfig& config) override {
    ncclUniqueId unique_id;
    std::memcpy(&unique_id, id.bytes.data(), sizeof(unique_id));
    ncclConfig_t nccl_config = NCCL_CONFIG_INITIALIZER;
    nccl_config.blocking = 1;
    nccl_config.commName = kept(config.name);
    if (config.max_ctas > 0) nccl_config.maxCTAs = config.max_ctas;
    ncclComm_t made = nullptr;
    const ncclResult_t result = ncclCommInitRankConfig(&made, size, unique_id, rank, &nccl_config);
    comm.handle = made;
    return ours(result);
  }
  NcclResult comm_finalize(NcclComm comm) override { return ours(ncclCommFinalize(theirs(comm))); }
  NcclResult comm_destroy(NcclComm comm) override { return ours(ncclCommDestroy(theirs(comm))); }
  NcclResult comm_abort(NcclComm comm) override { return ours(ncclCommAbort(theirs(comm))); }
  NcclResult comm_get_async_error(NcclComm comm, NcclResult& error) override {
    ncclResult_t found = ncclSuccess;
    const ncclResult_t result = ncclCommGetAsyncError(theirs(comm), &found);
    error = ours(found);
    return ours(result);
  }

  NcclResult all_reduce(const void* in, void* out, NcclReduce reduce,
                        const NcclCall& call) override {
    return ours(ncclAllReduce(in, out, call.count, theirs(call.type), theirs(reduce),
                              theirs(call.comm), stream_of(call)));
  }
  NcclResult all_gather(const void* in, void* out, const NcclCall& call) override {
    return ours(
        ncclAllGather(in, out, call.count, theirs(call.type), theirs(call.comm), stream_of(call)));
  }
  NcclResult reduce_scatter(const void* in, void* out, NcclReduce reduce,
                            const NcclCall& call) override {
    return ours(ncclReduceScatter(in, out, call.count, theirs(call.type), theirs(reduce),
                                  theirs(call.comm), stream_of(call)));
  }
  NcclResult broadcast(const void* in, void* out, int root, const NcclCall& call) override {
    return ours(ncclBroadcast(in, out, call.count, theirs(call.type), root, theirs(call.comm),
                              stream_of(call)));
  }
  NcclResult send(const void* in, int to, const NcclCall& call) override {
    return ours(
        ncclSend(in, call.count, theirs(call.type), to, theirs(call.comm), stream_of(call)));
  }
  NcclResult recv(void* out, int from, const NcclCall& call) override {
    return ours(
        ncclRecv(out, call.count, theirs(call.type), from, theirs(call.comm), stream_of(call)));
  }
  NcclResult group_start() override { return ours(ncclGroupStart()); }
  NcclResult group_end() override { return ours(ncclGroupEnd()); }

  std::string error_string(NcclResult result) override {
    return ncclGetErrorString(static_cast<ncclResult_t>(result));
  }
  std::string last_error(NcclComm comm) override {
    const char* const text = ncclGetLastError(theirs(comm));
    return text == nullptr ? "" : text;
  }

 private:
  // NCCL keeps the pointer that it is given.
  const char* kept(const std::string& name) {
    const std::scoped_lock lock(mutex_);
    return names_.insert(name).first->c_str();
  }

  std::mutex mutex_;
  std::set<std::string> names_;
};

std::string version_text(int version) {
  return fmt::format("{}.{}.{}", version / 10000, version / 100 % 100, version % 100);
}

}  // namespace

std::shared_ptr<comm::NcclApi> make_nccl_api() {
  int loaded = 0;
  const ncclResult_t result = ncclGetVersion(&loaded);
  if (result != ncclSuccess || loaded < NCCL_VERSION_CODE)
    throw EnvError(ErrorText{.module = "cuda",
                             .what = "loading NCCL",
                             .got = "version " + version_text(loaded),
                             .need = version_text(NCCL_VERSION_CODE) + " or newer",
                             .why = "the program was built against it",
                             .fix = "Put that libnccl.so.2 first in LD_LIBRARY_PATH"});
  return std::make_shared<LibraryNccl>();
}

}  // namespace capstan::cuda
