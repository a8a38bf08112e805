// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Calls of cpu/product_kernels.h: scratch, threads, parts of large matrices.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "capstan/ops/path.h"
#include "ops/cpu/product_kernels.h"
#include "ops/gemm_internal.h"

namespace capstan::ops {
namespace {

// Of a factor's panels at a time, which bounds the scratch and stays near the caches.
constexpr int64_t kMostPackedElements = int64_t{4} << 20;

bool has_adjacent_lines(const Tensor& x) { return x.stride(0) == 1 || x.stride(1) == 1; }

cpu::PairMatrix matrix_of(const Tensor& x) {
  return {static_cast<const uint16_t*>(x.const_data_ptr()), x.stride(0), x.stride(1)};
}

// Rows or columns whose panels are packed together.
int64_t part_of(int64_t side, int64_t depth) {
  const int64_t panels = kMostPackedElements / cpu::panel_elements(depth);
  return std::min(side, std::max<int64_t>(panels, 1) * cpu::kPanelSide);
}

uint16_t* panels_for(const Tensor& scratch) {
  return static_cast<uint16_t*>(scratch.mutable_data_ptr());
}

Tensor scratch_for(int64_t side, int64_t depth) {
  return at::empty({cpu::panels_of(side) * cpu::panel_elements(depth)}, at::kBFloat16);
}

void run(cpu::ProductKernels::Kernel kernel, const cpu::ProductArgs& args, int64_t tasks) {
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

// a and b are parts of the product's factors, out that of its result.
cpu::ProductArgs arguments(const Product& p) {
  return {.rows = p.out_MN.size(0),
          .columns = p.out_MN.size(1),
          .depth = p.a_MK.size(1),
          .a = matrix_of(p.a_MK),
          .b = matrix_of(p.b_KN),
          .out = p.out_MN.mutable_data_ptr<float>(),
          .out_row = p.out_MN.stride(0),
          .adds = p.accumulates};
}

}  // namespace

bool adds_wide(c10::Device device, at::ScalarType type) {
  if (path() != Path::kFused) return false;
  if (device.is_cpu()) return type == at::kBFloat16 && cpu::product_kernels();
  return type == at::kBFloat16 || type == at::kHalf;
}

bool is_for_tiles(const Product& p) {
  const Tensor &a = p.a_MK, &b = p.b_KN, &out = p.out_MN;
  return out.is_cpu() && adds_wide(out.device(), a.scalar_type()) &&
         b.scalar_type() == a.scalar_type() && out.scalar_type() == at::kFloat && a.numel() > 0 &&
         b.numel() > 0 && out.stride(1) == 1 && has_adjacent_lines(a) && has_adjacent_lines(b);
}

void multiply_on_tiles(const Product& p) {
  const int64_t rows = p.out_MN.size(0), columns = p.out_MN.size(1), depth = p.a_MK.size(1);
  const int64_t row_part = part_of(rows, depth), column_part = part_of(columns, depth);
  const Tensor panels_a = scratch_for(row_part, depth), panels_b = scratch_for(column_part, depth);
  const cpu::ProductKernels& kernels = *cpu::product_kernels();
  for (int64_t n = 0; n < columns; n += column_part)
    for (int64_t m = 0; m < rows; m += row_part) {
      const int64_t down = std::min(row_part, rows - m),
                    across = std::min(column_part, columns - n);
      cpu::ProductArgs args = arguments({.out_MN = p.out_MN.narrow(0, m, down).narrow(1, n, across),
                                         .a_MK = p.a_MK.narrow(0, m, down),
                                         .b_KN = p.b_KN.narrow(1, n, across),
                                         .accumulates = p.accumulates});
      args.panels_a = panels_for(panels_a);
      args.panels_b = panels_for(panels_b);
      run(kernels.pack, args, cpu::panels_of(down) + cpu::panels_of(across));
      run(kernels.multiply, args, cpu::blocks_of(args));
    }
}

}  // namespace capstan::ops
