// SPDX-License-Identifier: Apache-2.0
// Sweeps that cannot pass by doing nothing, and replayable random cases.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <exception>
#include <random>
#include <string>

#include "support/catch.hpp"

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

/// The same numbers with every standard library (std:: distributions differ between them).
class random_source {
 public:
  explicit random_source(std::uint64_t seed) : engine_(seed) {}

  std::uint64_t bits() { return engine_(); }
  /// Uniform in [low, high].
  std::int64_t integer(std::int64_t low, std::int64_t high) {
    return low + static_cast<std::int64_t>(engine_() % static_cast<std::uint64_t>(high - low + 1));
  }
  /// Uniform in [-1, 1).
  double real() { return static_cast<double>(engine_() >> 11U) * 0x1p-52 - 1.0; }
  bool chance(int percent) { return integer(0, 99) < percent; }
  template <class T>
  const T& pick(std::initializer_list<T> values) {
    return *(values.begin() + integer(0, static_cast<std::int64_t>(values.size()) - 1));
  }

 private:
  std::mt19937_64 engine_;
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
