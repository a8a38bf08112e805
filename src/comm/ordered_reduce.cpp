// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "comm/ordered_reduce_internal.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <type_traits>

#include "capstan/base/error.h"
#include "capstan/comm/backend.h"

namespace capstan::comm {
namespace {

constexpr int64_t kBlock = 1024;  // elements whose accumulators stay in the first-level cache

// Integers wrap around like the two's complement numbers they are; unsigned arithmetic makes that
// defined.
template <class T>
struct SumType {
  using type = T;
};
template <>
struct SumType<c10::Half> {
  using type = float;
};
template <>
struct SumType<c10::BFloat16> {
  using type = float;
};
template <>
struct SumType<int64_t> {
  using type = uint64_t;
};
template <>
struct SumType<int32_t> {
  using type = uint32_t;
};
template <>
struct SumType<int16_t> {
  using type = uint32_t;
};
template <>
struct SumType<int8_t> {
  using type = uint32_t;
};
template <>
struct SumType<uint8_t> {
  using type = uint32_t;
};

struct Sum {
  template <class A>
  A operator()(A a, A b) const {
    return a + b;
  }
};
struct Max {  // a NaN on either side stays
  template <class A>
  A operator()(A a, A b) const {
    return (b > a || b != b) ? b : a;
  }
};
struct Min {
  template <class A>
  A operator()(A a, A b) const {
    return (b < a || b != b) ? b : a;
  }
};
struct Or {
  template <class A>
  A operator()(A a, A b) const {
    return static_cast<A>(a | b);
  }
};

template <class T, class A, class Combine>
void reduce(std::span<const std::byte* const> sources, std::byte* target, int64_t count,
            Combine combine) {
  alignas(64) A sum[kBlock];
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t n = std::min(kBlock, count - begin);
    const T* first = reinterpret_cast<const T*>(sources[0]) + begin;
    for (int64_t i = 0; i < n; ++i) sum[i] = static_cast<A>(first[i]);
    for (size_t r = 1; r < sources.size(); ++r) {
      const T* next = reinterpret_cast<const T*>(sources[r]) + begin;
      for (int64_t i = 0; i < n; ++i) sum[i] = combine(sum[i], static_cast<A>(next[i]));
    }
    T* out = reinterpret_cast<T*>(target) + begin;
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(sum[i]);
  }
}

template <class T>
void reduce_as(ReduceOp op, std::span<const std::byte* const> sources, std::byte* target,
               int64_t count) {
  using Float = typename SumType<T>::type;
  using Plain = std::conditional_t<std::is_floating_point_v<Float>, Float, T>;
  switch (op) {
    case ReduceOp::kSum:
      if constexpr (!std::is_same_v<T, bool>) reduce<T, Float>(sources, target, count, Sum{});
      return;
    case ReduceOp::kMax:
      return reduce<T, Plain>(sources, target, count, Max{});
    case ReduceOp::kMin:
      return reduce<T, Plain>(sources, target, count, Min{});
    case ReduceOp::kOr:
      if constexpr (!std::is_floating_point_v<Plain>)
        reduce<T, Plain>(sources, target, count, Or{});
      return;
  }
}

}  // namespace

void check_reducible(at::ScalarType type, ReduceOp op) {
  const bool is_float =
      type == at::kDouble || type == at::kFloat || type == at::kHalf || type == at::kBFloat16;
  const bool is_integer = type == at::kLong || type == at::kInt || type == at::kShort ||
                          type == at::kChar || type == at::kByte;
  const bool ok =
      is_float ? op != ReduceOp::kOr : (is_integer || (type == at::kBool && op != ReduceOp::kSum));
  if (ok) return;
  throw InternalError(
      ErrorText{.module = "comm",
                .what = std::string("reducing with ") + name_of(op),
                .got = std::string("elements of type ") + c10::toString(type),
                .need = "fp64, fp32, bf16, fp16 or integers (or: integers and bool)"});
}

void reduce_in_rank_order(at::ScalarType type, ReduceOp op,
                          std::span<const std::byte* const> sources, std::byte* target,
                          int64_t count) {
  check_reducible(type, op);
  switch (type) {
    case at::kDouble:
      return reduce_as<double>(op, sources, target, count);
    case at::kFloat:
      return reduce_as<float>(op, sources, target, count);
    case at::kBFloat16:
      return reduce_as<c10::BFloat16>(op, sources, target, count);
    case at::kHalf:
      return reduce_as<c10::Half>(op, sources, target, count);
    case at::kLong:
      return reduce_as<int64_t>(op, sources, target, count);
    case at::kInt:
      return reduce_as<int32_t>(op, sources, target, count);
    case at::kShort:
      return reduce_as<int16_t>(op, sources, target, count);
    case at::kChar:
      return reduce_as<int8_t>(op, sources, target, count);
    case at::kByte:
      return reduce_as<uint8_t>(op, sources, target, count);
    default:
      return reduce_as<bool>(op, sources, target, count);
  }
}

}  // namespace capstan::comm
