# SPDX-License-Identifier: Apache-2.0
# cmake -DCOMPILER=... -DSTANDARD=17 -DINCLUDE_DIR=... -DSOURCE=x.cpp -P compile_fail_test.cmake
# The file must compile with VALID = 1, and with VALID = 0 fail with the text after `// expect:` (a
# regular expression whose parentheses, stars, dots and plus signs are literal).
cmake_minimum_required(VERSION 3.21)
set(command ${COMPILER} -std=c++${STANDARD} -fsyntax-only -Werror=unused-result -I${INCLUDE_DIR})

file(STRINGS ${SOURCE} expect REGEX "^// expect: ")
string(REGEX REPLACE "^// expect: " "" expect "${expect}")
if(expect STREQUAL "")
  message(FATAL_ERROR "${SOURCE} has no line `// expect: text`")
endif()
string(REGEX REPLACE "([][().*+?])" "\\\\\\1" pattern "${expect}")

execute_process(COMMAND ${command} -DVALID=1 ${SOURCE} RESULT_VARIABLE result ERROR_VARIABLE text)
if(NOT result EQUAL 0)
  message(FATAL_ERROR "does not compile with VALID=1:\n${text}")
endif()
execute_process(COMMAND ${command} -DVALID=0 ${SOURCE} RESULT_VARIABLE result ERROR_VARIABLE text)
if(result EQUAL 0)
  message(FATAL_ERROR "compiles, but must fail with: ${expect}")
endif()
if(NOT text MATCHES "${pattern}")
  message(FATAL_ERROR "fails without the text: ${expect}\n${text}")
endif()
