// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include <ATen/ATen.h>

#include "capstan/engine/engine.h"
#include "engine/micro_batch_internal.h"

namespace capstan::engine {
namespace {

class NextToken final : public Objective {
 public:
  double local_denominator(const std::vector<MicroBatch>& batches) const override {
    return static_cast<double>(count_targets(batches));
  }

  Tensor weights(const MicroBatch& batch, double global_denominator) const override {
    const Tensor is_target_BT = batch.targets_BT.ne(kIgnoredTarget).to(at::kDouble);
    return global_denominator > 0 ? is_target_BT.div_(global_denominator) : is_target_BT.zero_();
  }

  Tensor loss(const nn::TokenScores& scores, const MicroBatch& batch,
              double global_denominator) const override {
    const Tensor weights_BT =
        weights(batch, global_denominator).to(scores.logprob_BT.scalar_type());
    return scores.logprob_BT.mul(weights_BT).sum().neg();
  }
};

}  // namespace

std::unique_ptr<Objective> make_next_token_objective() { return std::make_unique<NextToken>(); }

}  // namespace capstan::engine
