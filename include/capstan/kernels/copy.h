// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Device copy: the yardstick for memory-bound kernels. Moves 2 bytes per byte (read, write).
#pragma once
#include "capstan/kernels/stream.h"

namespace capstan::kernels {

struct CopyArgs {
  const void* from = nullptr;
  void* to = nullptr;
  int64_t bytes = 0;
};
void copy(const CopyArgs& args, Stream stream);

}  // namespace capstan::kernels
