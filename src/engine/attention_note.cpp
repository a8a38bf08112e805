// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "engine/attention_note_internal.h"

#include <ATen/ATen.h>

#include "capstan/base/log.h"
#include "capstan/parallel/flat_store.h"

namespace capstan::engine {
namespace {

bool has_parts_of_rows(const plan::Plan& plan) {
  return plan.grid.sizes().cp > 1 && plan.resolved.parallel.context.method != "all_to_all";
}

// The part of a ring that is hardest to compute, if not all are alike: the last chunk of keys that
// its chunk of queries still sees, where a window cuts one, or any earlier one, where documents do.
void cut_into_parts(ops::AttentionCase& asked, int64_t ranks) {
  const int64_t chunk = asked.keys / (2 * ranks);
  int64_t offset = asked.documents ? chunk : asked.keys;
  if (asked.sliding_window) {
    const int64_t cut = (*asked.sliding_window + chunk - 1) / chunk * chunk;
    if (cut < asked.keys) offset = cut;
  }
  if (offset >= asked.keys) return;
  asked.queries = asked.keys = chunk;
  asked.query_offset = offset;
}

}  // namespace

ops::AttentionCase attention_case(const plan::Plan& plan, at::Device device) {
  const plan::ModelShape& shape = plan.model().shape;
  const bool documents = plan.resolved.data.documents == "separate";
  ops::AttentionCase asked{.path = ops::path(),
                           .on_cpu = device.is_cpu(),
                           .has_flash = ops::has_flash(device),
                           .has_efficient = ops::has_efficient(device),
                           .dtype = parallel::scalar_type_of(plan.precision.compute),
                           .head_size = shape.head_dim,
                           .queries = plan.batch.sequence_length,
                           .keys = plan.batch.sequence_length,
                           .sliding_window = shape.sliding_window,
                           .documents = documents,
                           .has_starts = documents};
  if (has_parts_of_rows(plan)) cut_into_parts(asked, plan.grid.sizes().cp);
  return asked;
}

bool uses_document_starts(const plan::Plan& plan, at::Device device) {
  ops::AttentionCase asked = attention_case(plan, device);
  asked.documents = asked.has_starts = true;
  // Rows, or the parts on the diagonal.
  asked.keys = asked.queries;
  asked.query_offset = 0;
  const ops::AttentionForm form = ops::choose_attention(asked).form;
  return form == ops::AttentionForm::kFlashDocuments ||
         form == ops::AttentionForm::kEfficientDocuments;
}

void log_attention(const plan::Plan& plan, at::Device device) {
  const ops::AttentionCase asked = attention_case(plan, device);
  const ops::AttentionChoice choice = ops::choose_attention(asked);
  if (choice.form != ops::AttentionForm::kReference)
    return log::info("engine", "attention: {}", ops::name_of(choice.form));
  const bool is_narrow = at::elementSize(asked.dtype) == 2;
  log::write(
      is_narrow ? log::Level::kWarning : log::Level::kInfo, "engine",
      fmt::format("attention{0} takes the reference, which keeps [heads, {1}, {1}] scores in "
                  "memory: {2}{3}{4}",
                  has_parts_of_rows(plan) ? " of some parts of rows" : "", asked.queries,
                  choice.reason, choice.fix.empty() ? "" : ". ", choice.fix));
}

}  // namespace capstan::engine
