// SPDX-License-Identifier: Apache-2.0
// RTN and OPTQ of one layer: against a plain implementation in double, and by their properties.
#include <Eigen/Dense>
#include <algorithm>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "qeft/solver/hessian.hpp"
#include "qeft/solver/quantize_layer.hpp"
#include "qeft/solver/scalar_choice.hpp"
#include "support/cases.hpp"
#include "support/catch.hpp"

namespace {

using qeft::errc;
using qeft::index_t;
using qeft::on_host;
using qeft::quantized_matrix;
using qeft::zero_kind;
using qeft::solver::group_quantizer;
using qeft::solver::layer_method;
using qeft::solver::layer_options;
using qeft::solver::layer_result;
using qeft::solver::quantize_layer;
using qeft_test::same_bytes;

struct problem {
  index_t oc;
  index_t ic;
  std::vector<float> w;
  std::vector<float> h;
  std::vector<std::int32_t> outliers;  // ascending columns with large activations
};

/// Weights, and the Hessian of correlated activations with some outlier channels.
problem make_problem(index_t oc, index_t ic, unsigned seed = 1, index_t tokens = 0) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  problem p{oc, ic, {}, {}, {}};
  p.w.resize(static_cast<std::size_t>(oc * ic));
  for (float& x : p.w) x = 0.02F * normal(rng);
  for (std::int32_t j = 5; j < ic; j += 29) p.outliers.push_back(j);
  if (tokens == 0) tokens = 3 * ic;
  std::vector<float> x(static_cast<std::size_t>(tokens * ic));
  for (index_t t = 0; t < tokens; ++t) {
    float previous = 0.0F;
    for (index_t j = 0; j < ic; ++j) {
      previous = 0.8F * previous + normal(rng);
      x[static_cast<std::size_t>(t * ic + j)] = previous * (j % 29 == 5 ? 12.0F : 1.0F);
    }
  }
  qeft::solver::hessian_accumulator h(ic);
  h.add(on_host(1), x.data(), tokens);
  const auto finished = std::move(h).finish();
  p.h.assign(finished.begin(), finished.end());
  return p;
}

/// Inputs multiplied by random sizes, most from 0.4 to 2.5.
problem with_channel_sizes(problem p, unsigned seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal(0.0F, 0.5F);
  std::vector<float> size(static_cast<std::size_t>(p.ic));
  for (float& s : size) s = std::exp(normal(rng));
  for (std::size_t i = 0; i < p.h.size(); ++i) {
    p.h[i] *= size[i / size.size()] * size[i % size.size()];
  }
  return p;
}

layer_result solve(const on_host& exec, const problem& p, const layer_options& o) {
  return quantize_layer(exec, p.w, p.oc, p.ic, p.h, o);
}

/// The stored layer through the accessors that define it.
Eigen::MatrixXd dequantized(const quantized_matrix<>& m) {
  Eigen::MatrixXd w(m.descriptor().out_channels, m.descriptor().in_channels);
  m.visit([&](auto view) {
    for (index_t n = 0; n < view.out_channels; ++n) {
      for (index_t c = 0; c < view.in_channels; ++c) {
        w(n, c) = static_cast<double>(dequantize(view, n, c));
      }
    }
  });
  return w;
}

Eigen::MatrixXd to_double(const std::vector<float>& x, index_t rows, index_t cols) {
  Eigen::MatrixXd m(rows, cols);
  for (index_t r = 0; r < rows; ++r) {
    for (index_t c = 0; c < cols; ++c) {
      m(r, c) = static_cast<double>(x[static_cast<std::size_t>(r * cols + c)]);
    }
  }
  return m;
}

double output_error(const problem& p, const Eigen::MatrixXd& q) {
  const Eigen::MatrixXd dw = to_double(p.w, p.oc, p.ic) - q;
  return (dw * to_double(p.h, p.ic, p.ic)).cwiseProduct(dw).sum();
}

