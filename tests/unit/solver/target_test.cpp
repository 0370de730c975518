// SPDX-License-Identifier: Apache-2.0
// The target of asymmetric calibration against its definition in double, and layers quantised
// towards it.
#include "qeft/solver/target.hpp"

#include <Eigen/Dense>
#include <algorithm>
#include <cmath>
#include <functional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "qeft/solver/hessian.hpp"
#include "qeft/solver/quantize_layer.hpp"
#include "support/cases.hpp"
#include "support/catch.hpp"

namespace {

using qeft::host_buffer;
using qeft::index_t;
using qeft::on_host;
using qeft::permutation;
using qeft::solver::asymmetric_options;
using qeft::solver::asymmetric_target;
using qeft::solver::layer_options;
using qeft::solver::layer_result;
using qeft::solver::output_mismatch;
using qeft_test::same_bytes;

/// What a layer sees in the full-precision and in the quantised model.
struct problem {
  index_t oc;
  index_t ic;
  index_t tokens;
  std::vector<float> w;
  std::vector<float> x_fp;  // (tokens, ic)
  std::vector<float> x_q;
  std::vector<float> h_difference;  // (tokens, oc) residual stream, h_fp - h_q
  host_buffer<float> h;
  host_buffer<float> d;
  host_buffer<float> r;
  std::vector<std::int32_t> outliers;  // ascending columns with large activations
};

/// Correlated inputs with outlier channels. The quantised model's are rotated a little, smaller,
/// and noisy; its stream has drifted in proportion to a few inputs.
problem make_problem(index_t oc, index_t ic, unsigned seed, bool same_inputs = false,
                     const std::vector<index_t>& dead = {}) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  problem p{oc, ic, 4 * ic + 7, {}, {}, {}, {}, {}, {}, {}, {}};
  p.w.resize(static_cast<std::size_t>(oc * ic));
  for (float& w : p.w) w = 0.02F * normal(rng);
  for (std::int32_t j = 5; j < ic; j += 29) p.outliers.push_back(j);
  for (index_t t = 0; t < p.tokens; ++t) {
    float previous = 0.0F;
    float drift = 0.0F;
    for (index_t j = 0; j < ic; ++j) {
      previous = 0.8F * previous + normal(rng);
      const float size = j % 29 == 5 ? 12.0F : 1.0F;
      const bool is_dead = std::find(dead.begin(), dead.end(), j) != dead.end();
      p.x_fp.push_back(is_dead ? 0.0F : previous * size);
      drift = 0.5F * drift + 0.1F * previous;
      const float disturbed = size * (0.95F * previous + drift + 0.1F * normal(rng));
      p.x_q.push_back(is_dead ? 0.0F : same_inputs ? p.x_fp.back() : disturbed);
    }
    for (index_t i = 0; i < oc; ++i) {
      p.h_difference.push_back(0.05F * p.x_q[static_cast<std::size_t>(t * ic + i % ic)] +
                               0.1F * normal(rng));
    }
  }
  std::vector<float> difference(p.x_fp.size());
  for (std::size_t i = 0; i < difference.size(); ++i) difference[i] = p.x_fp[i] - p.x_q[i];
  const on_host exec(2);
  qeft::solver::hessian_accumulator h(ic);
  h.add(exec, p.x_q.data(), p.tokens);
  p.h = std::move(h).finish();
  qeft::solver::cross_accumulator d(ic, ic);
  d.add(exec, difference.data(), p.x_q.data(), p.tokens);
  p.d = std::move(d).finish();
  qeft::solver::cross_accumulator r(oc, ic);
  r.add(exec, p.h_difference.data(), p.x_q.data(), p.tokens);
  p.r = std::move(r).finish();
  return p;
}

template <class Buffer>
Eigen::MatrixXd to_double(const Buffer& x, index_t rows, index_t cols) {
  REQUIRE(static_cast<index_t>(x.size()) == rows * cols);
  Eigen::MatrixXd m(rows, cols);
  for (index_t r = 0; r < rows; ++r) {
    for (index_t c = 0; c < cols; ++c) {
      m(r, c) = static_cast<double>(x[static_cast<std::size_t>(r * cols + c)]);
    }
  }
  return m;
}

