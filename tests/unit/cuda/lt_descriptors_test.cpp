// SPDX-FileCopyrightText: Capstan contributors
// SPDX-License-Identifier: Apache-2.0
// Descriptors as the library itself reads them back; it makes them without a GPU.
#include "cuda/lt_descriptors.h"

#include <gtest/gtest.h>

#include "capstan/base/error.h"

namespace capstan::cuda {
namespace {

using ops::LtEpilogue;
using ops::LtPointers;
using ops::LtProblem;
using ops::LtScale;
using ops::LtType;

template <class T>
T get(cublasLtMatmulDesc_t product, cublasLtMatmulDescAttributes_t attribute) {
  T value{};
  size_t written = 0;
  check_lt(cublasLtMatmulDescGetAttribute(product, attribute, &value, sizeof(value), &written),
           "cublasLtMatmulDescGetAttribute");
  EXPECT_EQ(written, sizeof(value));
  return value;
}

template <class T>
T get(cublasLtMatrixLayout_t layout, cublasLtMatrixLayoutAttribute_t attribute) {
  T value{};
  size_t written = 0;
  check_lt(cublasLtMatrixLayoutGetAttribute(layout, attribute, &value, sizeof(value), &written),
           "cublasLtMatrixLayoutGetAttribute");
  return value;
}

template <class T>
T get(cublasLtMatmulPreference_t preference, cublasLtMatmulPreferenceAttributes_t attribute) {
  T value{};
  size_t written = 0;
  check_lt(
      cublasLtMatmulPreferenceGetAttribute(preference, attribute, &value, sizeof(value), &written),
      "cublasLtMatmulPreferenceGetAttribute");
  return value;
}

void expect_layout(cublasLtMatrixLayout_t layout, cudaDataType_t type, uint64_t rows,
                   uint64_t columns, int64_t leading) {
  EXPECT_EQ(get<uint32_t>(layout, CUBLASLT_MATRIX_LAYOUT_TYPE), static_cast<uint32_t>(type));
  EXPECT_EQ(get<uint64_t>(layout, CUBLASLT_MATRIX_LAYOUT_ROWS), rows);
  EXPECT_EQ(get<uint64_t>(layout, CUBLASLT_MATRIX_LAYOUT_COLS), columns);
  EXPECT_EQ(get<int64_t>(layout, CUBLASLT_MATRIX_LAYOUT_LD), leading);
  EXPECT_EQ(get<int32_t>(layout, CUBLASLT_MATRIX_LAYOUT_ORDER), CUBLASLT_ORDER_COL);
}

const void* address(int64_t n) { return reinterpret_cast<const void*>(n); }

TEST(LtDescriptors, AProjectionWithBias) {
  const LtProblem problem{.a = {LtType::kBf16, 7, 3, 8},
                          .b = {LtType::kBf16, 7, 5, 16},
                          .d = {LtType::kBf16, 3, 5, 4},
                          .a_transposed = true,
                          .epilogue = LtEpilogue::kBias,
                          .alignment = 8};
  const LtDescriptors asked(problem);
  expect_layout(asked.a, CUDA_R_16BF, 7, 3, 8);
  expect_layout(asked.b, CUDA_R_16BF, 7, 5, 16);
  expect_layout(asked.d, CUDA_R_16BF, 3, 5, 4);
  EXPECT_EQ(get<int32_t>(asked.product, CUBLASLT_MATMUL_DESC_COMPUTE_TYPE), CUBLAS_COMPUTE_32F);
  EXPECT_EQ(get<int32_t>(asked.product, CUBLASLT_MATMUL_DESC_SCALE_TYPE), CUDA_R_32F);
  EXPECT_EQ(get<int32_t>(asked.product, CUBLASLT_MATMUL_DESC_TRANSA), CUBLAS_OP_T);
  EXPECT_EQ(get<int32_t>(asked.product, CUBLASLT_MATMUL_DESC_TRANSB), CUBLAS_OP_N);
  EXPECT_EQ(get<uint32_t>(asked.product, CUBLASLT_MATMUL_DESC_EPILOGUE),
            static_cast<uint32_t>(CUBLASLT_EPILOGUE_BIAS));
  EXPECT_EQ(get<const void*>(asked.product, CUBLASLT_MATMUL_DESC_BIAS_POINTER), address(8));
  const LtPointers pointers{.bias = address(4096)};
  const LtDescriptors run(problem, &pointers);
  EXPECT_EQ(get<const void*>(run.product, CUBLASLT_MATMUL_DESC_BIAS_POINTER), address(4096));
}

// The bias gradient of fp32 weights beside their product, GELU of a sum, its derivative.
TEST(LtDescriptors, Epilogues) {
  struct Case {
    LtEpilogue epilogue;
    LtType type;
    uint32_t theirs;
    const void *bias, *aux;
  };
  const LtPointers pointers{.bias = address(4096),
                            .aux = reinterpret_cast<void*>(8192),
                            .bias_gradient = reinterpret_cast<void*>(16384)};
  const void* const none = nullptr;
  for (const Case& c :
       {Case{LtEpilogue::kGeluBias, LtType::kBf16, CUBLASLT_EPILOGUE_GELU_AUX_BIAS, address(4096),
             address(8192)},
        {LtEpilogue::kGeluGradient, LtType::kFp16, CUBLASLT_EPILOGUE_DGELU, none, address(8192)},
        {LtEpilogue::kBiasGradient, LtType::kFp32, CUBLASLT_EPILOGUE_BGRADB, address(16384),
         none}}) {
    const LtProblem problem{.a = {LtType::kBf16, 16, 8, 16},
                            .b = {LtType::kBf16, 16, 5, 16},
                            .d = {c.type, 8, 5, 24},
                            .a_transposed = true,
                            .epilogue = c.epilogue};
    const LtDescriptors asked(problem), run(problem, &pointers);
    const auto pointer = [](const LtDescriptors& d, auto attribute) {
      return get<const void*>(d.product, attribute);
    };
    EXPECT_EQ(get<uint32_t>(run.product, CUBLASLT_MATMUL_DESC_EPILOGUE), c.theirs);
    EXPECT_EQ(pointer(run, CUBLASLT_MATMUL_DESC_BIAS_POINTER), c.bias);
    EXPECT_EQ(pointer(run, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER), c.aux);
    EXPECT_EQ(pointer(asked, CUBLASLT_MATMUL_DESC_BIAS_POINTER), c.bias ? address(16) : none);
    EXPECT_EQ(pointer(asked, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER),
              c.aux ? address(16) : none);
    EXPECT_EQ(get<int64_t>(run.product, CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD), c.aux ? 24 : 0);
    if (c.bias) {
      EXPECT_EQ(get<int32_t>(run.product, CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE),
                c.type == LtType::kFp32 ? CUDA_R_32F : CUDA_R_16BF);
    }
  }
}

TEST(LtDescriptors, Fp8WithScales) {
  for (const auto& [scale, mode] :
       {std::pair(LtScale::kTensor, CUBLASLT_MATMUL_MATRIX_SCALE_SCALAR_32F),
        {LtScale::kRow, CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F}}) {
    const LtProblem problem{.a = {LtType::kE4m3, 48, 16, 48},
                            .b = {LtType::kE5m2, 48, 32, 48},
                            .d = {LtType::kFp32, 16, 32, 16},
                            .a_transposed = true,
                            .accumulates = true,
                            .scale = scale};
    const float numbers[2] = {1, 2};
    const LtPointers pointers{.a_scale = numbers, .b_scale = numbers + 1};
    const LtDescriptors run(problem, &pointers);
    expect_layout(run.a, CUDA_R_8F_E4M3, 48, 16, 48);
    expect_layout(run.b, CUDA_R_8F_E5M2, 48, 32, 48);
    expect_layout(run.d, CUDA_R_32F, 16, 32, 16);
    const auto asked = [&run](auto attribute) { return get<const void*>(run.product, attribute); };
    EXPECT_EQ(asked(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER), numbers);
    EXPECT_EQ(asked(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER), numbers + 1);
    EXPECT_EQ(get<int32_t>(run.product, CUBLASLT_MATMUL_DESC_A_SCALE_MODE), mode);
    EXPECT_EQ(get<int32_t>(run.product, CUBLASLT_MATMUL_DESC_B_SCALE_MODE), mode);
    EXPECT_EQ(get<int8_t>(run.product, CUBLASLT_MATMUL_DESC_FAST_ACCUM), 0);
    EXPECT_EQ(get<uint32_t>(run.product, CUBLASLT_MATMUL_DESC_EPILOGUE),
              static_cast<uint32_t>(CUBLASLT_EPILOGUE_DEFAULT));
  }
}

TEST(LtDescriptors, PartialSumsAreFp32) {
  const LtPreference preference({.alignment = 4}, 12345);
  EXPECT_EQ(get<uint64_t>(preference.handle, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES), 12345U);
  EXPECT_EQ(get<uint32_t>(preference.handle, CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK),
            static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
  for (const auto attribute :
       {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
    EXPECT_EQ(get<uint32_t>(preference.handle, attribute), 4U);
}

TEST(LtDescriptors, AFailureNamesCallAndStatus) {
  try {
    check_lt(CUBLAS_STATUS_NOT_SUPPORTED, "cublasLtMatmul");
    FAIL();
  } catch (const EnvError& error) {
    const std::string text = error.what();
    EXPECT_NE(text.find("cublasLtMatmul"), std::string::npos) << text;
    EXPECT_NE(text.find("CUBLAS_STATUS_NOT_SUPPORTED"), std::string::npos) << text;
    EXPECT_NE(text.find("run.gemm: libtorch"), std::string::npos) << text;
  }
}

}  // namespace
}  // namespace capstan::cuda