/// OPTQ as METHOD section 3 words it, in double: invert, factor, one column at a time, every later
/// column updated at once.
Eigen::MatrixXd reference_optq(const problem& p, const layer_options& o) {
  std::vector<std::int32_t> dense;
  for (std::int32_t c = 0; c < p.ic; ++c) {
    if (!std::binary_search(o.weak_columns.begin(), o.weak_columns.end(), c)) dense.push_back(c);
  }
  std::vector<std::int32_t> position(dense.size());  // dense column solved at each step
  for (std::size_t i = 0; i < position.size(); ++i) position[i] = static_cast<std::int32_t>(i);
  if (o.act_order) {
    std::stable_sort(position.begin(), position.end(), [&](auto a, auto b) {
      const auto diagonal = [&](auto i) {
        return p.h[static_cast<std::size_t>(dense[static_cast<std::size_t>(i)] * (p.ic + 1))];
      };
      return diagonal(a) > diagonal(b);
    });
  }
  std::vector<std::int32_t> order;
  for (const auto i : position) order.push_back(dense[static_cast<std::size_t>(i)]);
  order.insert(order.end(), o.weak_columns.begin(), o.weak_columns.end());

  const Eigen::MatrixXd h_in = to_double(p.h, p.ic, p.ic);
  const Eigen::MatrixXd w_in = to_double(p.w, p.oc, p.ic);
  Eigen::MatrixXd h(p.ic, p.ic);
  Eigen::MatrixXd w(p.oc, p.ic);
  for (index_t a = 0; a < p.ic; ++a) {
    const auto from = order[static_cast<std::size_t>(a)];
    w.col(a) = w_in.col(from);
    for (index_t b = 0; b < p.ic; ++b) h(a, b) = h_in(from, order[static_cast<std::size_t>(b)]);
  }
  h.diagonal().array() += o.damping.damping * h.diagonal().mean();
  const Eigen::MatrixXd inverse = h.inverse();
  const Eigen::MatrixXd u = Eigen::LLT<Eigen::MatrixXd>(inverse).matrixU();

  const auto dense_count = static_cast<index_t>(dense.size());
  const index_t g = o.group_size == qeft::per_channel ? dense_count : o.group_size;
  const bool is_static = o.static_groups || o.act_order;
  Eigen::MatrixXd result(p.oc, p.ic);
  for (index_t r = 0; r < p.oc; ++r) {
    std::vector<group_quantizer> q(static_cast<std::size_t>(qeft::ceil_div(dense_count, g)));
    const auto find = [&](index_t group, const auto& weight) {
      std::vector<float> values;
      for (index_t i = group * g; i < std::min(dense_count, (group + 1) * g); ++i) {
        values.push_back(static_cast<float>(weight(i)));
      }
      std::vector<float> importance;
      for (index_t i = group * g; o.search.weighted && i < std::min(dense_count, (group + 1) * g);
           ++i) {
        const auto c = std::find(position.begin(), position.end(), i) - position.begin();
        importance.push_back(static_cast<float>(1.0 / (u(c, c) * u(c, c))));
      }
      q[static_cast<std::size_t>(group)] =
          qeft::solver::find_params(values, {o.bits, o.zero, o.scalar}, o.search, importance)
              .quantizer;
    };
    for (index_t group = 0; is_static && group < static_cast<index_t>(q.size()); ++group) {
      find(group, [&](index_t i) { return w_in(r, dense[static_cast<std::size_t>(i)]); });
    }
    for (index_t c = 0; c < dense_count; ++c) {
      const index_t i = position[static_cast<std::size_t>(c)];
      if (!is_static && c % g == 0) find(c / g, [&](index_t k) { return w(r, k); });
      const auto value = static_cast<double>(
          q[static_cast<std::size_t>(i / g)].nearest(static_cast<float>(w(r, c))));
      const double err = (w(r, c) - value) / u(c, c);
      for (index_t k = c + 1; k < p.ic; ++k) w(r, k) -= err * u(c, k);
      result(r, order[static_cast<std::size_t>(c)]) = value;
    }
    for (index_t c = dense_count; c < p.ic; ++c) {
      result(r, order[static_cast<std::size_t>(c)]) = static_cast<double>(
          qeft::to_float(qeft::from_float<qeft::half_bits>(static_cast<float>(w(r, c)))));
    }
  }
  return result;
}

}  // namespace

