// SPDX-License-Identifier: Apache-2.0
// Sizes, spans, buffers and errors.
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "qeft/core/checked_product.hpp"
#include "qeft/core/host_buffer.hpp"
#include "qeft/core/math.hpp"
#include "qeft/core/memory.hpp"
#include "qeft/core/status.hpp"
#include "qeft/core/version.hpp"
#include "support/catch.hpp"
#include "support/throws.hpp"

using qeft_test::throws_with;

TEST_CASE("ceil_div and round_up") {
  for (qeft::index_t a = 0; a < 100; ++a) {
    for (qeft::index_t b = 1; b < 40; ++b) {
      const qeft::index_t q = qeft::ceil_div(a, b);
      CHECK((q * b >= a && (q - 1) * b < a));
      CHECK(qeft::round_up(a, b) == q * b);
    }
  }
  // The textbook (a + b - 1) / b would overflow here.
  constexpr qeft::index_t max = std::numeric_limits<qeft::index_t>::max();
  CHECK(qeft::ceil_div(max, 2) == max / 2 + 1);
}

TEST_CASE("checked_product refuses negative factors and overflow") {
  constexpr qeft::index_t max = std::numeric_limits<qeft::index_t>::max();
  CHECK(qeft::checked_product(6, 7, "n") == 42);
  CHECK(qeft::checked_product(0, max, "n") == 0);
  CHECK(qeft::checked_product(max, 1, "n") == max);
  CHECK(throws_with(qeft::errc::invalid_argument, {"rows x columns", "-1 x 2"},
                    [] { qeft::checked_product(-1, 2, "rows x columns"); }));
  CHECK(throws_with(qeft::errc::invalid_argument, {"overflows 64 bits"},
                    [] { qeft::checked_product(2, -1, "n"); }));
  CHECK(throws_with(qeft::errc::invalid_argument, {"overflows 64 bits"},
                    [] { qeft::checked_product(max / 2 + 1, 2, "n"); }));
}

TEST_CASE("span views a container or a pointer") {
  std::vector<int> v = {1, 2, 3};
  const qeft::span<int> s = v;
  CHECK(s.data() == v.data());
  CHECK(s.size() == 3);
  s[1] = 7;
  CHECK(v[1] == 7);
  int sum = 0;
  for (const int x : s) sum += x;
  CHECK(sum == 11);
  CHECK(qeft::span<int>().empty());
  CHECK_FALSE(qeft::span<const int>(v.data(), 2).empty());
  STATIC_REQUIRE(std::is_trivially_copyable_v<qeft::span<int>>);
}

TEST_CASE("host_buffer is aligned to cache lines and starts as zeros") {
  for (const std::size_t size : {std::size_t{1}, std::size_t{63}, std::size_t{1000}}) {
    const qeft::host_buffer<std::uint16_t> b(size);
    CHECK(reinterpret_cast<std::uintptr_t>(b.data()) % 64 == 0);
    for (const std::uint16_t x : b) REQUIRE(x == 0);
  }
  CHECK_THROWS_AS(qeft::aligned_allocator<double>().allocate(static_cast<std::size_t>(-1) / 4),
                  std::bad_alloc);
}

TEST_CASE("status and error carry the same code and text") {
  const qeft::status good;
  CHECK(good.ok());
  CHECK(good.message().empty());
  good.throw_if_error();

  const qeft::status bad(qeft::errc::unsupported, "the reason");
  CHECK_FALSE(bad.ok());
  CHECK(bad.code() == qeft::errc::unsupported);
  CHECK(throws_with(qeft::errc::unsupported, {"the reason"}, [&] { bad.throw_if_error(); }));
  CHECK(throws_with(qeft::errc::io_error, {"no disk"},
                    [] { qeft::fail(qeft::errc::io_error, "no disk"); }));
}

TEST_CASE("text joins strings and numbers") {
  CHECK(qeft::text() == "");
  CHECK(qeft::text("rows is ", -3, ", not ", std::size_t{4}, std::string(" or "), 'x') ==
        "rows is -3, not 4 or x");
  CHECK(qeft::text(0.5F, ' ', -1e-30, ' ', std::numeric_limits<double>::infinity()) ==
        "0.5 -1e-30 inf");
  CHECK(qeft::text(std::numeric_limits<std::int64_t>::min(), ' ',
                   std::numeric_limits<std::uint64_t>::max()) ==
        "-9223372036854775808 18446744073709551615");
  CHECK(qeft::text(std::uint8_t{200}, std::int8_t{-100}, true) == "200-1001");
}

TEST_CASE("the build knows the library's version") {
  CHECK(std::string(QEFT_TEST_PROJECT_VERSION) == std::to_string(QEFT_VERSION_MAJOR) + "." +
                                                      std::to_string(QEFT_VERSION_MINOR) + "." +
                                                      std::to_string(QEFT_VERSION_PATCH));
}
