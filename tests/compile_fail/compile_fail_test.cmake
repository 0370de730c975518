# SPDX-License-Identifier: Apache-2.0
# cmake -DCOMPILER=... -DSTANDARD=17 -DINCLUDE_DIR=... -DSOURCE=x.cpp -P compile_fail_test.cmake
# The file must compile with VALID = 1, and with VALID = 0 fail with the text after `// expect:` (a
# regular expression whose parentheses, stars, dots and plus signs are literal). With a line
# `// flags: A | B` it must fail with each of these sets of flags; those of `// always: A` are given
# with VALID = 1 too. With -DREFUSED=ON the compiler is one for which the file must always fail. A .cu
# file needs nvcc, and -DOUTPUT=file.
cmake_minimum_required(VERSION 3.21)
set(command ${COMPILER} -std=c++${STANDARD} -fsyntax-only -Werror=unused-result -I${INCLUDE_DIR})
if(SOURCE MATCHES "[.]cu$")
  set(command ${COMPILER} -std=c++${STANDARD} -arch=compute_80 -ptx -o ${OUTPUT} -I${INCLUDE_DIR})
endif()

file(STRINGS ${SOURCE} expect REGEX "^// expect: ")
string(REGEX REPLACE "^// expect: " "" expect "${expect}")
if(expect STREQUAL "")
  message(FATAL_ERROR "${SOURCE} has no line `// expect: text`")
endif()
string(REGEX REPLACE "([][().*+?])" "\\\\\\1" pattern "${expect}")

function(read_flags name out)
  file(STRINGS ${SOURCE} line REGEX "^// ${name}: ")
  string(REGEX REPLACE "^// ${name}: " "" line "${line}")
  set(${out} "${line}" PARENT_SCOPE)
endfunction()
read_flags(always always)
separate_arguments(always)
read_flags(flags flags)
string(REPLACE " | " ";" flag_sets "${flags}")
if(REFUSED OR NOT flag_sets)
  set(flag_sets " ")
endif()

if(NOT REFUSED)
  execute_process(COMMAND ${command} ${always} -DVALID=1 ${SOURCE}
                  RESULT_VARIABLE result ERROR_VARIABLE text)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "does not compile with VALID=1:\n${text}")
  endif()
endif()
foreach(flag_set IN LISTS flag_sets)
  separate_arguments(flags UNIX_COMMAND "${flag_set}")
  execute_process(COMMAND ${command} ${always} ${flags} -DVALID=0 ${SOURCE}
                  RESULT_VARIABLE result ERROR_VARIABLE text)
  if(result EQUAL 0)
    message(FATAL_ERROR "compiles with '${flag_set}', but must fail with: ${expect}")
  endif()
  if(NOT text MATCHES "${pattern}")
    message(FATAL_ERROR "fails with '${flag_set}' without the text: ${expect}\n${text}")
  endif()
endforeach()
