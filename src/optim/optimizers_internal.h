// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// The optimizers of this build.
#pragma once
#include "capstan/optim/optimizer.h"

namespace capstan::optim {

[[nodiscard]] std::unique_ptr<Optimizer> make_adamw(const recipe::Optimizer& recipe,
                                                    const std::vector<parallel::Shard>& shards);
[[nodiscard]] std::unique_ptr<Optimizer> make_lion(const recipe::Optimizer& recipe,
                                                   const std::vector<parallel::Shard>& shards);
[[nodiscard]] std::unique_ptr<Optimizer> make_sophia(const recipe::Optimizer& recipe,
                                                     const std::vector<parallel::Shard>& shards);

}  // namespace capstan::optim
