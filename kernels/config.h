// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// How work is laid over threads: pure functions of the shape, the same for every device, so that
// sums keep their order.
#pragma once
#include <cstdint>

namespace capstan::kernels {

inline constexpr int kWarp = 32;
inline constexpr int kVectorBytes = 16;

struct LaunchShape {
  int64_t blocks = 0;
  int threads = 0;
  int64_t shared_bytes = 0;
  bool operator==(const LaunchShape&) const = default;
};

// Grid-stride loops over `items`, each thread taking `per_thread` of them at a time.
[[nodiscard]] LaunchShape flat_shape(int64_t items, int64_t per_thread);

// Threads of a block that keeps rows in registers: each may have 128 of the 65536.
inline constexpr int kMostRowThreads = 512;

// Rows whose elements stay in registers: a thread holds `chunks` pieces of `vector` elements.
struct RowShape {
  int vector = 1;           // elements loaded at a time
  int chunks = 0;           // 1 or 4 with vectors, 16 without; 0: the row is too wide
  int threads_per_row = 0;  // whole warps
  int rows_per_block = 0;
  bool operator==(const RowShape&) const = default;
  [[nodiscard]] int threads() const { return threads_per_row * rows_per_block; }
};
[[nodiscard]] RowShape row_shape(int64_t width, int vector, bool aligned);

// Groups of consecutive rows whose sums are made by one block each.
struct RowGroups {
  int64_t groups = 0, rows_per_group = 0;
  bool operator==(const RowGroups&) const = default;
};
[[nodiscard]] RowGroups row_groups(int64_t rows);

// Threads of a block that works through one row of `width` elements.
[[nodiscard]] int threads_for_row(int64_t width, int per_thread, int most);

}  // namespace capstan::kernels