struct reference {
  Eigen::MatrixXd target;
  double rounding;  // what FP32 may lose in it: 2^-23 |M| |(H + l I)^-1|
};

/// W + (a W D + r R) (H + l I)^-1 over the live inputs, by Eigen's inverse; the others keep W.
reference reference_target(const problem& p, const asymmetric_options& o, double damping) {
  std::vector<int> live;
  const Eigen::MatrixXd h = to_double(p.h, p.ic, p.ic);
  for (int j = 0; j < p.ic; ++j) {
    if (h(j, j) > 0.0) live.push_back(j);
  }
  Eigen::MatrixXd damped = h(live, live);
  damped.diagonal().array() += damping * damped.diagonal().mean();
  const Eigen::MatrixXd inverse = damped.inverse();
  Eigen::MatrixXd w = to_double(p.w, p.oc, p.ic);
  const Eigen::MatrixXd m =
      o.input * w * to_double(p.d, p.ic, p.ic) + o.stream * to_double(p.r, p.oc, p.ic);
  const Eigen::MatrixXd live_m = m(Eigen::all, live);
  w(Eigen::all, live) += live_m * inverse;
  return {w, 0x1p-23 * m.norm() * inverse.norm() + 0x1p-24 * w.norm()};
}

/// Robust columns in a random order, then the weak ones.
permutation make_order(const problem& p, bool shuffled, bool weak) {
  auto order =
      weak ? qeft::weak_last(p.ic, p.outliers).source() : permutation::identity(p.ic).source();
  const auto robust = p.ic - static_cast<index_t>(weak ? p.outliers.size() : 0U);
  if (shuffled) std::shuffle(order.begin(), order.begin() + robust, std::mt19937(3));
  return permutation(order);
}

host_buffer<float> mismatch_of(const on_host& exec, const problem& p, const asymmetric_options& o) {
  return output_mismatch(exec, p.w, p.oc, p.ic, p.d, p.r, o);
}

layer_result solve(const on_host& exec, const problem& p, const layer_options& o,
                   qeft::span<const float> mismatch) {
  return qeft::solver::quantize_layer(exec, p.w, p.oc, p.ic, p.h, o, mismatch);
}

/// ||W X_fp - W^ X_q||^2
double error_across(const problem& p, const layer_result& result) {
  const Eigen::MatrixXd x_fp = to_double(p.x_fp, p.tokens, p.ic);
  const Eigen::MatrixXd x_q = to_double(p.x_q, p.tokens, p.ic);
  const Eigen::MatrixXd q = to_double(qeft_test::dequantized(result.matrix), p.oc, p.ic);
  return (x_fp * to_double(p.w, p.oc, p.ic).transpose() - x_q * q.transpose()).squaredNorm();
}

}  // namespace

TEST_CASE("the target is W + (a W D + r R) (H + l I)^-1") {
  const on_host exec(2);
  for (const auto& [oc, ic] : std::vector<std::pair<index_t, index_t>>{
           {1, 1}, {3, 2}, {1, 40}, {65, 127}, {130, 129}, {70, 301}}) {
    const std::vector<index_t> dead =
        ic > 100 ? std::vector<index_t>{0, 34, 77, 100} : std::vector<index_t>{};
    const problem p = make_problem(oc, ic, static_cast<unsigned>(ic), false, dead);
    for (const asymmetric_options o : {asymmetric_options{1.0, 0.0}, {0.0, 1.0}, {0.5, 0.25}}) {
      const auto m = mismatch_of(exec, p, o);
      const auto [expected, rounding] = reference_target(p, o, 0.01);
      const Eigen::MatrixXd w = to_double(p.w, oc, ic);
      CHECK((expected - w).norm() > 1e3 * rounding);
      for (const bool shuffled : {false, true}) {
        const permutation order = make_order(p, shuffled, ic > 100);
        const auto factor = qeft::solver::factor_inverse(exec, p.h, order, ic, {});
        CHECK(factor.dead_inputs.size() == dead.size());
        const auto target = asymmetric_target(exec, p.w, m, oc, order, factor);
        const Eigen::MatrixXd got = to_double(target, oc, ic);
        INFO(oc << " x " << ic << " a " << o.input << " r " << o.stream);
        CHECK((got - expected).norm() <= rounding);
        for (const index_t j : dead) CHECK(got.col(j) == w.col(j));
      }
    }
  }
}

