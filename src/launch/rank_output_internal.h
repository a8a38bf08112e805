// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Copies what a rank prints to its log and, if asked, to the console. A console that fails is
// dropped; neither it nor a full disk stops the rank.
#pragma once
#include <thread>

#include "capstan/base/descriptor.h"
#include "launch/log_file_internal.h"

namespace capstan::launch::internal {

class RankOutput {
 public:
  // console: a descriptor, -1 = only to the log.
  RankOutput(const Path& log, int64_t log_limit_bytes, int console);
  ~RankOutput();  // after everything already written has been copied
  RankOutput(const RankOutput&) = delete;
  RankOutput& operator=(const RankOutput&) = delete;
  [[nodiscard]] int write_end() const { return write_end_.get(); }  // for the rank, before start()
  void start();  // closes this process's write end and begins to copy

 private:
  void pump();
  int console_;
  LogFile log_;
  capstan::Descriptor read_end_, write_end_, stop_;
  std::thread thread_;
};

}  // namespace capstan::launch::internal