TEST_CASE("OPTQ makes the decisions of a plain implementation in double") {
  const on_host exec(2);
  int cases = 0;
  for (const index_t ic : {40, 168, 300}) {
    const problem p = make_problem(12, ic, static_cast<unsigned>(ic));
    for (const index_t group_size :
         {index_t{32}, index_t{96}, index_t{128}, index_t{160}, qeft::per_channel}) {
      for (int variant = 0; variant < 9; ++variant) {
        layer_options o;
        o.group_size = group_size;
        o.bits = variant == 1 ? 3 : 4;
        o.zero = static_cast<zero_kind>(variant % 3);
        o.static_groups = variant == 3;
        o.act_order = variant == 4 || variant == 7;
        o.search.weighted = variant >= 6;
        o.search.norm = variant == 8 ? 2.0 : 2.4;
        o.tuning.block_columns = variant == 5 ? 48 : 128;
        if (variant != 2) o.weak_columns = p.outliers;
        const layer_result got = solve(exec, p, o);
        const Eigen::MatrixXd q = dequantized(got.matrix);
        const Eigen::MatrixXd expected = reference_optq(p, o);
        index_t differ = 0;
        for (index_t r = 0; r < p.oc; ++r) {
          for (index_t c = 0; c < p.ic; ++c) {
            differ += std::abs(q(r, c) - expected(r, c)) > 1e-4 ? 1 : 0;
          }
        }
        INFO("ic " << ic << " group_size " << group_size << " variant " << variant);
        // A weight half-way between two codes may fall either way in FP32, and changes what follows
        // in its row.
        CHECK(differ <= p.oc * p.ic / 50);
        CHECK(output_error(p, q) == Approx(output_error(p, expected)).epsilon(0.02));
        CHECK(*got.report.output_error == Approx(output_error(p, q)).epsilon(1e-3));
        CHECK(*got.report.squared_error ==
              Approx((to_double(p.w, p.oc, p.ic) - q).squaredNorm()).epsilon(1e-5));
        ++cases;
      }
    }
  }
  CHECK(cases == 135);
}

TEST_CASE("results do not depend on the number of threads, bit for bit") {
  const problem p = make_problem(150, 200);
  for (const auto method : {layer_method::rtn, layer_method::optq}) {
    layer_options o;
    o.method = method;
    o.bits = 3;
    o.group_size = 64;
    o.weak_columns = p.outliers;
    const layer_result one = solve(on_host(1), p, o);
    for (const int threads : {2, 3, 5}) {
      const layer_result many = solve(on_host(threads), p, o);
      CHECK(same_bytes(one.matrix, many.matrix));
      CHECK(*one.report.output_error == *many.report.output_error);
      CHECK(*one.report.squared_error == *many.report.squared_error);
    }
    CHECK(qeft::solver::perturbation(on_host(1), p.w, p.oc, p.ic, o) ==
          qeft::solver::perturbation(on_host(3), p.w, p.oc, p.ic, o));
  }
}

TEST_CASE("OPTQ beats RTN, and weak columns beat none") {
  const on_host exec(2);
  for (const int bits : {2, 3, 4}) {
    for (unsigned seed = 1; seed <= 3; ++seed) {
      const problem p = make_problem(40, 260, seed);
      const auto error = [&](layer_method method, bool weak, bool act_order = false) {
        layer_options o;
        o.bits = bits;
        o.method = method;
        o.act_order = act_order;
        if (weak) o.weak_columns = p.outliers;
        return *solve(exec, p, o).report.output_error;
      };
      INFO("bits " << bits << " seed " << seed);
      CHECK(error(layer_method::optq, false) < error(layer_method::rtn, false));
      CHECK(error(layer_method::optq, true) < error(layer_method::rtn, true));
      CHECK(error(layer_method::rtn, true) < error(layer_method::rtn, false));
      CHECK(error(layer_method::optq, true) < error(layer_method::optq, false));
      CHECK(error(layer_method::optq, true, true) < error(layer_method::rtn, true));
    }
  }
}

