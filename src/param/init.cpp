// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/param/init.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "capstan/base/check.h"
#include "capstan/base/philox.h"
#include "param/cpu/fill_normal.h"

namespace capstan::param {
namespace {

// Elements per task: long enough to hide the start of a task.
constexpr int64_t kTaskElements = 16384;

// A box as rows: runs of `length` elements that are contiguous in the global tensor and in the box.
struct Runs {
  int64_t length = 1, count = 1;
  size_t outer_dims = 0;  // dims that enumerate the runs
};

Runs runs_of(const plan::Box& box, const plan::Shape& global) {
  Runs runs;
  size_t dim = global.size();
  while (dim > 0) {
    --dim;
    runs.length *= box.extent[dim];
    if (box.extent[dim] != global[dim]) break;
  }
  runs.outer_dims = dim;
  for (size_t d = 0; d < dim; ++d) runs.count *= box.extent[d];
  return runs;
}

// Global index of the first element of run `run`.
int64_t run_begin(const plan::Box& box, const plan::Shape& global, const Runs& runs, int64_t run) {
  int64_t index = 0, stride = 1;
  for (size_t d = global.size(); d-- > 0;) {
    int64_t coordinate = box.begin[d];
    if (d < runs.outer_dims) {
      coordinate += run % box.extent[d];
      run /= box.extent[d];
    }
    index += coordinate * stride;
    stride *= global[d];
  }
  return index;
}

void fill_run(float* out, size_t count, const cpu::NormalStream& from) {
  cpu::fill_normal().f32(out, count, from);
}
void fill_run(double* out, size_t count, const cpu::NormalStream& from) {
  cpu::fill_normal().f64(out, count, from);
}

template <class T>
void fill_normal(const at::Tensor& out, const plan::ParamSpec& spec, const plan::Box& box,
                 uint64_t seed, uint64_t stream) {
  const Runs runs = runs_of(box, spec.shape);
  T* const data = out.data_ptr<T>();
  const auto fill = [&](int64_t begin, int64_t end) {
    while (begin < end) {  // [begin, end) may cover many runs or a part of one
      const int64_t run = begin / runs.length, at_element = begin % runs.length;
      const int64_t n = std::min(end - begin, runs.length - at_element);
      const int64_t first = run_begin(box, spec.shape, runs, run) + at_element;
      fill_run(data + begin, static_cast<size_t>(n),
               {seed, stream, static_cast<uint64_t>(first), spec.init.deviation});
      begin += n;
    }
  };
  at::parallel_for(0, out.numel(), kTaskElements, fill);
}

}  // namespace

std::optional<BoxRuns> equal_runs(const plan::Box& box, const plan::Shape& global) {
  const Runs runs = runs_of(box, global);
  if (runs.length == 0 || runs.count == 0) return std::nullopt;
  const auto begin = [&](int64_t run) { return run_begin(box, global, runs, run); };
  BoxRuns equal{.first = begin(0), .length = runs.length, .stride = runs.length};
  if (runs.count == 1) return equal;
  equal.stride = begin(1) - begin(0);
  for (int64_t run = 2; run < runs.count; ++run)
    if (begin(run) - begin(run - 1) != equal.stride) return std::nullopt;
  return equal;
}

uint64_t init_stream(const std::string& model_name, const std::string& param_name) {
  return philox::stream_of("init", model_name + "/" + param_name);
}

at::Tensor init_values(const plan::ParamSpec& spec, const plan::Box& box, uint64_t seed,
                       const std::string& model_name, at::ScalarType dtype) {
  CAPSTAN_CHECK(box.extent.size() == spec.shape.size() && box.begin.size() == spec.shape.size(),
                "box of {} dims for parameter {} of {}", box.extent.size(), spec.name,
                spec.shape.size());
  for (size_t d = 0; d < spec.shape.size(); ++d)
    CAPSTAN_CHECK(
        box.begin[d] >= 0 && box.extent[d] >= 0 && box.begin[d] + box.extent[d] <= spec.shape[d],
        "box [{}, +{}) of dim {} lies outside {} of size {}", box.begin[d], box.extent[d], d,
        spec.name, spec.shape[d]);
  const bool wide = dtype == at::kDouble;
  at::Tensor out =
      at::empty(box.extent, at::TensorOptions().dtype(wide ? at::kDouble : at::kFloat));
  switch (spec.init.kind) {
    case plan::Init::Kind::kZeros:
      out.zero_();
      break;
    case plan::Init::Kind::kOnes:
      out.fill_(1);
      break;
    case plan::Init::Kind::kNormal: {
      const uint64_t stream = init_stream(model_name, spec.name);
      if (out.numel() == 0) break;
      if (wide)
        fill_normal<double>(out, spec, box, seed, stream);
      else
        fill_normal<float>(out, spec, box, seed, stream);
    }
  }
  return out.to(dtype);
}

}  // namespace capstan::param
