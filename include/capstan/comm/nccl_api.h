// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The NCCL calls that the backend uses, as an interface: the CUDA plug-in forwards them to the
// library, tests put a fake behind them. Types are our own, so no NCCL or CUDA header is needed
// here. Calls mean what the functions of the same name mean (2.28); all return a result and throw
// nothing. Thread-safe as NCCL is: one thread at a time per communicator, apart from comm_abort,
// comm_get_async_error and last_error, which any thread may call; groups belong to their thread.
#pragma once
#include <ATen/core/Tensor.h>

#include <array>
#include <cstddef>
#include <optional>
#include <string>

#include "capstan/comm/communicator.h"
#include "capstan/device/accelerator.h"

namespace capstan::comm {

enum class NcclResult {
  kSuccess,
  kUnhandledCudaError,
  kSystemError,
  kInternalError,
  kInvalidArgument,
  kInvalidUsage,
  kRemoteError,
  kInProgress
};
enum class NcclType { kInt8, kUint8, kInt32, kInt64, kFloat16, kFloat32, kFloat64, kBfloat16 };
enum class NcclReduce { kSum, kMax, kMin };

struct NcclUniqueId {
  std::array<std::byte, 128> bytes{};
};
struct NcclComm {
  void* handle = nullptr;
};
struct NcclConfig {
  std::string name;  // shown in NCCL's own log
  int max_ctas = 0;  // thread blocks per kernel; 0 = NCCL's choice
};
// A call on `comm`, queued on `stream`; count in elements.
struct NcclCall {
  NcclComm comm;
  device::Stream stream;
  NcclType type = NcclType::kUint8;
  size_t count = 0;
};

class NcclApi {
 public:
  virtual ~NcclApi() = default;

  [[nodiscard]] virtual NcclResult get_unique_id(NcclUniqueId& id) = 0;
  // Blocking: returns when all `size` ranks have called it.
  [[nodiscard]] virtual NcclResult comm_init_rank(NcclComm& comm, int size, const NcclUniqueId& id,
                                                  int rank, const NcclConfig& config) = 0;
  [[nodiscard]] virtual NcclResult comm_finalize(NcclComm comm) = 0;
  [[nodiscard]] virtual NcclResult comm_destroy(NcclComm comm) = 0;
  // Ends what runs on the device and frees the communicator.
  [[nodiscard]] virtual NcclResult comm_abort(NcclComm comm) = 0;
  [[nodiscard]] virtual NcclResult comm_get_async_error(NcclComm comm, NcclResult& error) = 0;

  [[nodiscard]] virtual NcclResult all_reduce(const void* in, void* out, NcclReduce reduce,
                                              const NcclCall& call) = 0;
  [[nodiscard]] virtual NcclResult all_gather(const void* in, void* out, const NcclCall& call) = 0;
  [[nodiscard]] virtual NcclResult reduce_scatter(const void* in, void* out, NcclReduce reduce,
                                                  const NcclCall& call) = 0;
  [[nodiscard]] virtual NcclResult broadcast(const void* in, void* out, int root,
                                             const NcclCall& call) = 0;
  [[nodiscard]] virtual NcclResult send(const void* in, int to, const NcclCall& call) = 0;
  [[nodiscard]] virtual NcclResult recv(void* out, int from, const NcclCall& call) = 0;
  [[nodiscard]] virtual NcclResult group_start() = 0;
  [[nodiscard]] virtual NcclResult group_end() = 0;

  [[nodiscard]] virtual std::string error_string(NcclResult result) = 0;
  [[nodiscard]] virtual std::string last_error(NcclComm comm) = 0;  // empty when there is none
};

// The element type and operation of a reduction. Logical or of bool is the maximum of its bytes;
// nothing where NCCL has no such reduction (or of integers, 16-bit integers, complex types).
struct NcclReduction {
  NcclType type;
  NcclReduce reduce;
};
[[nodiscard]] std::optional<NcclReduction> nccl_reduction_of(at::ScalarType type, ReduceOp op);

}  // namespace capstan::comm
