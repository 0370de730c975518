# SPDX-License-Identifier: Apache-2.0
# Configures, builds and runs one consumer project from nothing.
cmake_minimum_required(VERSION 3.21)
set(consumer ${SOURCE_DIR}/tests/consumer)
file(REMOVE_RECURSE ${WORK_DIR})
file(MAKE_DIRECTORY ${WORK_DIR})

function(run)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE result OUTPUT_VARIABLE text ERROR_VARIABLE text)
  if(NOT result EQUAL 0)
    list(JOIN ARGN " " command)
    message(FATAL_ERROR "failed: ${command}\n${text}")
  endif()
endfunction()

if(WAY STREQUAL "include_path")
  run(${COMPILER} -std=c++${STANDARD} -I${SOURCE_DIR}/include ${consumer}/main.cpp -pthread
      -o ${WORK_DIR}/consumer)
else()
  set(settings -DCMAKE_CXX_COMPILER=${COMPILER})
  if(WAY STREQUAL "subdirectory")
    list(APPEND settings -DQEFT_SOURCE_DIR=${SOURCE_DIR})
  else()
    run(${CMAKE_COMMAND} --install ${QEFT_BINARY_DIR} --prefix ${WORK_DIR}/prefix)
    list(APPEND settings -DCMAKE_PREFIX_PATH=${WORK_DIR}/prefix
         -DQEFT_MAJOR=${MAJOR} -DQEFT_MINOR=${MINOR})
  endif()
  run(${CMAKE_COMMAND} -S ${consumer}/${WAY} -B ${WORK_DIR} -G ${GENERATOR} ${settings})
  run(${CMAKE_COMMAND} --build ${WORK_DIR})
endif()
run(${WORK_DIR}/consumer)
