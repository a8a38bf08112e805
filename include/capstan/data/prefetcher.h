// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Reads the batches of coming steps on a thread of its own, at most `depth` ahead.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>

#include "capstan/data/loader.h"

namespace capstan::data {

struct PrefetchOptions {
  int64_t first_step = 0;
  int64_t end_step = INT64_MAX;  // steps from here on are not read
  int64_t depth = 2;
  double timeout_s = 0;  // deadline of one next(); 0 = none
};

// next() is for one consumer thread. The destructor waits for the read in progress.
class Prefetcher {
 public:
  using Read =
      std::function<SampleBatch(int64_t step)>;  // called on the background thread, in step order
  Prefetcher(Read read, const PrefetchOptions& options);
  ~Prefetcher();
  Prefetcher(const Prefetcher&) = delete;
  Prefetcher& operator=(const Prefetcher&) = delete;
  // The batch of the next step. What `read` threw for that step is thrown here, again at each
  // further call. EnvError after the deadline; InternalError past end_step.
  [[nodiscard]] SampleBatch next();
  [[nodiscard]] int64_t step() const;    // that next() will return
  [[nodiscard]] double wait_ms() const;  // how long the last next() waited

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace capstan::data