TEST_CASE("weak columns absorb the error of the robust ones") {
  const problem p = make_problem(30, 120);
  layer_options o;
  o.bits = 3;
  o.weak_columns = p.outliers;
  const Eigen::MatrixXd q = dequantized(solve(on_host(1), p, o).matrix);
  Eigen::MatrixXd kept = q;
  for (const auto c : p.outliers) kept.col(c) = to_double(p.w, p.oc, p.ic).col(c);
  CHECK(output_error(p, q) < 0.9 * output_error(p, kept));

  o.method = layer_method::rtn;
  const Eigen::MatrixXd rtn = dequantized(solve(on_host(1), p, o).matrix);
  for (const auto c : p.outliers) {
    for (index_t r = 0; r < p.oc; ++r) {
      const auto original =
          qeft::from_float<qeft::half_bits>(p.w[static_cast<std::size_t>(r * p.ic + c)]);
      REQUIRE(rtn(r, c) == static_cast<double>(qeft::to_float(original)));
    }
  }
}

TEST_CASE("OPTQ lies between the best codes and its error bound, by enumeration") {
  int better = 0;
  constexpr int trials = 60;
  for (unsigned seed = 1; seed <= trials; ++seed) {
    const problem p = make_problem(1, 4, seed, 12);
    layer_options o;
    o.bits = 2;
    o.static_groups = true;  // RTN, OPTQ and the enumeration share one (scale, zero)
    o.search.method = qeft::solver::search_method::minmax;
    o.damping.damping = 0.0;
    const double optq = output_error(p, dequantized(solve(on_host(1), p, o).matrix));
    o.method = layer_method::rtn;
    const double rtn = output_error(p, dequantized(solve(on_host(1), p, o).matrix));
    const group_quantizer q =
        qeft::solver::minmax_params(p.w, {2, zero_kind::integer, qeft::scalar_kind::half})
            .quantizer;
    double least = INFINITY;
    for (int codes = 0; codes < 256; ++codes) {
      Eigen::MatrixXd candidate(1, 4);
      for (int c = 0; c < 4; ++c) {
        candidate(0, c) =
            static_cast<double>(q.value(q.lower + static_cast<float>((codes >> (2 * c)) & 3)));
      }
      least = std::min(least, output_error(p, candidate));
    }
    REQUIRE(optq >= least * (1.0 - 1e-9));
    REQUIRE(rtn >= least * (1.0 - 1e-9));
    better += optq <= rtn * (1.0 + 1e-9) ? 1 : 0;
  }
  CHECK(better > trials * 8 / 10);
}

TEST_CASE("E of OPTQ stays below sum (s / 2 U_jj)^2 where nothing clips") {
  // The damped error is the sum of the squared scaled errors, each at most half a step over U_jj.
  const problem p = make_problem(8, 64);
  layer_options o;
  o.bits = 8;
  o.group_size = 64;
  o.static_groups = true;
  o.search.method = qeft::solver::search_method::minmax;
  std::vector<float> w = p.w;  // room at both ends, so that compensated weights do not clip
  for (index_t r = 0; r < p.oc; ++r) {
    w[static_cast<std::size_t>(r * p.ic)] = 0.3F;
    w[static_cast<std::size_t>(r * p.ic + 1)] = -0.3F;
  }
  const problem roomy{p.oc, p.ic, w, p.h, {}};
  const layer_result got = solve(on_host(1), roomy, o);
  const auto factor = qeft::solver::factor_inverse(
      on_host(1), p.h, qeft::permutation::identity(p.ic), p.ic, o.damping);
  double inverse_squares = 0.0;
  for (index_t j = 0; j < p.ic; ++j) {
    const auto u = static_cast<double>(factor.u[static_cast<std::size_t>(j * (p.ic + 1))]);
    inverse_squares += 1.0 / (u * u);
  }
  const double step = 0.6 / 255.0;
  CHECK(*got.report.output_error <=
        1.01 * static_cast<double>(p.oc) * inverse_squares * step * step / 4.0);
  CHECK(*got.report.output_error > 0.0);
}