TEST_CASE("what an option turns off needs no moment, and nothing left is no mismatch") {
  const on_host exec(1);
  const problem p = make_problem(9, 33, 1);
  const auto mismatch = [&](qeft::span<const float> d, qeft::span<const float> r, double a,
                            double s) {
    return output_mismatch(exec, p.w, p.oc, p.ic, d, r, {a, s});
  };
  CHECK(mismatch(p.d, p.r, 0.0, 0.0).empty());
  CHECK(mismatch({}, {}, 1.0, 1.0).empty());
  CHECK(mismatch(p.d, {}, 0.0, 1.0).empty());
  CHECK(mismatch(p.d, {}, 0.5, 1.0) == mismatch(p.d, p.r, 0.5, 0.0));
  CHECK(mismatch({}, p.r, 0.5, 1.0) == mismatch(p.d, p.r, 0.0, 1.0));
  CHECK(mismatch({}, p.r, 0.5, 1.0) == p.r);
}

TEST_CASE("a dead input keeps its weights whatever the mismatch says") {
  const on_host exec(1);
  const problem p = make_problem(4, 30, 2, false, {7});
  auto m = mismatch_of(exec, p, {1.0, 1.0});
  const permutation order = permutation::identity(p.ic);
  const auto factor = qeft::solver::factor_inverse(exec, p.h, order, p.ic, {});
  const auto target = asymmetric_target(exec, p.w, m, p.oc, order, factor);
  m[7] = 100.0F;  // as underflow of H_jj alone might leave it
  CHECK(asymmetric_target(exec, p.w, m, p.oc, order, factor) == target);
  CHECK(target[7] == p.w[7]);
}

TEST_CASE("quantising with a mismatch is quantising the target") {
  const on_host exec(2);
  const problem p = make_problem(67, 161, 4, false, {20, 34});
  const auto m = mismatch_of(exec, p, {0.5, 0.5});
  for (int variant = 0; variant < 4; ++variant) {
    layer_options o;
    o.group_size = 64;
    o.act_order = variant == 1;
    o.static_groups = variant == 2;
    o.damping.robust_mean = variant == 3;
    if (variant != 0) o.weak_columns = p.outliers;
    const layer_result plain = solve(exec, p, o, {});
    CHECK(plain.target.empty());
    const layer_result got = solve(exec, p, o, m);
    CHECK_FALSE(same_bytes(plain.matrix, got.matrix));
    if (variant < 3) {
      const auto [expected, rounding] = reference_target(p, {0.5, 0.5}, 0.01);
      CHECK((to_double(got.target, p.oc, p.ic) - expected).norm() <= rounding);
    }
    problem towards = p;
    towards.w.assign(got.target.begin(), got.target.end());
    const layer_result same = solve(exec, towards, o, {});
    CHECK(same_bytes(same.matrix, got.matrix));
    CHECK(*same.report.output_error == *got.report.output_error);
    CHECK(*same.report.squared_error == *got.report.squared_error);
    CHECK(got.report.dead_inputs == std::vector<std::int32_t>{20, 34});
  }
}

TEST_CASE("equal inputs change no bit") {
  const on_host exec(2);
  const problem p = make_problem(40, 150, 6, true);
  layer_options o;
  o.weak_columns = p.outliers;
  const auto m = output_mismatch(exec, p.w, p.oc, p.ic, p.d, {}, {1.0, 0.0});
  REQUIRE(m.size() == p.w.size());
  const layer_result with = solve(exec, p, o, m);
  const layer_result without = solve(exec, p, o, {});
  CHECK(same_bytes(with.matrix, without.matrix));
  CHECK(*with.report.output_error == *without.report.output_error);
}

