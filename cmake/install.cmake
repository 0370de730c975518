# SPDX-License-Identifier: Apache-2.0
# The package is the same wherever it is made: qeftConfig.cmake looks for CUDA where it is used.
include(CMakePackageConfigHelpers)

set(package_dir ${CMAKE_INSTALL_DATADIR}/cmake/qeft)
install(DIRECTORY ${PROJECT_SOURCE_DIR}/include/qeft DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(TARGETS qeft EXPORT qeftTargets)
install(EXPORT qeftTargets NAMESPACE qeft:: DESTINATION ${package_dir})
configure_package_config_file(${PROJECT_SOURCE_DIR}/cmake/qeftConfig.cmake.in
  ${PROJECT_BINARY_DIR}/qeftConfig.cmake INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/qeftConfigVersion.cmake
  COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
install(FILES ${PROJECT_BINARY_DIR}/qeftConfig.cmake ${PROJECT_BINARY_DIR}/qeftConfigVersion.cmake
  DESTINATION ${package_dir})