TEST_CASE("every format and shape solves to finite weights near the original") {
  const on_host exec(2);
  int cases = 0;
  for (const auto& [oc, ic, k] : std::vector<std::tuple<index_t, index_t, index_t>>{
           {1, 1, 0}, {1, 1, 1}, {3, 7, 7}, {5, 33, 1}, {70, 130, 0}, {64, 145, 16}}) {
    const problem p = make_problem(oc, ic, 3);
    for (const int bits : {2, 3, 4, 8}) {
      for (int zero = 0; zero < 3; ++zero) {
        for (const auto scalar : {qeft::scalar_kind::half, qeft::scalar_kind::bf16}) {
          for (const index_t group_size : {index_t{32}, index_t{128}, qeft::per_channel}) {
            for (const auto method : {layer_method::rtn, layer_method::optq}) {
              layer_options o;
              o.method = method;
              o.bits = bits;
              o.zero = static_cast<zero_kind>(zero);
              o.scalar = scalar;
              o.group_size = group_size;
              o.search.steps = 5;
              for (index_t j = 0; j < k; ++j) {
                o.weak_columns.push_back(static_cast<std::int32_t>(j * ic / k));
              }
              const layer_result got = solve(exec, p, o);
              CHECK(got.matrix.descriptor().weak ==
                    (k == 0 ? qeft::weak_kind::none : qeft::weak_kind::indexed));
              CHECK(got.matrix.weak_index() == o.weak_columns);
              const Eigen::MatrixXd q = dequantized(got.matrix);
              REQUIRE(q.allFinite());
              const double relative =
                  output_error(p, q) / output_error(p, Eigen::MatrixXd::Zero(p.oc, p.ic));
              INFO(oc << " x " << ic << " k " << k << " bits " << bits << " zero " << zero);
              CHECK(relative < (bits == 2 ? 0.6 : bits == 3 ? 0.2 : 0.05));
              CHECK(*got.report.squared_error ==
                    Approx((to_double(p.w, oc, ic) - q).squaredNorm()).epsilon(1e-4).margin(1e-12));
              ++cases;
            }
          }
        }
      }
    }
  }
  CHECK(cases == 6 * 4 * 3 * 2 * 3 * 2);
}

TEST_CASE("RTN is the group search, row by row") {
  const problem p = make_problem(9, 100);
  layer_options o;
  o.method = layer_method::rtn;
  o.group_size = 32;
  o.bits = 3;
  const layer_result got = quantize_layer(on_host(2), p.w, p.oc, p.ic, {}, o);
  CHECK_FALSE(got.report.output_error.has_value());
  const Eigen::MatrixXd q = dequantized(got.matrix);
  for (index_t r = 0; r < p.oc; ++r) {
    for (index_t first = 0; first < p.ic; first += 32) {
      const index_t count = std::min<index_t>(32, p.ic - first);
      const float* w = p.w.data() + r * p.ic + first;
      const auto choice = qeft::solver::exhaustive_search(
          {w, count}, {3, zero_kind::integer, qeft::scalar_kind::half}, o.search);
      for (index_t i = 0; i < count; ++i) {
        REQUIRE(q(r, first + i) == static_cast<double>(choice.quantizer.nearest(w[i])));
      }
    }
  }
}

TEST_CASE("a search weighted by what the solver pays lowers E, and RTN ignores it") {
  const on_host exec(2);
  for (const bool act_order : {false, true}) {
    double plain = 0.0;
    double weighted = 0.0;
    for (unsigned seed = 1; seed <= 12; ++seed) {
      const problem p = with_channel_sizes(make_problem(48, 200, seed), seed);
      layer_options o;
      o.bits = 3 + static_cast<int>(seed % 2);
      o.group_size = 64;
      o.act_order = act_order;
      o.weak_columns = p.outliers;
      o.search.norm = 2.0;
      const double size = *solve(exec, p, o).report.output_error;
      plain += 1.0;
      o.search.weighted = true;
      weighted += *solve(exec, p, o).report.output_error / size;
    }
    INFO("act-order " << act_order << ": " << weighted / plain);
    CHECK(weighted < 0.97 * plain);
  }
  const problem p = make_problem(20, 100);
  layer_options o;
  o.method = layer_method::rtn;
  const layer_result plain = solve(exec, p, o);
  o.search.weighted = true;
  CHECK(same_bytes(solve(exec, p, o).matrix, plain.matrix));
}

