// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// SwiGLU, GEGLU and GELU: out = act(x) [x up]; backward dx = grad act'(x) [x up], dup = grad
// act(x). Memory per output element: gated forward 2 reads, 1 write; backward 3 reads, 2 writes.
// Reference: src/ops/swiglu.cpp, tests/kernels/activation_test.cpp.
#include "capstan/kernels/activation.h"

#include "dispatch.h"

namespace capstan::kernels {
namespace {

template <class A>
struct Slope {
  A value, slope;
};

struct Silu {
  template <class A>
  __device__ __forceinline__ Slope<A> operator()(A g) const {
    const A s = sigmoid_of(g);
    return {g * s, s * (A(1) + g * (A(1) - s))};
  }
};
struct GeluTanh {
  template <class A>
  __device__ __forceinline__ Slope<A> operator()(A g) const {
    constexpr A kRoot = A(0.79788456080286535588), kCube = A(0.044715);
    const A t = tanh_of(kRoot * (g + kCube * g * g * g)), half = A(0.5) * (A(1) + t);
    return {g * half, half + A(0.5) * g * (A(1) - t * t) * kRoot * (A(1) + A(3) * kCube * g * g)};
  }
};
struct GeluErf {
  template <class A>
  __device__ __forceinline__ Slope<A> operator()(A g) const {
    constexpr A kRootHalf = A(0.70710678118654752440), kDensity = A(0.39894228040143267794);
    const A half = A(0.5) * (A(1) + erf_of(g * kRootHalf));
    return {g * half, half + g * kDensity * exp_of(A(-0.5) * g * g)};
  }
};

template <class T, class Act, int N>
__global__ void forward_rows(const ActivationArgs a) {
  using A = Wide<T>;
  const int64_t row_width = a.gated ? 2 * a.features : a.features;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const T* const x = static_cast<const T*>(a.x) + row * row_width;
    T* const out = static_cast<T*>(a.out) + row * a.features;
    for (int64_t f = threadIdx.x * N; f < a.features; f += static_cast<int64_t>(blockDim.x) * N) {
      const Vec<T, N> gate = load<N>(x + f);
      Vec<T, N> up{}, y;
      if (a.gated) up = load<N>(x + a.features + f);
      CAPSTAN_UNROLL
      for (int j = 0; j < N; ++j) {
        const A value = Act{}(static_cast<A>(widen(gate.at[j]))).value;
        y.at[j] = narrow<T>(a.gated ? value * widen(up.at[j]) : value);
      }
      store(out + f, y);
    }
  }
}

template <class T, class Act, int N>
__global__ void backward_rows(const ActivationArgs a) {
  using A = Wide<T>;
  const int64_t row_width = a.gated ? 2 * a.features : a.features;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) {
    const T* const x = static_cast<const T*>(a.x) + row * row_width;
    const T* const grad = static_cast<const T*>(a.grad) + row * a.features;
    T* const out = static_cast<T*>(a.out) + row * row_width;
    for (int64_t f = threadIdx.x * N; f < a.features; f += static_cast<int64_t>(blockDim.x) * N) {
      const Vec<T, N> gate = load<N>(x + f), dy = load<N>(grad + f);
      Vec<T, N> up{}, d_gate, d_up;
      if (a.gated) up = load<N>(x + a.features + f);
      CAPSTAN_UNROLL
      for (int j = 0; j < N; ++j) {
        const Slope<A> act = Act{}(static_cast<A>(widen(gate.at[j])));
        const A d = widen(dy.at[j]);
        d_gate.at[j] = narrow<T>(a.gated ? d * widen(up.at[j]) * act.slope : d * act.slope);
        d_up.at[j] = narrow<T>(d * act.value);
      }
      store(out + f, d_gate);
      if (a.gated) store(out + a.features + f, d_up);
    }
  }
}

template <class T, class Act, int N>
void launch_rows(const ActivationArgs& args, Stream stream) {
  const LaunchShape shape{args.rows, threads_for_row((args.features + N - 1) / N, 2, 256), 0};
  if (args.grad)
    launch("activation_backward", shape, stream, backward_rows<T, Act, N>, args);
  else
    launch("activation_forward", shape, stream, forward_rows<T, Act, N>, args);
}

template <class T, class Act>
void launch_activation(const ActivationArgs& args, Stream stream) {
  constexpr int kN = kVector<T>;
  if (are_aligned({args.x, args.grad, args.out}) && args.features % kN == 0)
    launch_rows<T, Act, kN>(args, stream);
  else
    launch_rows<T, Act, 1>(args, stream);
}

void dispatch(const char* name, const ActivationArgs& args, Stream stream) {
  check_sizes(name, {args.rows, args.features});
  if (args.rows == 0 || args.features == 0) return;
  check_present(name, {{"x", args.x}, {"out", args.out}});
  with_float(name, args.dtype, [&](auto tag) {
    using T = TypeOf<decltype(tag)>;
    switch (args.activation) {
      case Activation::kSilu:
        return launch_activation<T, Silu>(args, stream);
      case Activation::kGeluTanh:
        return launch_activation<T, GeluTanh>(args, stream);
      case Activation::kGeluErf:
        return launch_activation<T, GeluErf>(args, stream);
    }
  });
}

}  // namespace

void activation_forward(const ActivationArgs& args, Stream stream) {
  require(args.grad == nullptr, "activation_forward", "a gradient");
  dispatch("activation_forward", args, stream);
}

void activation_backward(const ActivationArgs& args, Stream stream) {
  if (args.rows > 0 && args.features > 0)
    check_present("activation_backward", {{"grad", args.grad}});
  dispatch("activation_backward", args, stream);
}

}  // namespace capstan::kernels
