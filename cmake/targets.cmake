# SPDX-License-Identifier: Apache-2.0
# The targets consumers link. Nothing here sets warnings, optimisation or an instruction set.
include(GNUInstallDirs)
find_package(Threads REQUIRED)

add_library(qeft INTERFACE)
add_library(qeft::qeft ALIAS qeft)
target_include_directories(qeft INTERFACE
  $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/include>
  $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
target_compile_features(qeft INTERFACE cxx_std_17)
target_link_libraries(qeft INTERFACE Threads::Threads)

# qeft::cuda exists when a CUDA toolkit is found; it adds the runtime to qeft::qeft. The installed
# package makes its own (qeftConfig.cmake.in).
find_package(CUDAToolkit QUIET)
if(TARGET CUDA::cudart)
  add_library(qeft_cuda INTERFACE)
  add_library(qeft::cuda ALIAS qeft_cuda)
  target_link_libraries(qeft_cuda INTERFACE qeft CUDA::cudart)
endif()