TEST_CASE("perturbation is the column error of RTN without weak columns") {
  const problem p = make_problem(70, 90);
  layer_options o;
  o.weak_columns = p.outliers;
  o.group_size = 32;
  const auto columns = qeft::solver::perturbation(on_host(2), p.w, p.oc, p.ic, o);
  o.method = layer_method::rtn;
  o.weak_columns.clear();
  const Eigen::MatrixXd dw =
      to_double(p.w, p.oc, p.ic) - dequantized(solve(on_host(1), p, o).matrix);
  REQUIRE(columns.size() == static_cast<std::size_t>(p.ic));
  for (index_t c = 0; c < p.ic; ++c) {
    CHECK(columns[static_cast<std::size_t>(c)] == Approx(dw.col(c).squaredNorm()).epsilon(1e-5));
  }
}

TEST_CASE("dead inputs become zero columns; with nothing but dead inputs OPTQ is RTN") {
  const on_host exec(1);
  problem p = make_problem(10, 70);
  for (const index_t dead : {11, 34}) {  // 34 is weak
    for (index_t j = 0; j < p.ic; ++j) {
      p.h[static_cast<std::size_t>(dead * p.ic + j)] = 0.0F;
      p.h[static_cast<std::size_t>(j * p.ic + dead)] = 0.0F;
    }
  }
  const std::vector<float> live_h = p.h;
  for (const bool weighted : {false, true}) {
    layer_options o;
    o.weak_columns = p.outliers;
    o.search.weighted = weighted;
    p.h = live_h;
    const layer_result got = solve(exec, p, o);
    CHECK(got.report.dead_inputs == std::vector<std::int32_t>{11, 34});
    const Eigen::MatrixXd q = dequantized(got.matrix);
    CHECK(q.col(11).isZero(0.0));
    CHECK((q.col(34) - to_double(p.w, p.oc, p.ic).col(34)).norm() < 1e-4);

    o.zero = zero_kind::scaled;  // a group need not represent 0
    const layer_result large = solve(exec, p, o);
    for (float& h : p.h) h *= 0x1p-20F;  // no input counts more for being dead
    CHECK(same_bytes(solve(exec, p, o).matrix, large.matrix));

    std::fill(p.h.begin(), p.h.end(), 0.0F);
    const layer_result optq = solve(exec, p, o);
    CHECK(optq.report.dead_inputs.size() == static_cast<std::size_t>(p.ic));
    CHECK(*optq.report.output_error == 0.0);
    o.method = layer_method::rtn;
    CHECK(same_bytes(optq.matrix, solve(exec, p, o).matrix));
  }
}

TEST_CASE("a singular Hessian is damped until it factors, and reported") {
  const problem p = make_problem(8, 150, 4, 20);
  layer_options o;
  CHECK(solve(on_host(1), p, o).report.damping == 0.01);
  o.damping.damping = 0.0;
  const layer_result got = solve(on_host(1), p, o);
  CHECK(got.report.damping > 0.0);
  CHECK(dequantized(got.matrix).allFinite());
}

