// SPDX-License-Identifier: Apache-2.0
// One main for every test executable.
#include "support/skip.hpp"

#if defined(QEFT_CATCH2_V2)
#define CATCH_CONFIG_RUNNER
#include <catch2/catch.hpp>
#else
#include <catch2/catch_session.hpp>
#endif

int main(int argc, char** argv) {
  const int result = Catch::Session().run(argc, argv);
  const bool skipped = qeft_test::skipped_cases() > 0;
  return result == 0 && skipped ? qeft_test::skip_return_code : result;
}
