// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/comm/ledger.h"

#include <utility>

namespace capstan::comm {

void Ledger::add(const std::string& axis, const std::string& op, int64_t bytes) {
  std::string key;
  key.reserve(axis.size() + op.size() + 1);
  key.append(axis).append("/").append(op);
  std::lock_guard lock(mutex_);
  Traffic& traffic = table_[key];
  ++traffic.calls;
  traffic.bytes += bytes;
}

void Ledger::add(const Table& more) {
  std::lock_guard lock(mutex_);
  for (const auto& [key, traffic] : more) {
    table_[key].calls += traffic.calls;
    table_[key].bytes += traffic.bytes;
  }
}

Traffic Ledger::of(const std::string& axis, const std::string& op) const {
  std::lock_guard lock(mutex_);
  const auto found = table_.find(axis + "/" + op);
  return found == table_.end() ? Traffic{} : found->second;
}

Traffic Ledger::total() const {
  std::lock_guard lock(mutex_);
  Traffic sum;
  for (const auto& [key, traffic] : table_) {
    if (key.rfind("control/", 0) == 0) continue;
    sum.calls += traffic.calls;
    sum.bytes += traffic.bytes;
  }
  return sum;
}

Ledger::Table Ledger::table() const {
  std::lock_guard lock(mutex_);
  return table_;
}

Ledger::Table Ledger::take_back(const Table& before) {
  std::lock_guard lock(mutex_);
  Table more = std::exchange(table_, before);
  for (const auto& [key, traffic] : before) {
    more[key].calls -= traffic.calls;
    more[key].bytes -= traffic.bytes;
  }
  std::erase_if(more, [](const auto& entry) { return entry.second == Traffic{}; });
  return more;
}

void Ledger::reset() {
  std::lock_guard lock(mutex_);
  table_.clear();
}

}  // namespace capstan::comm