TEST_CASE("bad input is an error that names it") {
  const on_host exec(2);
  const problem good = make_problem(6, 40);
  const auto failure = [&](const problem& p, const layer_options& o) {
    try {
      solve(exec, p, o);
    } catch (const qeft::error& e) {
      return std::pair<errc, std::string>(e.code(), e.what());
    }
    return std::pair<errc, std::string>(errc::ok, "");
  };
  const auto contains = [](const std::string& text, const char* part) {
    return text.find(part) != std::string::npos;
  };
  CHECK(failure(good, {}).first == errc::ok);
  {
    problem p = good;
    p.w[3 * 40 + 7] = NAN;
    for (const auto method : {layer_method::rtn, layer_method::optq}) {
      layer_options o;
      o.method = method;
      const auto [code, what] = failure(p, o);
      CHECK(code == errc::not_finite);
      CHECK(contains(what, "row 3, column 7"));
    }
  }
  {
    problem p = good;
    p.h[2 * 40 + 9] = INFINITY;
    const auto [code, what] = failure(p, {});
    CHECK(code == errc::not_finite);
    CHECK(contains(what, "Hessian"));
    CHECK(contains(what, "row 2, column 9"));
  }
  {
    problem p = good;
    p.h[0] = -1.0F;
    CHECK(failure(p, {}).first == errc::not_positive_definite);
    p = good;
    for (index_t j = 1; j < 40; ++j) p.h[static_cast<std::size_t>(j)] *= 100.0F;
    for (index_t j = 1; j < 40; ++j) p.h[static_cast<std::size_t>(j * 40)] *= 100.0F;
    CHECK(failure(p, {}).first == errc::not_positive_definite);
  }
  {
    problem p = good;
    p.w[2 * 40 + 5] = 1e6F;  // too large for FP16, column 5 is weak
    layer_options o;
    o.weak_columns = {5};
    const auto [code, what] = failure(p, o);
    CHECK(code == errc::not_finite);
    CHECK(contains(what, "weak column 5, row 2"));
    o.scalar = qeft::scalar_kind::bf16;
    CHECK(failure(p, o).first == errc::ok);
  }
  for (const auto& weak : std::vector<std::vector<std::int32_t>>{{3, 2}, {3, 3}, {-1}, {40}}) {
    layer_options o;
    o.weak_columns = weak;
    CHECK(failure(good, o).first == errc::invalid_argument);
  }
  {
    problem p = good;
    p.h.clear();
    CHECK(failure(p, {}).first == errc::invalid_argument);
    p = good;
    p.w.pop_back();
    CHECK(failure(p, {}).first == errc::invalid_argument);
    layer_options o;
    o.bits = 5;
    CHECK(failure(good, o).first == errc::invalid_argument);
    o = {};
    o.group_size = 48;
    CHECK(failure(good, o).first == errc::invalid_argument);
    o = {};
    o.damping.damping = 2.0;
    CHECK(failure(good, o).first == errc::invalid_argument);
    o = {};
    o.search.norm = 0.0;
    CHECK(failure(good, o).first == errc::invalid_argument);
    o = {};
    o.tuning.tile_rows = 0;
    CHECK(failure(good, o).first == errc::invalid_argument);
  }
}

TEST_CASE("compensated weights that overflow FP32 are an error, weak columns or not") {
  // Column 1 has almost no activation of its own but follows column 0, so that it takes 10,000
  // times the error of column 0. Columns 2 and 3 set the range.
  problem p{1, 4, {0.1e36F, 0.1e36F, -0.9e36F, 0.9e36F}, std::vector<float>(16, 0.0F), {}};
  for (std::size_t j = 0; j < 4; ++j) p.h[5 * j] = 1.0F;
  p.h[5] = 1e-8F;
  p.h[1] = p.h[4] = 0.9999e-4F;
  layer_options o;
  o.bits = 2;
  o.scalar = qeft::scalar_kind::bf16;
  o.group_size = 32;
  o.static_groups = true;
  o.search.method = qeft::solver::search_method::minmax;
  o.damping.damping = 0.0;
  const auto message = [&] {
    try {
      solve(on_host(1), p, o);
    } catch (const qeft::error& e) {
      CHECK(e.code() == errc::not_finite);
      return std::string(e.what());
    }
    return std::string();
  };
  CHECK_THAT(message(), qeft_test::contains("overflow FP32"));
  o.weak_columns = {1};
  CHECK_THAT(message(), qeft_test::contains("overflow"));
  for (float& w : p.w) w *= 1e-6F;
  CHECK(message().empty());
}

TEST_CASE("group parameters never saturate in silence") {
  const on_host exec(1);
  problem p = make_problem(4, 64);
  const auto message = [&](float size, qeft::scalar_kind scalar, zero_kind zero) {
    problem q = p;
    q.w[2 * 64 + 40] = -size;
    layer_options o;
    o.method = layer_method::rtn;
    o.group_size = 32;
    o.scalar = scalar;
    o.zero = zero;
    try {
      solve(exec, q, o);
    } catch (const qeft::error& e) {
      CHECK(e.code() == errc::not_finite);
      return std::string(e.what());
    }
    return std::string();
  };
  constexpr auto half = qeft::scalar_kind::half;
  constexpr auto bf16 = qeft::scalar_kind::bf16;
  CHECK(message(9e5F, half, zero_kind::integer).empty());  // 15 * 65504 = 982,560
  CHECK_THAT(message(1e6F, half, zero_kind::integer), qeft_test::contains("row 2, group 1 reach"));
  CHECK(message(6e4F, half, zero_kind::scaled).empty());
  CHECK_THAT(message(7e4F, half, zero_kind::scaled), qeft_test::contains("f16"));
  CHECK(message(1e6F, bf16, zero_kind::scaled).empty());
  CHECK_THAT(message(1e37F, bf16, zero_kind::integer), qeft_test::contains("bf16"));
}

