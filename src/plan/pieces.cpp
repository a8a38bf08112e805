// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Flat ranges as runs and boxes of global tensors, and flat buffers as gradient buckets.
#include <algorithm>

#include "capstan/base/check.h"
#include "capstan/plan/layout.h"

namespace capstan::plan {
namespace {

// Elements of one step along each dimension of a row-major tensor.
std::vector<int64_t> strides_of(const Shape& shape) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t d = shape.size(); d-- > 1;) strides[d - 1] = strides[d] * shape[d];
  return strides;
}

// Cuts a flat range of a local tensor into boxes of real elements, in memory order.
class BoxCutter {
 public:
  BoxCutter(const LocalParam& param, std::vector<FlatPiece>& pieces, FlatPiece prototype)
      : param_(param), pieces_(pieces), prototype_(std::move(prototype)) {
    strides_ = strides_of(param.local_shape);
    padded_from_ = 0;  // dimensions at or after it, except the first, carry no padding from here on
    for (size_t d = 0; d < param.local_shape.size(); ++d)
      if (param.real.extent[d] != param.local_shape[d]) padded_from_ = d + 1;
  }

  void cut(int64_t begin, int64_t end) {
    std::vector<int64_t> index;
    descend(index, begin, end, 0);
  }

 private:
  // [begin, end) lies within the slice that `index` selects, whose first element is `origin` in the
  // parameter; both are relative to the slice.
  void descend(std::vector<int64_t>& index, int64_t begin, int64_t end, int64_t origin) {
    const size_t d = index.size();
    const int64_t stride = strides_[d];
    int64_t row = begin / stride;
    while (begin < end && row < param_.real.extent[d]) {
      const bool rows_are_whole = begin % stride == 0 && end - begin >= stride;
      const bool rows_have_no_padding = padded_from_ <= d + 1;
      if (rows_are_whole && rows_have_no_padding) {
        const int64_t rows_end = std::min(end / stride, param_.real.extent[d]);
        emit(index, row, rows_end - row, origin + begin);
        begin = rows_end * stride;
        row = rows_end;
        continue;
      }
      const int64_t row_begin = row * stride;
      const int64_t stop = std::min(end, row_begin + stride);
      index.push_back(row);
      descend(index, begin - row_begin, stop - row_begin, origin + row_begin);
      index.pop_back();
      begin = stop;
      ++row;
    }
  }

  void emit(const std::vector<int64_t>& index, int64_t row, int64_t rows, int64_t offset) {
    if (rows <= 0) return;
    FlatPiece piece = prototype_;
    piece.box = param_.real;
    for (size_t d = 0; d < index.size(); ++d) {
      piece.box.begin[d] += index[d];
      piece.box.extent[d] = 1;
    }
    piece.box.begin[index.size()] += row;
    piece.box.extent[index.size()] = rows;
    piece.offset += offset;
    pieces_.push_back(std::move(piece));
  }

  const LocalParam& param_;
  std::vector<FlatPiece>& pieces_;
  FlatPiece prototype_;
  std::vector<int64_t> strides_;
  size_t padded_from_;
};

// The dimensions of a local tensor from which on rows are the same, locally and globally, so that
// neighbouring rows of the dimension before form one run.
size_t run_dimension(const LocalParam& param, const Shape& global) {
  size_t d = global.size() - 1;
  while (d > 0 && param.local_shape[d] == global[d] && param.real.extent[d] == global[d]) --d;
  return d;
}

}  // namespace

