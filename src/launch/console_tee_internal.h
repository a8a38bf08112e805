// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Copies what a rank prints to its log file and to the console; a log or console that fails is
// dropped.
#pragma once
#include <thread>

#include "capstan/base/descriptor.h"

namespace capstan::launch::internal {

class ConsoleTee {
 public:
  ConsoleTee(const Path& log, int console);
  ~ConsoleTee();  // after everything already written has been copied
  ConsoleTee(const ConsoleTee&) = delete;
  ConsoleTee& operator=(const ConsoleTee&) = delete;
  [[nodiscard]] int write_end() const { return write_end_.get(); }  // for the rank, before start()
  void start();  // closes this process's write end and begins to copy

 private:
  void pump();
  int console_;
  capstan::Descriptor log_, read_end_, write_end_, stop_;
  std::thread thread_;
};

}  // namespace capstan::launch::internal
