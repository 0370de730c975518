// SPDX-License-Identifier: Apache-2.0
// The streamed Hessian and cross moments against their definitions in double.
#include "qeft/solver/hessian.hpp"
#include "qeft/core/host_buffer.hpp"

#include <cmath>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "support/catch.hpp"

namespace {

using qeft::index_t;
using qeft::on_host;
using qeft::solver::cross_accumulator;
using qeft::solver::hessian_accumulator;

std::vector<float> make_activations(index_t tokens, index_t ic) {
  std::mt19937 rng(21);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<std::size_t>(tokens * ic));
  for (std::size_t i = 0; i < x.size(); ++i) {
    x[i] = normal(rng) * (i % static_cast<std::size_t>(ic) == 1 ? 60.0F : 1.0F);
  }
  return x;
}

qeft::host_buffer<float> hessian_of(const on_host& exec, const std::vector<float>& x, index_t ic,
                                    const std::vector<index_t>& samples) {
  hessian_accumulator h(ic);
  index_t at = 0;
  for (const index_t tokens : samples) {
    h.add(exec, x.data() + at * ic, tokens);
    at += tokens;
  }
  return std::move(h).finish();
}

}  // namespace

TEST_CASE("H = 2 X X^T / tokens") {
  const on_host exec(2);
  for (const index_t ic : {1, 5, 192, 193, 400}) {
    const index_t tokens = 70;
    const auto x = make_activations(tokens, ic);
    hessian_accumulator accumulator(ic);
    CHECK(accumulator.diagonal() == std::vector<double>(static_cast<std::size_t>(ic), 0.0));
    accumulator.add(exec, x.data(), 30);
    accumulator.add(exec, x.data() + 30 * ic, 40);
    CHECK(accumulator.tokens() == tokens);
    const auto diagonal = accumulator.diagonal();
    const auto h = std::move(accumulator).finish();
    for (index_t r = 0; r < ic; ++r) {
      for (index_t c = 0; c < ic; ++c) {
        double sum = 0.0;
        double size = 0.0;
        for (index_t t = 0; t < tokens; ++t) {
          const double product = static_cast<double>(x[static_cast<std::size_t>(t * ic + r)]) *
                                 static_cast<double>(x[static_cast<std::size_t>(t * ic + c)]);
          sum += product;
          size += std::abs(product);
        }
        const auto got = static_cast<double>(h[static_cast<std::size_t>(r * ic + c)]);
        REQUIRE(std::abs(got - 2.0 * sum / 70.0) <= 1e-6 * 2.0 * size / 70.0);
        REQUIRE(got == static_cast<double>(h[static_cast<std::size_t>(c * ic + r)]));
      }
      REQUIRE(diagonal[static_cast<std::size_t>(r)] ==
              Approx(static_cast<double>(h[static_cast<std::size_t>(r * (ic + 1))])));
    }
  }
}

TEST_CASE("H does not depend on the number of threads, bit for bit") {
  const index_t ic = 500;
  const auto x = make_activations(90, ic);
  const auto one = hessian_of(on_host(1), x, ic, {64, 26});
  for (const int threads : {2, 3, 7}) {
    const auto many = hessian_of(on_host(threads), x, ic, {64, 26});
    CHECK(std::memcmp(one.data(), many.data(), one.size() * sizeof(float)) == 0);
  }
}

TEST_CASE("H does not depend on how tokens are cut into samples") {
  const index_t ic = 40;
  const auto x = make_activations(60, ic);
  const auto whole = hessian_of(on_host(1), x, ic, {60});
  const auto pieces = hessian_of(on_host(1), x, ic, {1, 0, 20, 39});
  for (std::size_t i = 0; i < whole.size(); ++i) {
    REQUIRE(pieces[i] == Approx(whole[i]).epsilon(1e-5).margin(1e-4));
  }
}

TEST_CASE("the diagonal alone is that of H, for any number of threads") {
  const index_t ic = 150;
  const auto x = make_activations(70, ic);
  hessian_accumulator whole(ic);
  whole.add(on_host(1), x.data(), 70);
  const auto diagonal_of = [&](int threads) {
    qeft::solver::diagonal_accumulator d(ic);
    CHECK(d.diagonal() == std::vector<double>(static_cast<std::size_t>(ic), 0.0));
    d.add(on_host(threads), x.data(), 30);
    d.add(on_host(threads), x.data() + 30 * ic, 40);
    return d.diagonal();
  };
  const auto one = diagonal_of(1);
  const auto expected = whole.diagonal();
  for (std::size_t j = 0; j < one.size(); ++j) CHECK(one[j] == Approx(expected[j]));
  CHECK(diagonal_of(3) == one);
}

TEST_CASE("a negative number of tokens is refused") {
  hessian_accumulator h(2);
  qeft::solver::diagonal_accumulator d(2);
  const float x[] = {1.0F, 2.0F};
  CHECK_THROWS_WITH(h.add(on_host(1), x, -5), qeft_test::contains("tokens is -5"));
  CHECK_THROWS_WITH(d.add(on_host(1), x, -5), qeft_test::contains("tokens is -5"));
}

TEST_CASE("no tokens give a zero Hessian") {
  const auto h = std::move(hessian_accumulator(3)).finish();
  CHECK(h == qeft::host_buffer<float>(9, 0.0F));
}

