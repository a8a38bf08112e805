// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "capstan/trainer/evaluate.h"

#include <ATen/ATen.h>

#include <cmath>
#include <numbers>

#include "capstan/trainer/batches.h"

namespace capstan::trainer {
namespace {

// One line per token of the row in order: the first of a window has no score, the others that of
// the step before them.
void report_tokens(const data::SampleBatch& batch, const data::RowSpace& rows,
                   const at::Tensor& logprob_BT,
                   const std::function<void(const TokenScore&)>& emit) {
  const at::Tensor scores = logprob_BT.cpu().to(at::kDouble).contiguous();
  const double* score = scores.data_ptr<double>();
  for (int64_t s = 0; s < batch.samples; ++s) {
    if (!batch.valid[static_cast<size_t>(s)]) continue;
    const data::TokenRange range = rows.inputs(batch.global_sample[static_cast<size_t>(s)]);
    for (int64_t t = 0; t < range.size(); ++t) {
      const auto at_token = static_cast<size_t>(s * batch.length + t);
      const int64_t document = rows.file().document_at(range.first + t);
      TokenScore token{document, range.first + t - rows.file().document(document).first,
                       batch.tokens[at_token], std::nullopt};
      if (t > 0 && batch.targets[at_token - 1] != data::kIgnoreTarget)
        token.logprob = score[at_token - 1];
      emit(token);
    }
  }
}

}  // namespace

EvalResult evaluate(engine::Engine& engine, mesh::Mesh& mesh, const data::ValidationSet& set,
                    data::Documents documents, const EvalOptions& options) {
  const plan::Plan& plan = engine.plan();
  const std::vector<int64_t> rows = set.choose_rows(options.samples);
  const int64_t ranks = mesh.grid().data_parallel_size(),
                mine = mesh.grid().data_parallel_index(mesh.rank());
  const int64_t micro = plan.batch.micro_samples;
  const auto total = static_cast<int64_t>(rows.size());
  // Every rank runs the same number of passes; rows past the end are filling.
  const int64_t passes = (total + ranks * micro - 1) / (ranks * micro);
  for (int64_t pass = 0; pass < passes; ++pass) {
    std::vector<int64_t> chosen(static_cast<size_t>(micro), -1);
    for (int64_t i = 0; i < micro; ++i) {
      const int64_t at_row = (pass * ranks + mine) * micro + i;
      if (at_row < total) chosen[static_cast<size_t>(i)] = rows[static_cast<size_t>(at_row)];
    }
    const data::SampleBatch batch = set.read(chosen);
    const engine::MicroBatch input = make_micro_batch(batch, 0, micro, documents);
    if (options.per_token)
      engine.evaluate(input, [&](const at::Tensor& logprob) {
        report_tokens(batch, set.row_space(), logprob, options.per_token);
      });
    else
      engine.evaluate(input);
  }
  const engine::EvalReport report = engine.report_eval();
  EvalResult result{set.name(), report.loss(), std::exp(report.loss()), std::nullopt,
                    report.target_tokens};
  if (const auto bytes = set.bytes_per_token())
    result.bits_per_byte = report.loss() / std::numbers::ln2 / *bytes;
  return result;
}

}  // namespace capstan::trainer
