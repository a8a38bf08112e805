// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// AdamW on flat buffers, in one pass: w <- w (1 - lr decay); m <- b1 m + (1 - b1) g;
// v <- b2 v + (1 - b2) g^2; w <- w - lr / (1 - b1^t) m / (sqrt(v / (1 - b2^t)) + eps).
// Memory per element, fp32 with bf16 copy: 16 bytes read, 14 written; with bf16 moments 12 and 10.
// Reference: src/optim/cpu/loops.inc; fp32 gives its bits as long as b^t does.
#include "adamw_update.cuh"

namespace capstan::kernels {

void adamw(const OptimizerArgs& args, Stream stream) {
  if (!check_optimizer("adamw", args)) return;
  check_present("adamw", {{"second", args.second}});
  launch_update<AdamWUpdate>("adamw", args, stream);
}

}  // namespace capstan::kernels