TEST_CASE("with a mismatch the layer is nearer to the full-precision output") {
  const on_host exec(2);
  for (unsigned seed = 1; seed <= 4; ++seed) {
    const problem p = make_problem(30, 140, seed);
    for (const int bits : {3, 4}) {
      layer_options o;
      o.bits = bits;
      o.weak_columns = p.outliers;
      const double without = error_across(p, solve(exec, p, o, {}));
      const auto error = [&](double a) {
        return error_across(p, solve(exec, p, o, mismatch_of(exec, p, {a, 0.0})));
      };
      INFO("seed " << seed << " bits " << bits << " without " << without);
      CHECK(error(1.0) < error(0.5));
      CHECK(error(0.5) < without);
      CHECK(error(1.0) < 0.8 * without);
    }
  }
}

TEST_CASE("what was lost in the stream is repaired by the layer that writes it") {
  const on_host exec(2);
  const problem p = make_problem(30, 140, 9, true);
  const auto error = [&](double r) {
    layer_options o;
    o.weak_columns = p.outliers;
    const layer_result result = solve(exec, p, o, mismatch_of(exec, p, {0.0, r}));
    const Eigen::MatrixXd q = to_double(qeft_test::dequantized(result.matrix), p.oc, p.ic);
    const Eigen::MatrixXd wanted =
        to_double(p.x_fp, p.tokens, p.ic) * to_double(p.w, p.oc, p.ic).transpose() +
        to_double(p.h_difference, p.tokens, p.oc);
    return (wanted - to_double(p.x_q, p.tokens, p.ic) * q.transpose()).squaredNorm();
  };
  CHECK(error(0.5) < error(0.0));
  CHECK(error(1.0) < error(0.5));
}

TEST_CASE("targets do not depend on the number of threads, bit for bit") {
  const problem p = make_problem(200, 310, 8);
  const permutation order = make_order(p, true, true);
  layer_options o;
  o.weak_columns = p.outliers;
  const auto factor = qeft::solver::factor_inverse(on_host(1), p.h, order, p.ic, {});
  const auto m = mismatch_of(on_host(1), p, {0.5, 0.75});
  const auto target = asymmetric_target(on_host(1), p.w, m, p.oc, order, factor);
  const layer_result result = solve(on_host(1), p, o, m);
  for (const int threads : {2, 3}) {
    const on_host exec(threads);
    CHECK(mismatch_of(exec, p, {0.5, 0.75}) == m);
    CHECK(asymmetric_target(exec, p.w, m, p.oc, order, factor) == target);
    const layer_result many = solve(exec, p, o, m);
    CHECK(same_bytes(many.matrix, result.matrix));
    CHECK(many.target == result.target);
    CHECK(*many.report.output_error == *result.report.output_error);
  }
}

