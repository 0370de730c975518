// SPDX-License-Identifier: Apache-2.0
// Skipping a test case with a reason. CTest then reports the executable as skipped, unless another
// case failed: a failure is never hidden.
#pragma once

#include <cstdio>
#include <string>

namespace qeft_test {

inline constexpr int skip_return_code = 77;  // SKIP_RETURN_CODE in tests/CMakeLists.txt

inline int& skipped_cases() {
  static int count = 0;
  return count;
}

/// Call it, then return from the test case.
inline void skip(const std::string& reason) {
  ++skipped_cases();
  std::printf("skipped: %s\n", reason.c_str());
}

}  // namespace qeft_test
