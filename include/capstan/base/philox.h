// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as
// 1, 2, 3", SC 2011). A value depends on (seed, stream, index) and on nothing else, so no layout,
// retry or instruction set changes it. Normal values come from an inverse-CDF polynomial made of
// IEEE additions, multiplications, divisions, one sqrt and our own logarithm: the same bits
// everywhere. Pure functions.
#pragma once
#include <array>
#include <cstdint>
#include <span>
#include <string_view>

namespace capstan::philox {

using Counter = std::array<uint32_t, 4>;
using Key = std::array<uint32_t, 2>;

[[nodiscard]] Counter block(Counter counter, Key key);

// 128 random bits of (seed, stream, index).
[[nodiscard]] Counter draw(uint64_t seed, uint64_t stream, uint64_t index);
[[nodiscard]] uint64_t bits64(uint64_t seed, uint64_t stream, uint64_t index);
[[nodiscard]] double uniform(uint64_t seed, uint64_t stream,
                             uint64_t index);  // open interval (0, 1)
[[nodiscard]] double normal(uint64_t seed, uint64_t stream, uint64_t index);  // mean 0, deviation 1
// Quantile of the standard normal distribution; p in (0, 1). Relative error below 1e-9 against the
// exact one.
[[nodiscard]] double inverse_normal_cdf(double p);

// A stream id out of a name ("init", "model.embed_tokens.weight", ...).
[[nodiscard]] uint64_t stream_of(std::string_view purpose, std::string_view name = {});

// Fills out[i] = normal(seed, stream, first + i) * deviation.
void fill_normal(std::span<float> out, uint64_t seed, uint64_t stream, uint64_t first,
                 double deviation);
void fill_normal(std::span<double> out, uint64_t seed, uint64_t stream, uint64_t first,
                 double deviation);

}  // namespace capstan::philox
