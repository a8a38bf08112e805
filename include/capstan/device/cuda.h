// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The CUDA plug-in: libcapstan_cuda.so beside libcapstan.so. It brings LibTorch's CUDA half, our
// kernels and NCCL; a program on CPUs never opens it.
#pragma once

namespace capstan::device {

// Opens the plug-in and makes GPU `index` the device of this process. Before the first op of the
// process: LibTorch decides once whether CUDA exists. Throws EnvError saying what is missing:
// driver, GPU or plug-in.
void start_cuda(int index);
// The same bits from run to run on a GPU: before the first product of the process, since cuBLAS
// reads its workspace then. Ops that have no such form throw from here on.
void compute_deterministically();

}  // namespace capstan::device
