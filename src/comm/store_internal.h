// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The key-value store through which the processes of a job meet and report. Hides c10d's headers.
#pragma once
#include <memory>
#include <optional>
#include <string>

#include "capstan/comm/world.h"

namespace c10d {
class Store;
}

namespace capstan::comm {

// All functions throw EnvError when the store cannot be reached. Thread-safe; a call of one thread
// makes the others wait, so the watcher thread has a connection of its own.
class KeyStore {
 public:
  // Rank 0 serves at MASTER_PORT (or on the inherited socket), the others connect; nobody waits for
  // the rest.
  [[nodiscard]] static std::shared_ptr<KeyStore> of_job(const RankEnv& env, double timeout_s);
  [[nodiscard]] static std::shared_ptr<KeyStore> client_of(const RankEnv& env, double timeout_s);
  [[nodiscard]] static std::shared_ptr<KeyStore>
  in_process();  // for ranks that are threads of one test
  ~KeyStore();

  void set(const std::string& key, const std::string& value);
  [[nodiscard]] std::optional<std::string> try_get(const std::string& key);
  int64_t add(const std::string& key, int64_t value);  // returns the sum
  // The value of the first caller, which is returned to all.
  std::string set_once(const std::string& key, const std::string& value);
  [[nodiscard]] c10d::Store& c10d_store();

 private:
  struct State;
  explicit KeyStore(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

// Returns when all ranks of the job are here; names the missing ones after `timeout_s`. Refuses a
// second process of the same rank and processes that expect another number of ranks.
void meet_all_ranks(KeyStore& store, int rank, int size, double timeout_s);

}  // namespace capstan::comm
