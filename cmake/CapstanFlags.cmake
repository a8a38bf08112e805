# SPDX-FileCopyrightText: Capstan contributors
# SPDX-License-Identifier: Apache-2.0
# Warnings, sanitizers and code model on one interface target, never exported.
add_library(capstan_build_flags INTERFACE)
target_compile_definitions(capstan_build_flags INTERFACE CAPSTAN_VERSION="${PROJECT_VERSION}")
target_compile_options(capstan_build_flags INTERFACE -fPIC -Wall -Wextra -Wpedantic -Wshadow -Wnon-virtual-dtor
  -Wno-missing-field-initializers -ffp-contract=off)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  target_compile_options(capstan_build_flags INTERFACE -fpch-preprocess)
endif()
option(CAPSTAN_WERROR "Treat warnings as errors" OFF)
if(CAPSTAN_WERROR)
  target_compile_options(capstan_build_flags INTERFACE -Werror)
endif()
# Loops over arrays are worth the vectorizer's full effort, except under a sanitizer: there they take minutes to compile, and
# GCC 12 crashes on some under ThreadSanitizer.
set(CAPSTAN_LOOPS -O3)
if(CAPSTAN_SANITIZE)
  set(CAPSTAN_LOOPS -O1)
  target_compile_options(capstan_build_flags INTERFACE -fsanitize=${CAPSTAN_SANITIZE} -fno-omit-frame-pointer)
  target_link_options(capstan_build_flags INTERFACE -fsanitize=${CAPSTAN_SANITIZE})
endif()
