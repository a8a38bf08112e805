// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// What all kernel headers share. Contract of every launcher: it checks its arguments, puts kernels
// on the stream and returns; it never waits for the device and allocates nothing. Pointers are
// device memory, contiguous unless a stride is named. Results do not depend on scheduling: the same
// input gives the same bits. Errors: InternalError for arguments, EnvError when a launch is
// refused. Sizes of zero launch nothing.
#pragma once
#include <cstdint>

#include "capstan/base/dtype.h"

struct CUstream_st;

namespace capstan::kernels {

using Stream = CUstream_st*;  // cudaStream_t

}  // namespace capstan::kernels
