# SPDX-FileCopyrightText: Capstan contributors
# SPDX-License-Identifier: Apache-2.0
# CAPSTAN_WITH_CUDA: nvcc and the runtime. Code for compute capability 8.0 and 9.0a unless told otherwise.
# CAPSTAN_RUNS_CUDA: programs of this build find the plug-in.
set(CAPSTAN_RUNS_CUDA ${CAPSTAN_WITH_CUDA})
if(CAPSTAN_WITH_CUDA STREQUAL "CHECK")
  set(CAPSTAN_RUNS_CUDA OFF)
endif()
if(CAPSTAN_WITH_CUDA)
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES "80-real;90a-real" CACHE STRING "GPU architectures")
  endif()
  enable_language(CUDA)
  if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMake 3.25 does not know what nvcc 12 and later can do
    set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
    set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
  endif()
  find_package(CUDAToolkit REQUIRED)
  # The runtime that LibTorch loads, which lies beside cuBLASLt: one folder to search when programs start.
  find_library(CAPSTAN_CUDART_LIBRARY NAMES libcudart.so.13 cudart HINTS ${CAPSTAN_TORCH_ROOT}/../nvidia/cu13/lib ${CUDAToolkit_LIBRARY_DIR} REQUIRED)
  set_target_properties(CUDA::cudart PROPERTIES IMPORTED_LOCATION ${CAPSTAN_CUDART_LIBRARY})
endif()
