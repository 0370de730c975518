// SPDX-License-Identifier: Apache-2.0
// The tests' own safety net.
#include "support/sweep.hpp"

TEST_CASE("a sweep whose body never ran fails its test", "[!shouldfail]") {
  const qeft_test::sweep counted("nothing");
}

TEST_CASE("a sweep whose body ran passes") {
  qeft_test::sweep counted("one case");
  counted.ran();
}

TEST_CASE("random numbers are the same everywhere") {
  qeft_test::random_source random(5489);
  CHECK(random.bits() == 14514284786278117030U);  // first output of std::mt19937_64 by the standard
  for (int i = 0; i < 100; ++i) {
    const auto n = random.integer(-3, 3);
    CHECK((n >= -3 && n <= 3));
    const double x = random.real();
    CHECK((x >= -1.0 && x < 1.0));
  }
}
