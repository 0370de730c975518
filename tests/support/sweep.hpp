// SPDX-License-Identifier: Apache-2.0
// Sweeps that cannot pass by doing nothing, and over replayable random cases.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <exception>
#include <string>

#include "support/catch.hpp"
#include "support/random.hpp"

namespace qeft_test {

/// Counts the runs of a loop's body; a test whose sweep never ran fails.
class sweep {
 public:
  explicit sweep(std::string what) : what_(std::move(what)) {}
  sweep(const sweep&) = delete;
  sweep& operator=(const sweep&) = delete;
  ~sweep() {
    if (runs_ == 0 && std::uncaught_exceptions() == 0) {
      FAIL_CHECK("the body of the sweep over " << what_ << " never ran");
    }
  }

  void ran() noexcept { ++runs_; }

 private:
  std::string what_;
  std::int64_t runs_ = 0;
};

/// Calls body(seed) for `cases` fixed seeds, or a tenth of them under TSan, which looks for races
/// rather than for wrong results. A failure prints its seed; QEFT_TEST_SEED=<seed> in the
/// environment runs that case alone.
template <class Body>
void fuzz(const std::string& what, std::uint64_t cases, const Body& body) {
  sweep counted(what);
  const auto run = [&](std::uint64_t seed) {
    INFO("replay with QEFT_TEST_SEED=" << seed);
    body(seed);
    counted.ran();
  };
  if (const char* seed = std::getenv("QEFT_TEST_SEED")) {
    run(std::strtoull(seed, nullptr, 10));
    return;
  }
#if defined(__SANITIZE_THREAD__)
  cases = (cases + 9) / 10;
#endif
  for (std::uint64_t seed = 1; seed <= cases; ++seed) run(seed);
}

}  // namespace qeft_test
