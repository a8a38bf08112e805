// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// run.gemm: which library multiplies in linear layers on a GPU.
#include <string>

#include "capstan/plan/fp8.h"
#include "plan/resolve_internal.h"

namespace capstan::plan {
namespace {

// Why cuBLASLt with measured algorithms is no case, or empty.
std::string obstacle(const recipe::Recipe& r) {
  if (r.run.device == "cpu") return "cuBLASLt is a GPU's";
  if (r.model.experts.count > 0)
    return "an expert gets another number of tokens in every step, algorithms are measured for one";
  const std::string& compute = r.precision.compute;
  if (compute != "bf16" && compute != "fp16") return "products of " + compute + " are LibTorch's";
  return "";
}

}  // namespace

void check_gemm(Draft& draft) {
  std::string& gemm = draft.recipe.run.gemm;
  if (gemm == "libtorch") return;
  const std::string why = obstacle(draft.recipe);
  if (gemm == "cublaslt") {
    if (!why.empty())
      draft.refuse({"run.gemm", gemm, "libtorch or auto", why, "Leave the key out"});
    return;
  }
  if (draft.recipe.run.device == "cpu") return;  // nothing to choose
  if (!why.empty()) {
    gemm = "libtorch";
    draft.choose("run.gemm", gemm, why);
  } else if (draft.recipe.run.deterministic) {
    const bool fp8 = uses_fp8(draft.recipe);
    gemm = fp8 ? "cublaslt" : "libtorch";
    draft.choose("run.gemm", gemm,
                 fp8 ? "run.deterministic: first algorithms, nothing is measured; weight gradients "
                       "of fp8 are summed in fp32"
                     : "run.deterministic: a measurement depends on the clock");
  }
}

}  // namespace capstan::plan
