// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// AdamW with 8-bit moments. Memory per element with bf16 copy: 10 bytes read, 8 written, scales
// 1/16 more.
// Reference: src/optim/cpu/loops.inc, whose bits it gives as long as b^t does.
#include "adamw_update.cuh"
#include "optimizer_block.cuh"

namespace capstan::kernels {

void adamw_blockwise(const BlockwiseArgs& args, Stream stream) {
  launch_blockwise<AdamWUpdate>("adamw_blockwise", args, stream);
}

}  // namespace capstan::kernels
