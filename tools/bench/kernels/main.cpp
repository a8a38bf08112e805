// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// capstan_kernels_bench: us, GB/s and the ratio to a device copy for every memory-bound kernel at
// training sizes. GB/s counts the bytes that a kernel must move, not what it does move.
#include <fmt/core.h>

#include <cmath>
#include <exception>
#include <random>

#include "capstan/base/error.h"
#include "capstan/kernels/api.h"
#include "timing.h"

namespace capstan::bench {
namespace {

using namespace kernels;

constexpr auto k16 = DType::kBf16, k32 = DType::kFp32;

const Api& api() { return cuda_api(); }
size_t size(int64_t count, int64_t bytes) { return static_cast<size_t>(count * bytes); }
std::string shape_text(int64_t rows, int64_t width) { return fmt::format("{} x {}", rows, width); }

void norm(int64_t rows, int64_t width, DType residual) {
  const int64_t r = residual == k32 ? 4 : 2, n = rows * width;
  const DeviceMemory x(size(n, r)), hidden(size(n, 2)), weight(size(width, 2)), sum(size(n, r)),
      normed(size(n, 2)), mean(size(rows, 4)), rstd(size(rows, 4)), grad_weight(size(width, 4)),
      grad_bias(size(width, 4)), partial(size(2 * norm_partial_rows(rows) * width, 4));
  const NormTypes types{residual, k16, k16};
  NormForwardArgs f{.types = types,
                    .shape = {rows, width},
                    .residual = x.data(),
                    .hidden = hidden.data(),
                    .weight = weight.data(),
                    .sum = sum.data(),
                    .normed = normed.data(),
                    .rstd = rstd.data()};
  NormBackwardArgs b{.types = types,
                     .shape = {rows, width},
                     .x = sum.data(),
                     .rstd = rstd.data(),
                     .weight = weight.data(),
                     .grad = hidden.data(),
                     .grad_residual = x.data(),
                     .dx = x.data(),
                     .d_hidden = residual == k32 ? normed.data() : nullptr,
                     .grad_weight = grad_weight.data(),
                     .partial = partial.data()};
  const double forward_bytes = static_cast<double>(n * (2 * r + 4));
  const double backward_bytes = static_cast<double>(n * (3 * r + 2 + (residual == k32 ? 2 : 0)));
  const std::string shape =
      fmt::format("{}, residual {}", shape_text(rows, width), name_of(residual));
  report("rms_norm_forward", shape, forward_bytes,
         median_us([&](Stream s) { api().rms_norm_forward(f, s); }));
  report("rms_norm_backward", shape, backward_bytes,
         median_us([&](Stream s) { api().rms_norm_backward(b, s); }));
  f.mean = mean.data();
  b.mean = mean.data();
  b.grad_bias = grad_bias.data();
  report("layer_norm_forward", shape, forward_bytes,
         median_us([&](Stream s) { api().layer_norm_forward(f, s); }));
  report("layer_norm_backward", shape, backward_bytes,
         median_us([&](Stream s) { api().layer_norm_backward(b, s); }));
}

void rope(int64_t rows, int64_t heads, int64_t head_size) {
  const int64_t width = heads * head_size, length = 4096;
  const DeviceMemory x(size(rows * width, 2)), table(size(length * head_size / 2, 4));
  const RopeArgs args{.dtype = k16,
                      .x = x.data(),
                      .rows = rows,
                      .row_stride = width,
                      .heads = heads,
                      .head_size = head_size,
                      .cos = table.data(),
                      .sin = table.data(),
                      .rows_per_sample = length};
  report("rope", fmt::format("{} x {} x {}", rows, heads, head_size),
         static_cast<double>(rows * width * 4), median_us([&](Stream s) { api().rope(args, s); }));
}

void activation(int64_t rows, int64_t features, Activation kind, bool gated, const char* name) {
  const int64_t parts = gated ? 2 : 1, n = rows * features;
  const DeviceMemory x(size(n * parts, 2)), grad(size(n, 2)), out(size(n * parts, 2));
  ActivationArgs args{.dtype = k16,
                      .activation = kind,
                      .gated = gated,
                      .rows = rows,
                      .features = features,
                      .x = x.data(),
                      .grad = nullptr,
                      .out = out.data()};
  report(std::string(name) + "_forward", shape_text(rows, features),
         static_cast<double>(n * 2 * (parts + 1)),
         median_us([&](Stream s) { api().activation_forward(args, s); }));
  args.grad = grad.data();
  report(std::string(name) + "_backward", shape_text(rows, features),
         static_cast<double>(n * 2 * (2 * parts + 1)),
         median_us([&](Stream s) { api().activation_backward(args, s); }));
}

// Ids as frequent as words are: a few rows take most of the tokens.
std::vector<int64_t> word_ids(int64_t count, int64_t vocabulary) {
  std::mt19937_64 engine(1);
  std::uniform_real_distribution<double> uniform(0.0, std::log(static_cast<double>(vocabulary)));
  std::vector<int64_t> ids(static_cast<size_t>(count));
  for (int64_t& id : ids) id = static_cast<int64_t>(std::exp(uniform(engine))) - 1;
  return ids;
}

void embedding(int64_t tokens, int64_t vocabulary, int64_t width) {
  const auto id_values = word_ids(tokens, vocabulary);
  const DeviceMemory table(size(vocabulary * width, 2)), buffer(size(vocabulary * width, 4)),
      ids(id_values), out(size(tokens * width, 4));
  const EmbeddingShape shape{tokens, width, 0, vocabulary};
  const DeviceMemory work(embedding_workspace_bytes(shape));
  const std::string text = fmt::format("{} of {} x {}", tokens, vocabulary, width);
  const double n = static_cast<double>(tokens * width);
  report(
      "embedding_forward", text, n * 6, median_us([&](Stream s) {
        api().embedding_forward({k16, k32, shape, table.data(), ids.as<int64_t>(), out.data()}, s);
      }));
  report("embedding_backward", text, n * 4, median_us([&](Stream s) {
           api().embedding_backward(
               {k32, k32, shape, out.data(), ids.as<int64_t>(), buffer.data(), work.data()}, s);
         }));
}

void cross_entropy(int64_t rows, int64_t columns) {
  const DeviceMemory logits(size(rows * columns, 2)), targets(size(rows, 8)),
      weights(size(rows, 4)), logprob(size(rows, 4));
  const LogitRows all{.dtype = k16,
                      .logits = logits.data(),
                      .rows = rows,
                      .columns = columns,
                      .row_stride = columns,
                      .targets = targets.as<int64_t>()};
  report("cross_entropy", shape_text(rows, columns), static_cast<double>(rows * columns * 4),
         median_us([&](Stream s) {
           api().cross_entropy({all, weights.data(), logprob.data()}, s);
         }));
}

void optimizer(int64_t count, DType moments) {
  const int64_t m = moments == k32 ? 4 : 2;
  const auto tile_values = cut_tiles(std::vector<FlatRange>{{0, count, kDecay | kCounted}});
  const std::vector<StepState> state_values{{.lr = 1e-4, .count = 10}};
  const auto tile_count = static_cast<int64_t>(tile_values.size());
  const DeviceMemory tiles(tile_values), state(state_values), weights(size(count, 4)),
      gradient(size(count, 4)), first(size(count, m)), second(size(count, m)), copy(size(count, 2)),
      partial(size(tile_count, 8)), sum(8), broken(4);
  const OptimizerArgs args{.types = {k32, k32, moments},
                           .weight_decay = 0.1,
                           .state = state.as<StepState>(),
                           .tiles = tiles.as<Tile>(),
                           .tile_count = tile_count,
                           .weights = weights.data(),
                           .gradient = gradient.data(),
                           .first = first.data(),
                           .second = second.data(),
                           .copy = copy.data()};
  const std::string text = fmt::format("{}, moments {}", count, name_of(moments));
  const double n = static_cast<double>(count);
  report("adamw", text, n * static_cast<double>(14 + 4 * m),
         median_us([&](Stream s) { api().adamw(args, s); }));
  report("lion", text, n * static_cast<double>(14 + 2 * m),
         median_us([&](Stream s) { api().lion(args, s); }));
  if (moments != k32) return;
  report("squared_norm", fmt::format("{}", count), n * 4, median_us([&](Stream s) {
           api().squared_norm({k32, gradient.data(), tiles.as<Tile>(), tile_count,
                               partial.as<double>(), sum.as<double>(), broken.as<int32_t>(), false},
                              s);
         }));
}

void blockwise_optimizer(int64_t count) {
  const auto tile_values = cut_tiles(std::vector<FlatRange>{{0, count, kDecay}});
  const DeviceMemory tiles(tile_values), state(std::vector<StepState>{{.lr = 1e-4, .count = 10}}),
      codes(std::vector<MomentCodes>{kMomentCodes}), weights(size(count, 4)),
      gradient(size(count, 4)), first(size(count, 1)), second(size(count, 1)),
      first_scale(size(count / kMomentBlock, 4)), second_scale(size(count / kMomentBlock, 4)),
      copy(size(count, 2));
  const BlockwiseArgs args{.weight_decay = 0.1,
                           .state = state.as<StepState>(),
                           .tiles = tiles.as<Tile>(),
                           .tile_count = static_cast<int64_t>(tile_values.size()),
                           .codes = codes.as<MomentCodes>(),
                           .weights = weights.data(),
                           .gradient_values = gradient.data(),
                           .first = first.as<uint8_t>(),
                           .second = second.as<uint8_t>(),
                           .first_scale = first_scale.as<float>(),
                           .second_scale = second_scale.as<float>(),
                           .copy = copy.data()};
  report("adamw_blockwise", fmt::format("{}", count), static_cast<double>(count) * 18.0625,
         median_us([&](Stream s) { api().adamw_blockwise(args, s); }));
}

void fp8(int64_t rows, int64_t columns) {
  const int64_t n = rows * columns;
  const DeviceMemory x(size(n, 2)), out(size(n, 1)), transposed(size(n, 1)), scale(4), top(4),
      inverse(size(rows, 4));
  CastFp8Args args{.rows = rows,
                   .columns = columns,
                   .x = x.data(),
                   .scale = scale.as<float>(),
                   .out = out.as<uint8_t>(),
                   .transposed = transposed.as<uint8_t>(),
                   .amax = top.as<float>()};
  const std::string text = shape_text(rows, columns);
  const double elements = static_cast<double>(n);
  report("cast_fp8 + transpose + amax", text, elements * 4,
         median_us([&](Stream s) { api().cast_fp8(args, s); }));
  report("amax", text, elements * 2, median_us([&](Stream s) {
           api().amax({k16, x.data(), n, top.as<float>()}, s);
         }));
  report("cast_rows_fp8", text, elements * 3, median_us([&](Stream s) {
           api().cast_rows_fp8(
               {k16, Fp8::kE4m3, rows, columns, x.data(), out.as<uint8_t>(), inverse.as<float>()},
               s);
         }));
}

void experts(int64_t tokens, int64_t count, int64_t k, int64_t width) {
  std::vector<int64_t> ids(static_cast<size_t>(tokens * k));
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int64_t>(i * 7919) % count;
  const int64_t slots = tokens * k;
  const DeviceMemory chosen(ids), place(size(slots, 8)), slot(size(slots, 8)),
      counts(size(count, 8)), work(expert_order_workspace_bytes(slots, count)),
      x(size(tokens * width, 2)), rows(size(slots * width, 2)), d_rows(size(slots * width, 2)),
      weights(size(slots, 4)), d_weights(size(slots, 4));
  const std::string text = fmt::format("{} x {} of {}, width {}", tokens, k, count, width);
  const ExpertOrderArgs order{slots,
                              count,
                              chosen.as<int64_t>(),
                              nullptr,
                              place.as<int64_t>(),
                              slot.as<int64_t>(),
                              counts.as<int64_t>(),
                              work.as<int>()};
  report("expert_order", text, static_cast<double>(slots * 24),
         median_us([&](Stream s) { api().expert_order(order, s); }));
  const PermuteShape shape{k16, tokens, k, width, place.as<int64_t>()};
  const double t = static_cast<double>(tokens * width * 2),
               r = static_cast<double>(slots * width * 2);
  report("permute_tokens", text, t + r, median_us([&](Stream s) {
           api().permute_tokens({shape, x.data(), rows.data()}, s);
         }));
  report("combine_rows", text, t + r, median_us([&](Stream s) {
           api().combine_rows({shape, rows.data(), weights.data(), x.data()}, s);
         }));
  report("combine_rows_backward", text, t + 2 * r, median_us([&](Stream s) {
           api().combine_rows_backward(
               {shape, x.data(), rows.data(), weights.data(), d_rows.data(), d_weights.data()}, s);
         }));
}

void run_all() {
  const std::string device = device_name();
  fmt::print("{}, device copy {:.0f} GB/s\n", device, copy_rate() / 1e9);
  fmt::print("{:<28}{:<34}{:>10}{:>10}{:>8}\n", "kernel", "shape", "us", "GB/s", "ratio");
  for (const int64_t width : {768, 2048, 4096, 8192}) norm(16384, width, k16);
  norm(16384, 2048, k32);
  rope(16384, 32, 128);
  rope(16384, 16, 64);
  activation(16384, 8192, Activation::kSilu, true, "swiglu");
  activation(16384, 3072, Activation::kGeluTanh, false, "gelu_tanh");
  embedding(16384, 151936, 2048);
  cross_entropy(4096, 50257);
  cross_entropy(2048, 151936);
  optimizer(int64_t{1} << 27, k32);
  optimizer(int64_t{1} << 27, k16);
  blockwise_optimizer(int64_t{1} << 27);
  fp8(16384, 4096);
  experts(16384, 64, 8, 2048);
}

}  // namespace
}  // namespace capstan::bench

int main() {
  try {
    capstan::bench::run_all();
  } catch (const capstan::Error& error) {
    fmt::print(stderr, "error: {}\n", error.what());
    return error.exit_code();
  }
  return 0;
}
