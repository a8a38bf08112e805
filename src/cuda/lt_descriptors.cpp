// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
#include "cuda/lt_descriptors.h"

#include <fmt/format.h>

#include "capstan/base/error.h"

namespace capstan::cuda {
namespace {

using ops::LtEpilogue;
using ops::LtMatrix;
using ops::LtPointers;
using ops::LtProblem;
using ops::LtScale;
using ops::LtType;

cudaDataType_t theirs(LtType type) {
  constexpr cudaDataType_t kTypes[] = {CUDA_R_32F, CUDA_R_16BF, CUDA_R_16F, CUDA_R_8F_E4M3,
                                       CUDA_R_8F_E5M2};
  return kTypes[static_cast<size_t>(type)];
}

template <class T>
void set(cublasLtMatmulDesc_t product, cublasLtMatmulDescAttributes_t attribute, const T& value) {
  check_lt(cublasLtMatmulDescSetAttribute(product, attribute, &value, sizeof(value)),
           "cublasLtMatmulDescSetAttribute");
}

template <class T>
void set(cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t attribute,
         const T& value) {
  check_lt(cublasLtMatmulPreferenceSetAttribute(preference, attribute, &value, sizeof(value)),
           "cublasLtMatmulPreferenceSetAttribute");
}

int32_t operation(bool transposed) { return transposed ? CUBLAS_OP_T : CUBLAS_OP_N; }

cublasLtMatrixLayout_t make_layout(const LtMatrix& m) {
  cublasLtMatrixLayout_t layout = nullptr;
  check_lt(cublasLtMatrixLayoutCreate(&layout, theirs(m.type), static_cast<uint64_t>(m.rows),
                                      static_cast<uint64_t>(m.columns), m.leading),
           "cublasLtMatrixLayoutCreate");
  return layout;
}

// The heuristic reads the alignment of bias and aux from their addresses, which need not be memory.
const void* some_address(const LtProblem& problem) {
  return reinterpret_cast<const void*>(problem.alignment);
}

void set_bias(cublasLtMatmulDesc_t product, const LtProblem& problem, const LtPointers* pointers) {
  const void* bias = some_address(problem);
  if (pointers && problem.epilogue == LtEpilogue::kBiasGradient)
    bias = pointers->bias_gradient;
  else if (pointers)
    bias = pointers->bias;
  set(product, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, static_cast<int32_t>(theirs(problem.d.type)));
  set(product, CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias);
}

// Its type is D's where nothing else is said.
void set_aux(cublasLtMatmulDesc_t product, const LtProblem& problem, const LtPointers* pointers) {
  const void* const aux = pointers ? pointers->aux : some_address(problem);
  set(product, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, aux);
  set(product, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, problem.d.leading);
}

cublasLtEpilogue_t theirs(LtEpilogue epilogue) {
  constexpr cublasLtEpilogue_t kEpilogues[] = {CUBLASLT_EPILOGUE_DEFAULT, CUBLASLT_EPILOGUE_BIAS,
                                               CUBLASLT_EPILOGUE_GELU_AUX_BIAS,
                                               CUBLASLT_EPILOGUE_DGELU, CUBLASLT_EPILOGUE_BGRADB};
  return kEpilogues[static_cast<size_t>(epilogue)];
}

void set_epilogue(cublasLtMatmulDesc_t product, const LtProblem& problem,
                  const LtPointers* pointers) {
  const LtEpilogue e = problem.epilogue;
  set(product, CUBLASLT_MATMUL_DESC_EPILOGUE, static_cast<uint32_t>(theirs(e)));
  if (e != LtEpilogue::kNone && e != LtEpilogue::kGeluGradient)
    set_bias(product, problem, pointers);
  if (e == LtEpilogue::kGeluBias || e == LtEpilogue::kGeluGradient)
    set_aux(product, problem, pointers);
}

void set_scales(cublasLtMatmulDesc_t product, LtScale scale, const LtPointers* pointers) {
  const auto mode =
      static_cast<int32_t>(scale == LtScale::kRow ? CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F
                                                  : CUBLASLT_MATMUL_MATRIX_SCALE_SCALAR_32F);
  set(product, CUBLASLT_MATMUL_DESC_A_SCALE_MODE, mode);
  set(product, CUBLASLT_MATMUL_DESC_B_SCALE_MODE, mode);
  // Not read by the heuristic, which looks whether there are any.
  const auto* const some = reinterpret_cast<const void*>(sizeof(float) * 4);
  const void* const a = pointers ? pointers->a_scale : some;
  const void* const b = pointers ? pointers->b_scale : some;
  set(product, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, a);
  set(product, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, b);
}

}  // namespace

void check_lt(cublasStatus_t status, const char* call) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw EnvError(ErrorText{.module = "cuda",
                           .what = fmt::format("calling {}", call),
                           .got = cublasLtGetStatusName(status),
                           .need = "success",
                           .why = "cuBLASLt refused it, or an earlier kernel failed",
                           .fix = "Set run.gemm: libtorch, or run again with "
                                  "CUDA_LAUNCH_BLOCKING=1 and CUBLASLT_LOG_LEVEL=2"});
}

LtDescriptors::LtDescriptors(const LtProblem& problem, const LtPointers* pointers) {
  try {
    make(problem, pointers);
  } catch (...) {
    release();
    throw;
  }
}

void LtDescriptors::make(const LtProblem& problem, const LtPointers* pointers) {
  check_lt(cublasLtMatmulDescCreate(&product, CUBLAS_COMPUTE_32F, CUDA_R_32F),
           "cublasLtMatmulDescCreate");
  set(product, CUBLASLT_MATMUL_DESC_TRANSA, operation(problem.a_transposed));
  set(product, CUBLASLT_MATMUL_DESC_TRANSB, operation(problem.b_transposed));
  set_epilogue(product, problem, pointers);
  if (problem.scale != LtScale::kNone) set_scales(product, problem.scale, pointers);
  a = make_layout(problem.a);
  b = make_layout(problem.b);
  d = make_layout(problem.d);
}

LtDescriptors::~LtDescriptors() { release(); }

void LtDescriptors::release() {
  for (cublasLtMatrixLayout_t layout : {a, b, d})
    if (layout) cublasLtMatrixLayoutDestroy(layout);
  if (product) cublasLtMatmulDescDestroy(product);
}

// Partial sums of a cut depth are kept in fp32: results differ in the order of sums alone.
LtPreference::LtPreference(const LtProblem& problem, int64_t workspace_bytes) {
  check_lt(cublasLtMatmulPreferenceCreate(&handle), "cublasLtMatmulPreferenceCreate");
  try {
    set(handle, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<uint64_t>(workspace_bytes));
    set(handle, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
        static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
    for (const auto attribute :
         {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
          CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
      set(handle, attribute, static_cast<uint32_t>(problem.alignment));
  } catch (...) {
    cublasLtMatmulPreferenceDestroy(handle);
    throw;
  }
}

LtPreference::~LtPreference() { cublasLtMatmulPreferenceDestroy(handle); }

}  // namespace capstan::cuda
