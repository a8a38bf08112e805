// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Router: scores s = softmax(l) or sigmoid(l), top-k of s + bias, weights w = scaling s_j / sum s.
// Backward by the logits: through the weights, the balance loss and z logsumexp^2. A warp per
// token, scores in shared memory. Memory per logit: one read, one write. Reference:
// src/ops/router.cpp, src/ops/router_choice.cpp.
#include "capstan/kernels/router.h"

#include "dispatch.h"
#include "reduce.cuh"

namespace capstan::kernels {
namespace {

constexpr int kMostExperts = 512, kMostChoices = 32, kMostGroups = 32;
constexpr int kTokensPerBlock = 4, kPerLane = kMostExperts / kWarp;
constexpr unsigned kAll = 0xffffffffu;

template <class A>
struct Candidate {
  A value;
  int index;  // negative: none
};

// Numbers before NaN, then the larger value, then the lower index.
template <class A>
__device__ __forceinline__ bool is_better(const Candidate<A>& a, const Candidate<A>& b) {
  if (a.index < 0 || b.index < 0) return b.index < 0 && a.index >= 0;
  const bool a_number = a.value == a.value, b_number = b.value == b.value;
  if (a_number != b_number) return a_number;
  if (a_number && a.value != b.value) return a.value > b.value;
  return a.index < b.index;
}

template <class A>
__device__ __forceinline__ Candidate<A> best_of_warp(Candidate<A> mine) {
  CAPSTAN_UNROLL
  for (int step = 16; step > 0; step /= 2) {
    const Candidate<A> other{__shfl_xor_sync(kAll, mine.value, step),
                             __shfl_xor_sync(kAll, mine.index, step)};
    if (is_better(other, mine)) mine = other;
  }
  return mine;
}

__device__ __forceinline__ int lane_of() { return static_cast<int>(threadIdx.x % kWarp); }

// Scores of the warp's token into `scores`; returns logsumexp of the logits.
template <class A>
__device__ A make_scores(const A* logits, int experts, bool sigmoid, A* scores) {
  A top = static_cast<A>(-INFINITY), sum = 0;
  for (int e = lane_of(); e < experts; e += kWarp) top = Max{}(top, logits[e]);
  top = warp_reduce(top, Max{});
  for (int e = lane_of(); e < experts; e += kWarp) sum += exp_of(logits[e] - top);
  sum = warp_reduce(sum, Sum{});
  for (int e = lane_of(); e < experts; e += kWarp)
    scores[e] = sigmoid ? sigmoid_of(logits[e]) : exp_of(logits[e] - top) / sum;
  __syncwarp();
  return top + log_of(sum);
}

template <class A>
__device__ __forceinline__ A choice_value(const A* scores, const A* bias, int e) {
  return bias ? scores[e] + bias[e] : scores[e];
}

// A bit per group that experts may come from.
template <class A>
__device__ unsigned open_groups(const RouterShape& s, const A* scores, const A* bias) {
  const int size = static_cast<int>(s.experts / s.groups), lane = lane_of();
  Candidate<A> mine{A(0), -1};
  if (lane < s.groups) {
    A first = choice_value(scores, bias, lane * size), second = 0;
    for (int i = 1; i < size; ++i) {
      const A v = choice_value(scores, bias, lane * size + i);
      second = i == 1 || v > second ? v : second;
      if (second > first) {
        const A swap = first;
        first = second;
        second = swap;
      }
    }
    mine = {first + second, lane};
  }
  unsigned open = 0;
  for (int i = 0; i < s.groups_per_token; ++i) {
    const Candidate<A> best = best_of_warp(mine);
    open |= 1u << best.index;
    if (best.index == lane) mine.index = -1;
  }
  return open;
}

// The expert of the warp's lane-th choice.
template <class A>
__device__ int choose(const RouterShape& s, const A* scores, const A* bias) {
  const int experts = static_cast<int>(s.experts), lane = lane_of();
  const int size = static_cast<int>(s.experts / s.groups);
  const unsigned open = s.groups > 1 ? open_groups(s, scores, bias) : 1u;
  unsigned taken = 0;  // a bit per expert of this lane
  int mine = 0;
  for (int j = 0; j < s.per_token; ++j) {
    Candidate<A> best{A(0), -1};
    for (int i = 0; i < kPerLane; ++i) {
      const int e = i * kWarp + lane;
      if (e >= experts || (taken >> i & 1u) != 0 || (open >> (e / size) & 1u) == 0) continue;
      const Candidate<A> next{choice_value(scores, bias, e), e};
      if (is_better(next, best)) best = next;
    }
    best = best_of_warp(best);
    if (best.index % kWarp == lane) taken |= 1u << (best.index / kWarp);
    if (j == lane) mine = best.index;
  }
  return mine;
}

// Sum of the chosen scores, kept away from 0 as on the CPU.
template <class A>
__device__ __forceinline__ A total_of(A score) {
  return warp_reduce(score, Sum{}) + static_cast<A>(1e-20);
}

template <class A>
__global__ void forward_kernel(const RouterForwardArgs a) {
  __shared__ A shared[kTokensPerBlock][kMostExperts];
  const RouterShape& s = a.shape;
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = lane_of();
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kTokensPerBlock + warp;
  if (n >= s.tokens) return;
  A* const scores = shared[warp];
  make_scores(static_cast<const A*>(a.logits) + n * s.experts, static_cast<int>(s.experts),
              s.sigmoid, scores);
  for (int e = lane; e < s.experts; e += kWarp)
    static_cast<A*>(a.scores)[n * s.experts + e] = scores[e];
  const int expert = choose(s, scores, static_cast<const A*>(a.bias));
  const bool is_choice = lane < s.per_token;
  const A score = is_choice ? scores[expert] : A(0);
  const A total = total_of(score);
  if (!is_choice) return;
  a.chosen[n * s.per_token + lane] = expert;
  static_cast<A*>(a.weights)[n * s.per_token + lane] =
      (s.normalize ? score / total : score) * static_cast<A>(s.scaling);
}

// Gradient of the scores by that of the weights, into `grads`.
template <class A>
__device__ void weight_gradient(const RouterBackwardArgs& a, int64_t n, const A* scores, A* grads) {
  const RouterShape& s = a.shape;
  const int lane = lane_of();
  const bool is_choice = lane < s.per_token;
  const int expert = is_choice ? static_cast<int>(a.chosen[n * s.per_token + lane]) : 0;
  const A score = is_choice ? scores[expert] : A(0);
  const A grad = is_choice ? static_cast<const A*>(a.grad_weights)[n * s.per_token + lane] : A(0);
  const A total = total_of(score), mean = warp_reduce(grad * score, Sum{}) / total;
  for (int e = lane; e < s.experts; e += kWarp) grads[e] = 0;
  __syncwarp();
  const A scaling = static_cast<A>(s.scaling);
  if (is_choice) grads[expert] = s.normalize ? (grad - mean) * (scaling / total) : grad * scaling;
  __syncwarp();
}

template <class A>
__device__ void balance_gradient(const RouterBackwardArgs& a, int64_t n, const A* scores,
                                 A* grads) {
  const int64_t experts = a.shape.experts;
  const A* const balance = static_cast<const A*>(a.balance) + a.row[n] * experts;
  A total = 1, mean = 0;
  if (a.shape.sigmoid) {
    A sum = 0, product = 0;
    for (int e = lane_of(); e < experts; e += kWarp) {
      sum += scores[e];
      product += balance[e] * scores[e];
    }
    total = total_of(sum);
    mean = warp_reduce(product, Sum{}) / total;
  }
  for (int e = lane_of(); e < experts; e += kWarp) grads[e] += (balance[e] - mean) / total;
}

template <class A>
__global__ void backward_kernel(const RouterBackwardArgs a) {
  __shared__ A shared[kTokensPerBlock][2][kMostExperts];
  const RouterShape& s = a.shape;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kTokensPerBlock + warp;
  if (n >= s.tokens) return;
  A* const scores = shared[warp][0];
  A* const grads = shared[warp][1];
  const A* const logits = static_cast<const A*>(a.logits) + n * s.experts;
  const A lse = make_scores(logits, static_cast<int>(s.experts), s.sigmoid, scores);
  weight_gradient(a, n, scores, grads);
  if (a.balance) balance_gradient(a, n, scores, grads);
  A mean = 0;
  for (int e = lane_of(); e < s.experts; e += kWarp) mean += grads[e] * scores[e];
  mean = warp_reduce(mean, Sum{});
  for (int e = lane_of(); e < s.experts; e += kWarp) {
    const A score = scores[e];
    A d = s.sigmoid ? grads[e] * score * (A(1) - score) : (grads[e] - mean) * score;
    if (a.z != 0) {
      const A soft = s.sigmoid ? exp_of(logits[e] - lse) : score;
      d += soft * lse * static_cast<A>(2 * a.z);
    }
    static_cast<A*>(a.grad_logits)[n * s.experts + e] = d;
  }
}

bool check_shape(const char* name, const RouterShape& s) {
  check_sizes(name, {s.tokens, s.experts, s.per_token});
  require(s.experts >= 1 && s.experts <= kMostExperts && s.groups >= 1 && s.groups <= kMostGroups &&
              s.experts % s.groups == 0 && s.groups_per_token >= 1 &&
              s.groups_per_token <= s.groups,
          name, "{} experts, in {} of {} groups", {s.experts, s.groups_per_token, s.groups});
  require(s.per_token >= 1 && s.per_token <= kMostChoices &&
              s.per_token <= s.experts / s.groups * s.groups_per_token,
          name, "{} of {} experts", {s.per_token, s.experts});
  return s.tokens > 0;
}

template <class Visit>
void with_wide(const char* name, DType dtype, const Visit& visit) {
  if (dtype == DType::kFp32) return visit(Tag<float>{});
  if (dtype == DType::kFp64) return visit(Tag<double>{});
  throw_bad_dtype(name, {dtype});
}

LaunchShape shape_of(const RouterShape& s) {
  return {(s.tokens + kTokensPerBlock - 1) / kTokensPerBlock, kTokensPerBlock * kWarp, 0};
}

}  // namespace

void router_forward(const RouterForwardArgs& args, Stream stream) {
  if (!check_shape("router_forward", args.shape)) return;
  check_present("router_forward", {{"logits", args.logits},
                                   {"scores", args.scores},
                                   {"chosen", args.chosen},
                                   {"weights", args.weights}});
  with_wide("router_forward", args.shape.dtype, [&](auto tag) {
    launch("router_forward", shape_of(args.shape), stream, forward_kernel<TypeOf<decltype(tag)>>,
           args);
  });
}

void router_backward(const RouterBackwardArgs& args, Stream stream) {
  if (!check_shape("router_backward", args.shape)) return;
  check_present("router_backward", {{"logits", args.logits},
                                    {"chosen", args.chosen},
                                    {"grad_weights", args.grad_weights},
                                    {"grad_logits", args.grad_logits}});
  if (args.balance) check_present("router_backward", {{"row", args.row}});
  with_wide("router_backward", args.shape.dtype, [&](auto tag) {
    launch("router_backward", shape_of(args.shape), stream, backward_kernel<TypeOf<decltype(tag)>>,
           args);
  });
}

}  // namespace capstan::kernels
