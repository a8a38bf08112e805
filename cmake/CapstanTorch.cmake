# SPDX-FileCopyrightText: Capstan contributors
# SPDX-License-Identifier: Apache-2.0
# LibTorch 2.11 as two imported targets of our own: libtorch_cpu and libc10 only, without find_package(Torch).
# Search order: -DCAPSTAN_TORCH_DIR, environment CAPSTAN_TORCH_DIR, .deps/torch-2.11.0/torch, the one an installed Capstan was
# built with, the torch of python3. Installed with the package: users get the same targets.
set(CAPSTAN_TORCH_VERSION 2.11.0)
set(CAPSTAN_TORCH_DIR "" CACHE PATH "Folder with LibTorch's include/ and lib/")

function(_capstan_find_torch out)
  set(candidates ${CAPSTAN_TORCH_DIR} $ENV{CAPSTAN_TORCH_DIR} ${PROJECT_SOURCE_DIR}/.deps/torch-${CAPSTAN_TORCH_VERSION}/torch
    ${CAPSTAN_BUILT_WITH_TORCH})
  foreach(candidate IN LISTS candidates)
    if(EXISTS ${candidate}/lib/libtorch_cpu.so)
      set(${out} ${candidate} PARENT_SCOPE)
      return()
    endif()
  endforeach()
  execute_process(COMMAND python3 -c "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
    OUTPUT_VARIABLE python_torch OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failed)
  if(NOT failed AND EXISTS ${python_torch}/lib/libtorch_cpu.so)
    set(${out} ${python_torch} PARENT_SCOPE)
    return()
  endif()
  message(FATAL_ERROR "LibTorch ${CAPSTAN_TORCH_VERSION} was not found: tried [${candidates}] and python3's torch. "
    "Run tools/setup.sh, or pass -DCAPSTAN_TORCH_DIR=DIR.")
endfunction()

_capstan_find_torch(_torch)
get_filename_component(_torch ${_torch} REALPATH)
if(EXISTS ${_torch}/version.py)
  file(STRINGS ${_torch}/version.py _version REGEX "__version__")
elseif(EXISTS ${_torch}/build-version)
  file(STRINGS ${_torch}/build-version _version)
endif()
if(_version AND NOT _version MATCHES "2\\.11\\.0")
  message(FATAL_ERROR "LibTorch in ${_torch}: got ${_version}, need ${CAPSTAN_TORCH_VERSION}. Run tools/setup.sh or pass -DCAPSTAN_TORCH_DIR=DIR.")
endif()
set(CAPSTAN_TORCH_ROOT ${_torch} CACHE INTERNAL "LibTorch in use")

# The wheel's include folder also holds fmt, protobuf and pybind11, which clash with the system's: link only what is needed.
set(_links ${PROJECT_BINARY_DIR}/torch-include)
file(MAKE_DIRECTORY ${_links})
foreach(folder ATen c10 torch caffe2)
  get_filename_component(_present ${_links}/${folder} REALPATH)
  get_filename_component(_wanted ${_torch}/include/${folder} REALPATH)
  if(NOT _present STREQUAL _wanted)
    file(REMOVE ${_links}/${folder})
    file(CREATE_LINK ${_torch}/include/${folder} ${_links}/${folder} SYMBOLIC)
  endif()
endforeach()

foreach(library torch_cpu c10)
  add_library(capstan_wheel_${library} SHARED IMPORTED GLOBAL)
  set_target_properties(capstan_wheel_${library} PROPERTIES IMPORTED_LOCATION ${_torch}/lib/lib${library}.so)
endforeach()
add_library(capstan_torch_cpu INTERFACE)
add_library(capstan::torch_cpu ALIAS capstan_torch_cpu)
target_include_directories(capstan_torch_cpu SYSTEM INTERFACE ${_links})
target_compile_definitions(capstan_torch_cpu INTERFACE USE_DISTRIBUTED USE_C10D_GLOO USE_RPC USE_TENSORPIPE)
target_compile_options(capstan_torch_cpu INTERFACE -fopenmp)   # without it at::parallel_for is silently serial
target_link_libraries(capstan_torch_cpu INTERFACE capstan_wheel_torch_cpu capstan_wheel_c10)
foreach(cudart ${_torch}/../nvidia/cu13/lib)
  if(EXISTS ${cudart})
    target_link_options(capstan_torch_cpu INTERFACE -Wl,-rpath-link,${cudart})
  endif()
endforeach()
message(STATUS "LibTorch: ${_torch}")
