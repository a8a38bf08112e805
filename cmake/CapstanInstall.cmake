# SPDX-FileCopyrightText: Capstan contributors
# SPDX-License-Identifier: Apache-2.0
# Headers, the two libraries, the two programs, the catalogue of recipes, and a package config that finds LibTorch itself.
include(CMakePackageConfigHelpers)
set(_package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/capstan)

# Programs find libraries beside them; LibTorch where it was found at build time (or by LD_LIBRARY_PATH).
foreach(target capstan capstan_shared_base capstan_cuda capstan_cli capstan_run)
  if(TARGET ${target})
    set_target_properties(${target} PROPERTIES INSTALL_RPATH "$ORIGIN/../${CMAKE_INSTALL_LIBDIR};$ORIGIN;$ORIGIN/../../${CMAKE_INSTALL_LIBDIR};${CAPSTAN_TORCH_ROOT}/lib")
  endif()
endforeach()

if(TARGET capstan)
  install(TARGETS capstan capstan_shared_base LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
  if(TARGET capstan_cuda AND CAPSTAN_RUNS_CUDA)
    install(TARGETS capstan_cuda LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR})
  endif()
  install(DIRECTORY include/capstan DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} FILES_MATCHING PATTERN "*.h")
  configure_package_config_file(cmake/capstan-config.cmake.in ${PROJECT_BINARY_DIR}/capstan-config.cmake
    INSTALL_DESTINATION ${_package_dir} PATH_VARS CMAKE_INSTALL_INCLUDEDIR CMAKE_INSTALL_LIBDIR)
  write_basic_package_version_file(${PROJECT_BINARY_DIR}/capstan-config-version.cmake COMPATIBILITY SameMinorVersion)
  install(FILES ${PROJECT_BINARY_DIR}/capstan-config.cmake ${PROJECT_BINARY_DIR}/capstan-config-version.cmake cmake/CapstanTorch.cmake
    DESTINATION ${_package_dir})
endif()
if(TARGET capstan_cli)
  install(TARGETS capstan_cli RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
  install(TARGETS capstan_run RUNTIME DESTINATION libexec/capstan)
  install(DIRECTORY configs/ DESTINATION share/capstan/configs FILES_MATCHING PATTERN "*.yaml")
endif()