void for_each_run(const LocalParam& param, const Shape& global, int64_t begin, int64_t end,
                  const std::function<void(int64_t, int64_t, int64_t)>& visit) {
  CAPSTAN_CHECK(!global.empty() && global.size() == param.local_shape.size(),
                "a local part of {} dimensions for a tensor of {}", param.local_shape.size(),
                global.size());
  CAPSTAN_CHECK(begin >= 0 && end <= param.numel(), "range [{}, {}) of {} elements", begin, end,
                param.numel());
  if (param.real.numel() == 0) return;
  const std::vector<int64_t> local_strides = strides_of(param.local_shape);
  const std::vector<int64_t> global_strides = strides_of(global);
  const size_t run_dim = run_dimension(param, global);
  const int64_t run_stride = param.local_shape[run_dim] * local_strides[run_dim];
  const int64_t run_real = param.real.extent[run_dim] * local_strides[run_dim];
  for (int64_t run = begin / run_stride; run * run_stride < end; ++run) {
    const int64_t run_begin = run * run_stride;
    const int64_t from = std::max(begin, run_begin), to = std::min(end, run_begin + run_real);
    int64_t place = param.real.begin[run_dim] * global_strides[run_dim];
    bool is_real = from < to;
    for (size_t d = 0; d < run_dim; ++d) {
      const int64_t at = run_begin / local_strides[d] % param.local_shape[d];
      is_real = is_real && at < param.real.extent[d];
      place += (param.real.begin[d] + at) * global_strides[d];
    }
    if (is_real) visit(place + from - run_begin, from, to - from);
  }
}

std::vector<FlatPiece> pieces_of(const FlatBuffer& buffer, const std::vector<ParamSpec>& table,
                                 int64_t begin, int64_t end) {
  CAPSTAN_CHECK(begin >= 0 && begin <= end && end <= buffer.numel,
                "range [{}, {}) of a buffer of {} elements", begin, end, buffer.numel);
  std::vector<FlatPiece> pieces;
  for (size_t i = 0; i < buffer.params.size(); ++i) {
    const LocalParam& param = buffer.params[i];
    const ParamSpec& spec = table.at(static_cast<size_t>(param.spec));
    CAPSTAN_CHECK(spec.shape.size() == param.local_shape.size() && !spec.shape.empty(),
                  "{}: the layout was made for another table", spec.name);
    const int64_t from = std::max(begin, param.flat_begin) - param.flat_begin;
    const int64_t to = std::min(end, param.flat_begin + param.numel()) - param.flat_begin;
    if (from >= to || param.real.numel() == 0) continue;
    FlatPiece prototype;
    prototype.param = static_cast<int>(i);
    prototype.offset = param.flat_begin - begin;
    BoxCutter(param, pieces, std::move(prototype)).cut(from, to);
  }
  return pieces;
}

std::vector<std::vector<int>> make_buckets(const RankLayout& layout, DType gradients,
                                           int64_t bucket_bytes) {
  std::vector<int> order;  // backward: last block first; buffers of one block in their order
  for (int i = 0; i < static_cast<int>(layout.buffers.size()); ++i)
    if (layout.buffers[static_cast<size_t>(i)].trainable) order.push_back(i);
  const auto buffer_at = [&](int i) -> const FlatBuffer& {
    return layout.buffers[static_cast<size_t>(i)];
  };
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return buffer_at(a).block > buffer_at(b).block; });
  const auto element = static_cast<int64_t>(size_of(gradients));
  std::vector<std::vector<int>> buckets;
  int64_t filled = 0;
  for (const int i : order) {
    const int64_t bytes = buffer_at(i).numel * element;
    const bool joins = !buckets.empty() && filled + bytes <= bucket_bytes &&
                       buffer_at(i).shard_axes.empty() &&
                       buffer_at(buckets.back().back()).sum_axes == buffer_at(i).sum_axes;
    if (!joins) {
      buckets.emplace_back();
      filled = 0;
    }
    buckets.back().push_back(i);
    filled += bytes;
  }
  return buckets;
}

SharedGradients share_gradients(const RankLayout& layout, bool tied, int zero_stage) {
  SharedGradients out{.begin = std::vector<int64_t>(layout.buffers.size(), 0), .numel = 0};
  const auto place = [&](int block, int64_t begin) {
    for (size_t i = 0; i < layout.buffers.size(); ++i) {
      const FlatBuffer& buffer = layout.buffers[i];
      if (buffer.block != block || !buffer.trainable) continue;
      out.begin[i] = begin;
      begin += zero_stage >= 2 ? buffer.shard_numel() : buffer.numel;
    }
    out.numel = std::max(out.numel, begin);
  };
  for (const int block : layout.blocks)
    if (!tied || block > 0) place(block, 0);
  if (tied) place(0, out.numel);
  return out;
}

}  // namespace capstan::plan
