// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Choice of experts, and rows to them and back.
#include <fmt/format.h>

#include "cases.h"
#include "timing.h"

namespace capstan::bench {
namespace {

using namespace kernels;

void router(int64_t tokens, int64_t count, int64_t k) {
  const RouterShape shape{.tokens = tokens, .experts = count, .per_token = k};
  const DeviceMemory logits(size(tokens * count, 4)), scores(size(tokens * count, 4)),
      gradient(size(tokens * count, 4)), chosen(size(tokens * k, 8)), weights(size(tokens * k, 4));
  const std::string text = fmt::format("{} x {} of {}", tokens, k, count);
  const double bytes = static_cast<double>(tokens * count * 8);
  report("router_forward", text, bytes, median_us([&](Stream s) {
           api().router_forward({.shape = shape,
                                 .logits = logits.data(),
                                 .scores = scores.data(),
                                 .chosen = chosen.as<int64_t>(),
                                 .weights = weights.data()},
                                s);
         }));
  report("router_backward", text, bytes, median_us([&](Stream s) {
           api().router_backward({.shape = shape,
                                  .logits = logits.data(),
                                  .chosen = chosen.as<int64_t>(),
                                  .grad_weights = weights.data(),
                                  .grad_logits = gradient.data()},
                                 s);
         }));
}

void experts(int64_t tokens, int64_t count, int64_t k, int64_t width) {
  std::vector<int64_t> ids(static_cast<size_t>(tokens * k));
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<int64_t>(i * 7919) % count;
  const int64_t slots = tokens * k;
  const DeviceMemory chosen(ids), place(size(slots, 8)), slot(size(slots, 8)),
      counts(size(count, 8)), work(api().expert_order_workspace_bytes(slots, count)),
      x(size(tokens * width, 2)), rows(size(slots * width, 2)), d_rows(size(slots * width, 2)),
      weights(size(slots, 4)), d_weights(size(slots, 4));
  const std::string text = fmt::format("{} x {} of {}, width {}", tokens, k, count, width);
  const ExpertOrderArgs order{slots,
                              count,
                              chosen.as<int64_t>(),
                              nullptr,
                              place.as<int64_t>(),
                              slot.as<int64_t>(),
                              counts.as<int64_t>(),
                              work.as<int>()};
  report("expert_order", text, static_cast<double>(slots * 24),
         median_us([&](Stream s) { api().expert_order(order, s); }));
  const PermuteShape shape{k16, tokens, k, width, place.as<int64_t>()};
  const double t = static_cast<double>(tokens * width * 2),
               r = static_cast<double>(slots * width * 2);
  report("permute_tokens", text, t + r, median_us([&](Stream s) {
           api().permute_tokens({shape, x.data(), rows.data()}, s);
         }));
  report("combine_rows", text, t + r, median_us([&](Stream s) {
           api().combine_rows({shape, rows.data(), weights.data(), x.data()}, s);
         }));
  report("combine_rows_backward", text, t + 2 * r, median_us([&](Stream s) {
           api().combine_rows_backward(
               {shape, x.data(), rows.data(), weights.data(), d_rows.data(), d_weights.data()}, s);
         }));
}

}  // namespace

void run_experts(const Scale& scale) {
  router(16384 / scale.rows, 64, 8);
  experts(16384 / scale.rows, 64, 8, 2048 / scale.width);
}

}  // namespace capstan::bench
