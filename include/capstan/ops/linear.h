// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// y = x W^T + b for a projection: one weight, or several joined by rows (q,k,v; gate,up) in one
// GEMM. The weight's gradient is multiplied straight into its GradSlot. Legend: D input features, O
// output features (of all parts), N tokens.
#pragma once
#include "capstan/ops/fp8_linear.h"
#include "capstan/ops/record.h"

namespace capstan::ops {

// x [..., D] in compute dtype -> [..., O]. with_bias = false leaves the bias to a later add_bias
// (row-parallel layers add it once, after their reduction).
[[nodiscard]] Tensor linear(const Tensor& x, const Projection& projection, bool with_bias = true,
                            LinearMode mode = {});
// y + b; y is consumed (written in place). Returns y itself for a projection without bias.
[[nodiscard]] Tensor add_bias(const Tensor& y, const Projection& projection);

// out = a b in the wider of their types: a weight may be kept wide beside narrow activations.
void multiply_into(Tensor out, const Tensor& a, const Tensor& b);
// Pieces for layers that place a collective between them. No autograd.
[[nodiscard]] Tensor linear_forward(const Tensor& x, const Tensor& weight_OD, const Tensor& bias_O);
[[nodiscard]] Tensor linear_input_gradient(const Tensor& grad,
                                           const Tensor& weight_OD);  // [..., D]
// The same by the mode of the pass.
[[nodiscard]] Tensor linear_forward(const Tensor& x, const Projection& projection, bool with_bias,
                                    LinearMode mode);
[[nodiscard]] Tensor linear_input_gradient(const Tensor& grad, const Projection& projection,
                                           LinearMode mode);
// Hands grad^T x (and the column sums of grad for the bias) to the projection's store; it may run
// later.
void linear_weight_gradient(const Projection& projection, const Tensor& grad, const Tensor& x,
                            bool with_bias, LinearMode mode = {});
// The bias part alone; nothing for a projection without bias.
void linear_bias_gradient(const Projection& projection, const Tensor& grad);
// How a layer adds its weight's gradient; given `sums_O`, it may set it to the sums of the gradient
// over all tokens.
using AddWeightGradient = std::function<void(param::GradSlot& slot, Tensor* sums_O)>;
// Hands `add` to the projection's store, and the bias's gradient: the sums where the weight's
// gradient is added at once and brings them, else those of grad_NO.
void linear_gradients(const Projection& projection, const Tensor& grad_NO, bool with_bias,
                      const AddWeightGradient& add);
// slot (+)= grad_NO^T x_ND, in one GEMM into the buffer when the dtypes agree, and on GPUs also
// from 16-bit factors into an fp32 buffer; there it sets sums_O, in fp32, where asked to.
void add_outer_product(param::GradSlot& slot, const Tensor& grad_NO, const Tensor& x_ND,
                       Tensor* sums_O = nullptr);
void add_outer_product(param::GradSlot& slot, const Tensor& grad_NO, const Tensor& x_ND,
                       const Projection& projection, LinearMode mode, Tensor* sums_O = nullptr);

}  // namespace capstan::ops