TEST_CASE("bad moments and mismatches are errors that name them") {
  const on_host exec(2);
  const problem good = make_problem(6, 40, 1);
  const auto fails = [&](const char* what, const std::function<void(problem&)>& spoil,
                         asymmetric_options o = {1.0, 1.0}) {
    problem p = good;
    spoil(p);
    CHECK_THROWS_WITH(mismatch_of(exec, p, o), qeft_test::contains(what));
  };
  fails("d has 1599 elements, but must have 40 x 40", [](problem& p) { p.d.pop_back(); });
  fails("r has 241 elements, but must have 6 x 40", [](problem& p) { p.r.push_back(0.0F); });
  fails("w has 239 elements, but must have 6 x 40", [](problem& p) { p.w.pop_back(); });
  fails("w: row 0, column 3 is", [](problem& p) { p.w[3] = NAN; });
  fails("d: row 2, column 1 is", [](problem& p) { p.d[81] = INFINITY; });
  fails("r: row 1, column 0 is", [](problem& p) { p.r[40] = -INFINITY; });
  fails("a W D + r R: row 1", [](problem& p) { p.w[45] = 3e38F; });
  const auto nothing = [](problem&) {};
  fails("input is -0.1", nothing, {-0.1, 0.0});
  fails("input is nan", nothing, {std::nan(""), 0.0});
  fails("stream is 1.5", nothing, {0.0, 1.5});

  const auto m = mismatch_of(exec, good, {1.0, 1.0});
  auto broken = m;
  broken[2 * 40 + 9] = NAN;
  CHECK_THROWS_WITH(solve(exec, good, {}, broken),
                    qeft_test::contains("quantize_layer: the mismatch: row 2, column 9"));
  broken = m;
  broken.pop_back();
  CHECK_THROWS_WITH(solve(exec, good, {}, broken),
                    qeft_test::contains("the mismatch has 239 elements, but must have 6 x 40"));
  broken = m;
  broken[0] = 3e38F;
  problem small = good;
  for (float& h : small.h) h *= 1e-3F;
  CHECK_THROWS_WITH(solve(exec, small, {}, broken), qeft_test::contains("(H + l I)^-1: row 0"));
  layer_options rtn;
  rtn.method = qeft::solver::layer_method::rtn;
  CHECK_THROWS_WITH(solve(exec, good, rtn, m), qeft_test::contains("the method is RTN"));

  const permutation order = permutation::identity(40);
  auto factor = qeft::solver::factor_inverse(exec, good.h, order, 40, {});
  CHECK_THROWS_WITH(asymmetric_target(exec, good.w, m, 5, order, factor),
                    qeft_test::contains("w has 240 elements, but must have 5 x 40"));
  CHECK_THROWS_WITH(asymmetric_target(exec, good.w, {}, 6, order, factor),
                    qeft_test::contains("the mismatch has 0 elements"));
  factor.u.pop_back();
  CHECK_THROWS_WITH(asymmetric_target(exec, good.w, m, 6, order, factor),
                    qeft_test::contains("U has 1599 elements, but must have 40^2"));
}

TEST_CASE("a layer is refined towards the target, as its last step, with the Hessian damped") {
  const on_host exec(2);
  const problem p = make_problem(48, 96, 17);
  constexpr double damping = 0.3;
  std::vector<float> damped(p.h.begin(), p.h.end());
  double trace = 0.0;
  for (std::size_t j = 0; j < damped.size(); j += 97) trace += static_cast<double>(damped[j]);
  for (std::size_t j = 0; j < damped.size(); j += 97) {
    damped[j] += static_cast<float>(damping * trace / 96);
  }
  for (const bool weak : {false, true}) {
    for (const auto method : {qeft::solver::layer_method::optq, qeft::solver::layer_method::rtn}) {
      layer_options o;
      o.method = method;
      o.damping.damping = damping;
      o.group_size = 32;
      if (weak) o.weak_columns = p.outliers;
      const bool optq = method == qeft::solver::layer_method::optq;
      const auto m = optq ? mismatch_of(exec, p, {0.5, 0.5}) : host_buffer<float>{};
      const layer_result plain = solve(exec, p, o, m);
      const qeft::span<const float> target = optq ? qeft::span<const float>(plain.target) : p.w;
      o.refine_rounds = 2;
      const layer_result refined = solve(exec, p, o, m);
      CHECK(*refined.report.output_error < 0.99 * *plain.report.output_error);
      CHECK_FALSE(same_bytes(refined.matrix,
                             qeft::solver::refine(exec, target, p.h, plain.matrix, 2).matrix));
      CHECK(same_bytes(refined.matrix,
                       qeft::solver::refine(exec, target, damped, plain.matrix, 2).matrix));
    }
  }
  layer_options o;
  o.method = qeft::solver::layer_method::rtn;
  o.group_size = 32;
  o.refine_rounds = 1;
  CHECK_THROWS_WITH(qeft::solver::quantize_layer(exec, p.w, p.oc, p.ic, {}, o),
                    qeft_test::contains("the Hessian has 0 elements"));
  o.refine_rounds = -1;
  CHECK_THROWS_WITH(solve(exec, p, o, {}), qeft_test::contains("refine_rounds is -1"));
}
