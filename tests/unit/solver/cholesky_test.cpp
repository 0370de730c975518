// SPDX-License-Identifier: Apache-2.0
// The reversed factorisation against Eigen's inverse and Cholesky factorisation in double.
#include "qeft/solver/cholesky.hpp"

#include <Eigen/Dense>
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "support/catch.hpp"

namespace {

using qeft::index_t;
using qeft::on_host;
using qeft::permutation;
using qeft::solver::damping_options;
using qeft::solver::factor_inverse;

/// A correlated Gram matrix of `tokens` activations, with two outlier channels.
std::vector<float> make_hessian(index_t n, index_t tokens, unsigned seed = 1) {
  std::mt19937 rng(seed);
  std::normal_distribution<double> normal;
  Eigen::MatrixXd x(tokens, n);
  for (index_t t = 0; t < tokens; ++t) {
    const double common = normal(rng);
    for (index_t j = 0; j < n; ++j) {
      x(t, j) = (normal(rng) + common) * (j % 50 == 3 ? 20.0 : 1.0);
    }
  }
  const Eigen::MatrixXd h = x.transpose() * x * (2.0 / static_cast<double>(tokens));
  std::vector<float> out(static_cast<std::size_t>(n * n));
  for (index_t r = 0; r < n; ++r) {
    for (index_t c = 0; c < n; ++c) {
      out[static_cast<std::size_t>(r * n + c)] =
          static_cast<float>(h(std::min(r, c), std::max(r, c)));
    }
  }
  return out;
}

/// The upper Cholesky factor of (H + shift I)^-1, the direct way.
Eigen::MatrixXd reference(const std::vector<float>& h, const std::vector<std::int32_t>& order,
                          double shift) {
  const auto n = static_cast<Eigen::Index>(order.size());
  Eigen::MatrixXd a(n, n);
  for (Eigen::Index r = 0; r < n; ++r) {
    for (Eigen::Index c = 0; c < n; ++c) {
      a(r, c) = static_cast<double>(h[static_cast<std::size_t>(
          order[static_cast<std::size_t>(r)] * n + order[static_cast<std::size_t>(c)])]);
    }
    a(r, r) += shift;
  }
  const Eigen::MatrixXd inverse = a.inverse();
  return Eigen::LLT<Eigen::MatrixXd>(inverse).matrixU();
}

double mean_diagonal(const std::vector<float>& h, index_t n) {
  double sum = 0.0;
  for (index_t j = 0; j < n; ++j)
    sum += static_cast<double>(h[static_cast<std::size_t>(j * (n + 1))]);
  return sum / static_cast<double>(n);
}

}  // namespace

TEST_CASE("U is the upper Cholesky factor of the inverse") {
  const on_host exec(2);
  for (const index_t n : {1, 2, 31, 128, 129, 300}) {
    const auto h = make_hessian(n, 4 * n);
    auto order = permutation::identity(n).source();
    std::shuffle(order.begin(), order.end(), std::mt19937(5));
    const auto f = factor_inverse(exec, h, permutation(order), n, {});
    CHECK(f.damping == 0.01);
    CHECK(f.dead_inputs.empty());
    const Eigen::MatrixXd expected = reference(h, order, 0.01 * mean_diagonal(h, n));
    for (index_t r = 0; r < n; ++r) {
      for (index_t c = 0; c < n; ++c) {
        const auto u = static_cast<double>(f.u[static_cast<std::size_t>(r * n + c)]);
        if (c < r) {
          REQUIRE(u == 0.0);
        } else {
          REQUIRE(std::abs(u - expected(r, c)) <= 2e-7 * expected(r, r));
        }
      }
    }
  }
}

TEST_CASE("U does not depend on the number of threads, bit for bit") {
  const index_t n = 420;
  const auto h = make_hessian(n, 500);
  const auto one = factor_inverse(on_host(1), h, permutation::identity(n), n, {});
  for (const int threads : {2, 3, 6}) {
    const auto many = factor_inverse(on_host(threads), h, permutation::identity(n), n, {});
    CHECK(std::memcmp(one.u.data(), many.u.data(), one.u.size() * sizeof(float)) == 0);
  }
}

TEST_CASE("dead inputs are reported and decoupled") {
  const on_host exec(1);
  const index_t n = 20;
  auto h = make_hessian(n, 80);
  for (const index_t dead : {4, 17}) {
    for (index_t j = 0; j < n; ++j) {
      h[static_cast<std::size_t>(dead * n + j)] = 0.0F;
      h[static_cast<std::size_t>(j * n + dead)] = 0.0F;
    }
  }
  const auto f = factor_inverse(exec, h, permutation::identity(n), n, {});
  CHECK(f.dead_inputs == std::vector<std::int32_t>{4, 17});
  for (const index_t dead : {4, 17}) {
    for (index_t j = 0; j < n; ++j) {
      CHECK(f.u[static_cast<std::size_t>(dead * n + j)] == (j == dead ? 1.0F : 0.0F));
    }
  }
  h[4 * 20 + 5] = h[5 * 20 + 4] = 3.0F;  // as underflow of H_jj alone might leave it
  const auto coupled = factor_inverse(exec, h, permutation::identity(n), n, {});
  CHECK(std::memcmp(f.u.data(), coupled.u.data(), f.u.size() * sizeof(float)) == 0);
  const std::vector<float> zero(static_cast<std::size_t>(n * n), 0.0F);
  const auto all_dead = factor_inverse(exec, zero, permutation::identity(n), n, {});
  CHECK(all_dead.dead_inputs.size() == 20);
}

