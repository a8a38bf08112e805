// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The byte ledger: calls and bytes of one rank per (axis, operation). Bytes = what the rank hands
// in (`in.nbytes()`; recv: what it takes; barrier: 0), whatever the backend puts on the wire.
// Thread-safe.
#pragma once
#include <cstdint>
#include <map>
#include <mutex>
#include <string>

namespace capstan::comm {

struct Traffic {
  int64_t calls = 0;
  int64_t bytes = 0;
  bool operator==(const Traffic&) const = default;
};

class Ledger {
 public:
  using Table = std::map<std::string, Traffic>;  // "dp_shard/all_reduce" -> traffic

  void add(const std::string& axis, const std::string& op, int64_t bytes);
  void add(const Table& more);
  [[nodiscard]] Traffic of(const std::string& axis, const std::string& op) const;
  [[nodiscard]] Traffic total() const;  // without the axis "control"
  [[nodiscard]] Table table() const;
  // What came since `before`, an earlier table(), is not counted after all: as a table.
  [[nodiscard]] Table take_back(const Table& before);
  void reset();

 private:
  mutable std::mutex mutex_;
  Table table_;
};

}  // namespace capstan::comm
