// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Optimizers on flat buffers, the norm, the decision of a step, and initial values.
#include <fmt/format.h>

#include "cases.h"
#include "timing.h"

namespace capstan::bench {
namespace {

using namespace kernels;

// A flat buffer with what its optimizers read and write.
struct Flat {
  int64_t count;
  std::vector<Tile> cut;
  DeviceMemory tiles, state, weights, gradient, copy;
  explicit Flat(int64_t n)
      : count(n),
        cut(api().cut_tiles(std::vector<FlatRange>{{0, n, kDecay | kCounted}})),
        tiles(cut),
        state(std::vector<StepState>{{.lr = 1e-4, .count = 10}}),
        weights(size(n, 4)),
        gradient(size(n, 4)),
        copy(size(n, 2)) {}
  [[nodiscard]] int64_t tile_count() const { return static_cast<int64_t>(cut.size()); }
};

void flat_optimizers(const Flat& flat, DType moments) {
  const int64_t m = moments == k32 ? 4 : 2;
  const DeviceMemory first(size(flat.count, m)), second(size(flat.count, m));
  const OptimizerTypes types{k32, k32, moments};
  const OptimizerArgs args{.types = types,
                           .weight_decay = 0.1,
                           .rho = 0.04,
                           .state = flat.state.as<StepState>(),
                           .tiles = flat.tiles.as<Tile>(),
                           .tile_count = flat.tile_count(),
                           .weights = flat.weights.data(),
                           .gradient = flat.gradient.data(),
                           .first = first.data(),
                           .second = second.data(),
                           .copy = flat.copy.data()};
  const std::string text = fmt::format("{}, moments {}", flat.count, name_of(moments));
  const auto bytes = [&](int64_t each) { return static_cast<double>(flat.count * each); };
  report("adamw", text, bytes(14 + 4 * m), median_us([&](Stream s) { api().adamw(args, s); }));
  report("lion", text, bytes(14 + 2 * m), median_us([&](Stream s) { api().lion(args, s); }));
  report("sophia", text, bytes(14 + 3 * m), median_us([&](Stream s) { api().sophia(args, s); }));
  report("sophia_curvature", text, bytes(4 + 2 * m), median_us([&](Stream s) {
           api().sophia_curvature({.types = types,
                                   .tokens = 1e6,
                                   .state = flat.state.as<StepState>(),
                                   .tiles = flat.tiles.as<Tile>(),
                                   .tile_count = flat.tile_count(),
                                   .gradient = flat.gradient.data(),
                                   .curvature = second.data()},
                                  s);
         }));
}

void blockwise_optimizers(const Flat& flat) {
  const DeviceMemory codes(std::vector<MomentCodes>{kMomentCodes}), first(size(flat.count, 1)),
      second(size(flat.count, 1)), first_scale(size(flat.count / kMomentBlock, 4)),
      second_scale(size(flat.count / kMomentBlock, 4));
  BlockwiseArgs args{.weight_decay = 0.1,
                     .rho = 0.04,
                     .state = flat.state.as<StepState>(),
                     .tiles = flat.tiles.as<Tile>(),
                     .tile_count = flat.tile_count(),
                     .codes = codes.as<MomentCodes>(),
                     .weights = flat.weights.data(),
                     .gradient_values = flat.gradient.data(),
                     .first = first.as<uint8_t>(),
                     .second = second.as<uint8_t>(),
                     .first_scale = first_scale.as<float>(),
                     .second_scale = second_scale.as<float>(),
                     .copy = flat.copy.data()};
  const std::string text = fmt::format("{}", flat.count);
  const double n = static_cast<double>(flat.count), scale = 8.0 / kMomentBlock;
  report("adamw_blockwise", text, n * (18 + 2 * scale),
         median_us([&](Stream s) { api().adamw_blockwise(args, s); }));
  report("sophia_blockwise", text, n * (17 + 1.5 * scale),
         median_us([&](Stream s) { api().sophia_blockwise(args, s); }));
  const CurvatureArgs estimate{.types = {k32, k32, DType::kUint8},
                               .tokens = 1e6,
                               .state = args.state,
                               .tiles = args.tiles,
                               .tile_count = args.tile_count,
                               .gradient = args.gradient_values,
                               .curvature = second.data(),
                               .codes = args.codes,
                               .curvature_scale = args.second_scale};
  report("sophia_curvature", text + ", moments in blocks", n * (6 + scale),
         median_us([&](Stream s) { api().sophia_curvature(estimate, s); }));
  args.second = nullptr;
  args.second_scale = nullptr;
  report("lion_blockwise", text, n * (16 + scale),
         median_us([&](Stream s) { api().lion_blockwise(args, s); }));
}

void norm_and_decision(const Flat& flat) {
  constexpr int64_t kWindow = 128;
  const DeviceMemory partial(size(flat.tile_count(), 8)), sum(8), broken(4),
      sums(std::vector<StepSums>{{.loss = 1, .squares = 1}}), is_void(8),
      windows(size(2 * kWindow, 8));
  report("squared_norm", fmt::format("{}", flat.count), static_cast<double>(flat.count * 4),
         median_us([&](Stream s) {
           api().squared_norm({k32, flat.gradient.data(), flat.tiles.as<Tile>(), flat.tile_count(),
                               partial.as<double>(), sum.as<double>(), broken.as<int32_t>(), false},
                              s);
         }));
  report("decide_step", fmt::format("windows of {}", kWindow), 16.0 * kWindow,
         median_us([&](Stream s) {
           api().decide_step({.sums = sums.as<StepSums>(),
                              .is_void = is_void.as<double>(),
                              .max_norm = 1,
                              .spikes = {.sigma = 6, .window = kWindow},
                              .windows = windows.as<double>(),
                              .state = flat.state.as<StepState>()},
                             s);
         }));
}

void initial_values(int64_t count) {
  const DeviceMemory out(size(count, 4));
  report("fill_normal", fmt::format("{}", count), static_cast<double>(count * 4),
         median_us([&](Stream s) {
           api().fill_normal({.out = out.data(), .count = count, .length = count}, s);
         }));
}

}  // namespace

void run_optimizers(const Scale& scale) {
  const Flat flat((int64_t{1} << 27) / scale.rows);
  flat_optimizers(flat, k32);
  flat_optimizers(flat, k16);
  blockwise_optimizers(flat);
  norm_and_decision(flat);
  initial_values(flat.count);
}

}  // namespace capstan::bench
