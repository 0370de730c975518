// SPDX-License-Identifier: Apache-2.0
// Products in two parts are exact, and factors bring numbers where they should.
#include "qeft/thread/split_product.hpp"

#include <cmath>

#include "support/catch.hpp"
#include "support/sweep.hpp"

namespace {

template <class Scalar>
double value(std::uint32_t pair, unsigned half) {
  return static_cast<double>(
      qeft::to_float(Scalar{static_cast<std::uint16_t>(pair >> 16U * half)}));
}

/// Two random numbers from 2^low on, below 2^(high + 1).
template <class Scalar>
std::uint32_t random_pair(qeft_test::random_source& random, int low, int high) {
  const auto number = [&] {
    const double size =
        std::ldexp(1 + std::abs(random.real()) / 2, static_cast<int>(random.integer(low, high)));
    const double x = random.chance(50) ? size : -size;
    return std::uint32_t{qeft::from_float<Scalar>(static_cast<float>(x)).bits};
  };
  return number() | number() << 16U;
}

template <class Scalar>
void check_products() {
  qeft_test::sweep counted("products");
  qeft_test::random_source random(1);
  for (int i = 0; i < 10000; ++i) {
    counted.ran();
    // The last bit of their products is at 2^-24 or above, as that of the smallest FP16 number.
    const std::uint32_t a = random_pair<Scalar>(random, 5, 15);
    const std::uint32_t b = random_pair<Scalar>(random, -9, -3);
    const qeft::split_pair p = qeft::split_product<Scalar>(a, b);
    for (const unsigned half : {0U, 1U}) {
      const double exact = value<Scalar>(a, half) * value<Scalar>(b, half);
      REQUIRE(value<Scalar>(p.high, half) + value<Scalar>(p.low, half) == exact);
      REQUIRE(p.high >> 16U * half << 16U ==
              std::uint32_t{qeft::from_float<Scalar>(static_cast<float>(exact)).bits} << 16U);
    }
  }
}

}  // namespace

TEST_CASE("products of 16-bit floats are exact in two parts") {
  check_products<qeft::half_bits>();
  check_products<qeft::bf16_bits>();
}

TEST_CASE("factors are powers of two that bring numbers into a binade") {
  CHECK(qeft::factor_to(15, 126, 1.0F) == 0x1p15F);
  CHECK(qeft::factor_to(15, 126, 65504.0F) == 1.0F);
  CHECK(qeft::factor_to(15, 126, 0x1p-24F) == 0x1p39F);
  CHECK(qeft::factor_to(-2, 15, 1.75F) == 0.25F);
  CHECK(qeft::factor_to(-2, 15, 0x1p-24F) == 0x1p15F);
  for (const float x : {0.0F, INFINITY, NAN}) CHECK(qeft::factor_to(15, 126, x) == 1.0F);
}
