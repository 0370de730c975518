# SPDX-License-Identifier: Apache-2.0
# What our own tests, benchmarks and examples are built with; never exported.
if(NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "" FORCE)
endif()
if(NOT DEFINED CMAKE_CXX_STANDARD)
  set(CMAKE_CXX_STANDARD 17)
endif()
set(CMAKE_CXX_EXTENSIONS OFF)

# CUDA code is compiled when a toolkit is found; nothing else needs it.
set(QEFT_CUDA_LANGUAGE OFF)
if(QEFT_CUDA AND CUDAToolkit_FOUND)
  if(NOT DEFINED CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
    set(CMAKE_CUDA_COMPILER ${CUDAToolkit_NVCC_EXECUTABLE})
  endif()
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES 80-virtual)  # PTX: runs on Ampere and everything later
  endif()
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    set(QEFT_CUDA_LANGUAGE ON)
    set(CMAKE_CUDA_STANDARD 17)
    set(CMAKE_CUDA_RUNTIME_LIBRARY Shared)
  endif()
endif()

add_library(qeft_development INTERFACE)
target_link_libraries(qeft_development INTERFACE qeft::qeft)
if(CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
  if(QEFT_WARNINGS_AS_ERRORS)
    target_compile_options(qeft_development INTERFACE
      "$<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wconversion;-Wsign-conversion;-Wshadow;-Werror>"
      "$<$<COMPILE_LANGUAGE:CUDA>:SHELL:-Xcudafe --display_error_number -Werror all-warnings -Xcompiler -Wall,-Wextra>")
  endif()
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
    # Its own AVX-512 header reads registers that it calls undefined, wherever Eigen is inlined.
    target_compile_options(qeft_development INTERFACE
      "$<$<COMPILE_LANGUAGE:CXX>:-Wno-maybe-uninitialized;-Wno-uninitialized>")
  endif()
  if(QEFT_NATIVE)
    target_compile_options(qeft_development INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-march=native>)
  endif()
  if(QEFT_SANITIZE_THREAD)
    target_compile_options(qeft_development INTERFACE
      "$<$<COMPILE_LANGUAGE:CXX>:-fsanitize=thread>")
    target_link_options(qeft_development INTERFACE -fsanitize=thread)
  endif()
  if(QEFT_SANITIZE)
    # Without what ASan finds too, and without forced inlining: these cost minutes of compilation.
    target_compile_definitions(qeft_development INTERFACE QEFT_KEEP_CALLS)
    target_compile_options(qeft_development INTERFACE
      "$<$<COMPILE_LANGUAGE:CXX>:-fsanitize=address,undefined;-fno-sanitize=null,object-size,vptr,pointer-overflow;-fno-sanitize-recover=all>")
    target_link_options(qeft_development INTERFACE -fsanitize=address,undefined)
  endif()
endif()

find_package(Eigen3 3.4 QUIET NO_MODULE)      # solver
find_package(nlohmann_json 3.9 QUIET)         # io
