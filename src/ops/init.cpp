// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/ops/init.h"

#include <ATen/ATen.h>

#include "capstan/base/check.h"
#include "capstan/ops/path.h"
#include "ops/on_device_internal.h"

namespace capstan::ops {
namespace {

void fill_on_device(const at::Tensor& out, const plan::ParamSpec& spec, const param::BoxRuns& runs,
                    uint64_t seed, uint64_t stream) {
  device_kernels()->fill_normal({.dtype = *on_device::dtype_of(out),
                                 .out = out.mutable_data_ptr(),
                                 .count = out.numel(),
                                 .seed = seed,
                                 .stream = stream,
                                 .first = static_cast<uint64_t>(runs.first),
                                 .length = runs.length,
                                 .stride = runs.stride,
                                 .deviation = spec.init.deviation},
                                on_device::stream());
}

}  // namespace

void fill_init_values(const at::Tensor& out, const plan::ParamSpec& spec, const plan::Box& box,
                      uint64_t seed, const std::string& model_name) {
  CAPSTAN_CHECK(out.is_contiguous() && out.numel() == plan::numel(box.extent),
                "initial values of {} for a tensor of {} elements, box of {}", spec.name,
                out.numel(), plan::numel(box.extent));
  if (path_of(out) == Path::kDevice && spec.init.kind == plan::Init::Kind::kNormal) {
    if (const auto runs = param::equal_runs(box, spec.shape))
      return fill_on_device(out, spec, *runs, seed, param::init_stream(model_name, spec.name));
  }
  out.copy_(param::init_values(spec, box, seed, model_name, out.scalar_type()).view_as(out));
}

}  // namespace capstan::ops
