// SPDX-License-Identifier: Apache-2.0
// Catch2 2 and 3 under one name.
#pragma once

#include <string>

#if defined(QEFT_CATCH2_V2)
#include <catch2/catch.hpp>
#else
#include <catch2/catch_all.hpp>
#endif

namespace qeft_test {

/// Matches strings that contain `fragment`: CHECK_THROWS_WITH(f(), contains("k is 3")).
inline auto contains(const std::string& fragment) {
#if defined(QEFT_CATCH2_V2)
  return Catch::Matchers::Contains(fragment);
#else
  return Catch::Matchers::ContainsSubstring(fragment);
#endif
}

}  // namespace qeft_test