TEST_CASE("the scalar type is the one that loses less, so that errors do not depend on the size") {
  const on_host exec(2);
  const problem p = make_problem(24, 160);
  const auto choose = [&](const std::vector<float>& w, const layer_options& o) {
    return qeft::solver::choose_scalar(exec, w, p.oc, p.ic, o);
  };
  const auto scaled = [&](float factor) {
    std::vector<float> w = p.w;
    for (float& x : w) x *= factor;
    return w;
  };
  const auto relative = [&](const std::vector<float>& w, layer_options o) {
    o.scalar = choose(w, o);
    double whole = 0;
    for (const float x : w) whole += static_cast<double>(x) * static_cast<double>(x);
    return std::sqrt(*quantize_layer(exec, w, p.oc, p.ic, {}, o).report.squared_error / whole);
  };
  constexpr auto half = qeft::scalar_kind::half;
  constexpr auto bf16 = qeft::scalar_kind::bf16;
  for (const int bits : {2, 3, 4, 8}) {
    for (const auto zero : {zero_kind::symmetric, zero_kind::integer, zero_kind::scaled}) {
      for (const bool weak : {false, true}) {
        layer_options o;
        o.method = layer_method::rtn;
        o.bits = bits;
        o.zero = zero;
        o.group_size = 32;
        if (weak) o.weak_columns = p.outliers;
        CHECK(choose(p.w, o) == half);
        const double normal = relative(p.w, o);
        // Scaled zeros have 8 bits in BF16, as many as the codes.
        const double slack = zero == zero_kind::scaled && bits == 8 ? 2.5 : 1.1;
        for (const int power : {-4, -8, -12, -16, -20, -26, -40, -80, 18, 60, 110}) {
          INFO("bits " << bits << " zero " << static_cast<int>(zero) << " power " << power);
          const std::vector<float> w = scaled(std::ldexp(1.0F, power));
          CHECK(relative(w, o) < slack * normal);
          if (power <= -20 || power >= 60) CHECK(choose(w, o) == bf16);
        }
      }
    }
  }
  layer_options o;
  o.group_size = 32;
  std::vector<float> w = p.w;
  w[7] = 16385.0F;  // may overflow as a weak column
  CHECK(choose(w, o) == bf16);
  w[7] = 16384.0F;
  CHECK(choose(w, o) == half);
  w = p.w;  // a single row that FP16 scales would lose
  for (std::size_t j = 0; j < 160; ++j) w[3 * 160 + j] *= 0x1p-22F;
  CHECK(choose(w, o) == bf16);
  w = p.w;  // a weak column that FP16 would lose
  for (std::size_t n = 0; n < 24; ++n) w[n * 160 + 5] *= 0x1p-22F;
  CHECK(choose(w, o) == half);
  o.weak_columns = {5};
  CHECK(choose(w, o) == bf16);
  w = p.w;  // zeros lose nothing
  for (std::size_t j = 0; j < 160; ++j) w[3 * 160 + j] = 0.0F;
  CHECK(choose(w, o) == half);
  w[7] = 1e36F;
  CHECK_THROWS_WITH(choose(w, o), qeft_test::contains("2^117"));
  w.pop_back();
  CHECK_THROWS_WITH(choose(w, o), qeft_test::contains("choose_scalar: w has"));
}

TEST_CASE("an asymmetric Hessian is refused by both methods") {
  problem p = make_problem(3, 40);
  p.h[2 * 40 + 9] += p.h[0];
  for (const auto method : {layer_method::rtn, layer_method::optq}) {
    layer_options o;
    o.method = method;
    CHECK_THROWS_WITH(solve(on_host(1), p, o), qeft_test::contains("entry (9, 2)"));
  }
}