TEST_CASE("the damping grows until the factorisation succeeds, and says so") {
  const on_host exec(2);
  const index_t n = 160;
  const auto singular = make_hessian(n, 30);  // rank 30
  CHECK(factor_inverse(exec, singular, permutation::identity(n), n, {0.01, false}).damping == 0.01);
  const auto repaired = factor_inverse(exec, singular, permutation::identity(n), n, {0.0, false});
  CHECK(repaired.damping == Approx(0.001));
  for (const float u : repaired.u) REQUIRE(std::isfinite(u));

  // An eigenvalue of -0.05 of the mean diagonal needs more than 0.01.
  std::vector<float> indefinite{1.0F, 1.05F, 1.05F, 1.0F};
  CHECK(factor_inverse(exec, indefinite, permutation::identity(2), 2, {}).damping == Approx(0.1));
}

TEST_CASE("the mean of the damping may leave out weak columns") {
  const on_host exec(1);
  const std::vector<float> h{1.0F, 0.0F, 0.0F, 0.0F, 1.0F, 0.0F, 0.0F, 0.0F, 998.0F};
  const auto all = factor_inverse(exec, h, permutation::identity(3), 2, {0.01, false});
  const auto robust = factor_inverse(exec, h, permutation::identity(3), 2, {0.01, true});
  CHECK(all.u[0] == Approx(1.0 / std::sqrt(1.0 + 0.01 * 1000.0 / 3.0)));
  CHECK(robust.u[0] == Approx(1.0 / std::sqrt(1.01)));
}

TEST_CASE("what is no Hessian is refused") {
  const on_host exec(1);
  const auto code_of = [&](const std::vector<float>& h, damping_options o = {}) {
    try {
      factor_inverse(exec, h, permutation::identity(2), 2, o);
    } catch (const qeft::error& e) {
      return e.code();
    }
    return qeft::errc::ok;
  };
  CHECK(code_of({1.0F, 0.0F, 0.0F, 1.0F}) == qeft::errc::ok);
  CHECK(code_of({1.0F, 5.0F, 5.0F, 1.0F}) == qeft::errc::not_positive_definite);
  CHECK(code_of({-1.0F, 0.0F, 0.0F, 1.0F}) == qeft::errc::not_positive_definite);
  CHECK(code_of({1.0F, std::nanf(""), 0.0F, 1.0F}) == qeft::errc::not_finite);
  CHECK(code_of({1.0F, 0.0F, 0.0F}) == qeft::errc::invalid_argument);
  CHECK(code_of({1.0F, 0.0F, 0.0F, 1.0F}, {-0.1, false}) == qeft::errc::invalid_argument);
  CHECK(code_of({1.0F, 0.0F, 0.0F, 1.0F}, {std::nan(""), false}) == qeft::errc::invalid_argument);
}

TEST_CASE("a pivot that is only rounding error does not count as positive") {
  const on_host exec(1);
  constexpr double ulp = std::numeric_limits<double>::epsilon();
  std::vector<double> singular = {1.0, 1.0, 1.0, 1.0 + ulp};  // what rounding makes of rank 1
  CHECK_FALSE(qeft::solver::detail::cholesky_lower(exec, singular.data(), 2));
  std::vector<double> regular = {1.0, 1.0, 1.0, 1.0 + 16 * ulp};
  CHECK(qeft::solver::detail::cholesky_lower(exec, regular.data(), 2));
  // The same far behind, in a later block of columns.
  const index_t n = 200;
  const auto matrix = [&](double last) {
    std::vector<double> a(static_cast<std::size_t>(n * n));
    for (index_t j = 0; j < n; ++j) a[static_cast<std::size_t>(j * (n + 1))] = 1.0;
    a[static_cast<std::size_t>(n - 1)] = 1.0;  // the last row equals the first
    a[static_cast<std::size_t>(n * n - 1)] = 1.0 + last;
    return a;
  };
  std::vector<double> late = matrix(100 * ulp);
  CHECK_FALSE(qeft::solver::detail::cholesky_lower(exec, late.data(), n));
  late = matrix(1000 * ulp);
  CHECK(qeft::solver::detail::cholesky_lower(exec, late.data(), n));
}

TEST_CASE("a Hessian that is not symmetric is refused by entry") {
  const on_host exec(2);
  for (const index_t n : {2, 70, 200}) {
    auto h = make_hessian(n, 4 * n);
    for (const auto& [r, c] : {std::pair{n - 1, index_t{0}}, {index_t{0}, n - 1}}) {
      auto broken = h;
      broken[static_cast<std::size_t>(r * n + c)] += 0.5F * h[0];
      const auto factor = [&] { factor_inverse(exec, broken, permutation::identity(n), n, {}); };
      CHECK_THROWS_WITH(factor(), qeft_test::contains("not symmetric: entry (" +
                                                      std::to_string(n - 1) + ", 0) is"));
      broken[static_cast<std::size_t>(r * n + c)] =
          h[static_cast<std::size_t>(r * n + c)] + 1e-6F * h[0];  // rounding
      factor();
    }
  }
}