template <class Accumulator>
void check_refuses_what_is_not_finite() {
  const on_host exec(2);
  const index_t ic = 30;
  auto x = make_activations(50, ic);
  Accumulator h(ic);
  h.add(exec, x.data(), 50);
  const auto before = h.diagonal();
  for (const float bad : {std::nanf(""), INFINITY, -INFINITY}) {
    auto broken = x;
    broken[17 * 30 + 4] = bad;
    broken[40 * 30] = bad;
    try {
      h.add(exec, broken.data(), 50);
      FAIL("accepted");
    } catch (const qeft::error& e) {
      CHECK(e.code() == qeft::errc::not_finite);
      CHECK(std::string(e.what()).find("row 17, column 4") != std::string::npos);
    }
  }
  CHECK(h.diagonal() == before);
}

TEST_CASE("activations that are not finite are refused and leave the sum unchanged") {
  check_refuses_what_is_not_finite<hessian_accumulator>();
  check_refuses_what_is_not_finite<qeft::solver::diagonal_accumulator>();
}

TEST_CASE("a Hessian that overflows FP32 is refused") {
  const std::vector<float> x{1e30F, 1.0F};
  hessian_accumulator h(2);
  h.add(on_host(1), x.data(), 1);
  CHECK_THROWS_AS(std::move(h).finish(), qeft::error);
  CHECK_THROWS_AS(hessian_accumulator(0), qeft::error);
}

TEST_CASE("a cross moment is 2 A B^T / tokens") {
  const index_t tokens = 70;
  for (const index_t rows : {1, 5, 193, 400}) {
    for (const index_t cols : {1, 192, 250}) {
      const auto a = make_activations(tokens, rows);
      const auto b = make_activations(tokens, cols);
      const auto moment_of = [&](int threads) {
        const on_host exec(threads);
        cross_accumulator m(rows, cols);
        m.add(exec, a.data(), b.data(), 30);
        m.add(exec, a.data() + 30 * rows, b.data() + 30 * cols, 0);
        m.add(exec, a.data() + 30 * rows, b.data() + 30 * cols, 40);
        return std::move(m).finish();
      };
      const auto m = moment_of(2);
      REQUIRE(static_cast<index_t>(m.size()) == rows * cols);
      CHECK(m == moment_of(1));
      CHECK(m == moment_of(3));
      for (index_t r = 0; r < rows; ++r) {
        for (index_t c = 0; c < cols; ++c) {
          double sum = 0.0;
          double size = 0.0;
          for (index_t t = 0; t < tokens; ++t) {
            const double product = static_cast<double>(a[static_cast<std::size_t>(t * rows + r)]) *
                                   static_cast<double>(b[static_cast<std::size_t>(t * cols + c)]);
            sum += product;
            size += std::abs(product);
          }
          const auto got = static_cast<double>(m[static_cast<std::size_t>(r * cols + c)]);
          REQUIRE(std::abs(got - 2.0 * sum / 70.0) <= 1e-6 * 2.0 * size / 70.0);
        }
      }
    }
  }
}

TEST_CASE("the cross moment of an array with itself is its Hessian") {
  const index_t ic = 230;
  const auto x = make_activations(60, ic);
  cross_accumulator m(ic, ic);
  m.add(on_host(2), x.data(), x.data(), 60);
  const auto moment = std::move(m).finish();
  const auto h = hessian_of(on_host(2), x, ic, {60});
  for (index_t r = 0; r < ic; ++r) {
    for (index_t c = 0; c < ic; ++c) {
      const auto at = [&](index_t i, index_t j) { return h[static_cast<std::size_t>(i * ic + j)]; };
      const float size = std::sqrt(at(r, r) * at(c, c));
      REQUIRE(std::abs(moment[static_cast<std::size_t>(r * ic + c)] - at(r, c)) <= 1e-6F * size);
    }
  }
}

TEST_CASE("cross moments refuse what hessians refuse") {
  const on_host exec(2);
  const auto a = make_activations(50, 30);
  const auto b = make_activations(50, 20);
  cross_accumulator m(30, 20);
  m.add(exec, a.data(), b.data(), 50);
  CHECK_THROWS_WITH(m.add(exec, a.data(), b.data(), -5), qeft_test::contains("tokens is -5"));
  for (const float bad : {std::nanf(""), INFINITY, -INFINITY}) {
    auto broken = a;
    broken[17 * 30 + 4] = bad;
    CHECK_THROWS_WITH(m.add(exec, broken.data(), b.data(), 50),
                      qeft_test::contains("add: a (tokens x rows): row 17, column 4"));
    broken = b;
    broken[18 * 20 + 5] = bad;
    CHECK_THROWS_WITH(m.add(exec, a.data(), broken.data(), 50),
                      qeft_test::contains("add: b (tokens x cols): row 18, column 5"));
  }
  cross_accumulator same(30, 20);
  same.add(exec, a.data(), b.data(), 50);
  CHECK(std::move(m).finish() == std::move(same).finish());

  CHECK(std::move(cross_accumulator(2, 3)).finish() == qeft::host_buffer<float>(6, 0.0F));
  CHECK_THROWS_WITH(cross_accumulator(0, 3), qeft_test::contains("rows is 0 and cols 3"));
  CHECK_THROWS_WITH(cross_accumulator(3, -1), qeft_test::contains("rows is 3 and cols -1"));
  const std::vector<float> large{1.0F, 1e30F};
  cross_accumulator overflow(2, 2);
  overflow.add(exec, large.data(), large.data(), 1);
  CHECK_THROWS_WITH(std::move(overflow).finish(), qeft_test::contains("row 1, column 1"));
}
