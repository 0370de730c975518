// SPDX-License-Identifier: Apache-2.0
// Refinement of a quantised layer: against the definition of E in double, and by its properties.
#include <Eigen/Dense>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "qeft/solver/hessian.hpp"
#include "qeft/solver/quantize_layer.hpp"
#include "qeft/solver/refine.hpp"
#include "support/cases.hpp"
#include "support/catch.hpp"
#include "support/throws.hpp"

namespace {

using Eigen::MatrixXd;
using Eigen::VectorXd;
using qeft::errc;
using qeft::index_t;
using qeft::on_host;
using qeft::quantized_matrix;
using qeft::scalar_kind;
using qeft::zero_kind;
using qeft::solver::layer_method;
using qeft::solver::layer_options;
using qeft::solver::refine;
using qeft::solver::refine_result;
using qeft::solver::detail::columns_weak_last;
using qeft::solver::detail::reduce_hessian;
using qeft_test::random_source;
using qeft_test::same_bytes;

struct problem {
  index_t oc;
  index_t ic;
  std::vector<float> w;  // (OC, IC)
  std::vector<float> h;  // (IC, IC)
};

/// Correlated activations (tokens, IC) in which every 29th channel is large.
std::vector<float> correlated_activations(index_t ic, index_t tokens, unsigned seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<std::size_t>(tokens * ic));
  for (index_t t = 0; t < tokens; ++t) {
    float previous = 0.0F;
    for (index_t j = 0; j < ic; ++j) {
      previous = 0.8F * previous + normal(rng);
      x[static_cast<std::size_t>(t * ic + j)] = previous * (j % 29 == 5 ? 12.0F : 1.0F);
    }
  }
  return x;
}

std::vector<float> hessian_of(const std::vector<float>& x, index_t ic) {
  qeft::solver::hessian_accumulator h(ic);
  h.add(on_host(1), x.data(), static_cast<index_t>(x.size()) / ic);
  const auto finished = std::move(h).finish();
  return {finished.begin(), finished.end()};
}

std::vector<float> correlated_hessian(index_t ic, index_t tokens, unsigned seed) {
  return hessian_of(correlated_activations(ic, tokens, seed), ic);
}

problem make_problem(index_t oc, index_t ic, unsigned seed = 1, index_t tokens = 0) {
  std::mt19937 rng(seed + 1000);
  std::normal_distribution<float> normal;
  problem p{oc, ic, {}, correlated_hessian(ic, tokens == 0 ? 3 * ic : tokens, seed)};
  p.w.resize(static_cast<std::size_t>(oc * ic));
  for (float& x : p.w) x = 0.02F * normal(rng);
  return p;
}

layer_options options_of(layer_method method, int bits, index_t group_size, zero_kind zero,
                         scalar_kind scalar, std::vector<std::int32_t> weak) {
  layer_options o;
  o.method = method;
  o.bits = bits;
  o.group_size = group_size;
  o.zero = zero;
  o.scalar = scalar;
  o.weak_columns = std::move(weak);
  o.search.steps = 10;
  return o;
}

quantized_matrix<> solve(const problem& p, const layer_options& o) {
  return quantize_layer(on_host(1), p.w, p.oc, p.ic, p.h, o).matrix;
}

MatrixXd to_double(const std::vector<float>& x, index_t rows, index_t cols) {
  MatrixXd m(rows, cols);
  for (index_t r = 0; r < rows; ++r) {
    for (index_t c = 0; c < cols; ++c) {
      m(r, c) = static_cast<double>(x[static_cast<std::size_t>(r * cols + c)]);
    }
  }
  return m;
}

/// E of every row, by the accessors that define the layer.
VectorXd row_errors(const problem& p, const quantized_matrix<>& m) {
  const MatrixXd dw = to_double(p.w, p.oc, p.ic) - to_double(qeft_test::dequantized(m), p.oc, p.ic);
  return (dw * to_double(p.h, p.ic, p.ic)).cwiseProduct(dw).rowwise().sum();
}

/// One row as a linear function of its parameters, with its codes fixed: weights = basis * values.
struct linear_row {
  MatrixXd basis;   // (IC, unknowns)
  VectorXd values;  // scaled zeros if any, scales, weak columns
  index_t params;   // unknowns that are not weak columns
};

linear_row linearize(const quantized_matrix<>& m, index_t n) {
  const qeft::matrix_descriptor& d = m.descriptor();
  const index_t groups = d.groups();
  const bool scaled = d.zero == zero_kind::scaled;
  const auto codes = qeft_test::codes_of(m);
  const auto columns = columns_weak_last(m);
  const index_t dense = d.in_channels - d.weak_columns;
  linear_row row;
  row.params = scaled ? 2 * groups : groups;
  row.basis = MatrixXd::Zero(d.in_channels, row.params + d.weak_columns);
  row.values.resize(row.params + d.weak_columns);
  const auto value = [&](std::uint16_t bits) {
    return static_cast<double>(d.scalar == scalar_kind::half ? to_float(qeft::half_bits{bits})
                                                             : to_float(qeft::bf16_bits{bits}));
  };
  const index_t first_scale = row.params - groups;
  for (index_t i = 0; i < dense; ++i) {
    const index_t g = i / d.columns_per_group();
    const index_t column = columns[static_cast<std::size_t>(i)];
    const auto params = m.read_params(n, g);
    const double code = codes[static_cast<std::size_t>(n * dense + i)];
    const double mid = d.zero == zero_kind::symmetric ? std::exp2(d.bits - 1) : params.zero;
    row.basis(column, first_scale + g) = scaled ? code : code - mid;
    if (scaled) row.basis(column, g) = 1.0;
    row.values[first_scale + g] = value(params.scale_bits);
    if (scaled) row.values[g] = value(static_cast<std::uint16_t>(params.zero));
  }
  for (index_t j = 0; j < d.weak_columns; ++j) {
    row.basis(columns[static_cast<std::size_t>(dense + j)], row.params + j) = 1.0;
    row.values[row.params + j] = value(m.read_weak(n, j));
  }
  return row;
}

/// E of a row with these parameters and the weak columns that are best for them.
double least_error(const linear_row& row, const VectorXd& w, const MatrixXd& h,
                   const VectorXd& params) {
  const index_t k = row.basis.cols() - row.params;
  VectorXd dw = w - row.basis.leftCols(row.params) * params;
  if (k > 0) {
    const MatrixXd weak = row.basis.rightCols(k);
    const MatrixXd h_ww = weak.transpose() * h * weak;
    dw -= weak * h_ww.ldlt().solve(weak.transpose() * (h * dw));
  }
  return dw.dot(h * dw);
}

/// The least E of a row over all its parameters and weak columns, not rounded.
double unrounded_least_error(const linear_row& row, const VectorXd& w, const MatrixXd& h) {
  const MatrixXd normal = row.basis.transpose() * h * row.basis;
  const VectorXd best = normal.ldlt().solve(row.basis.transpose() * (h * w));
  const VectorXd dw = w - row.basis * best;
  return dw.dot(h * dw);
}

template <class Body>
void for_each_format(const Body& body) {
  for (const layer_method method : {layer_method::rtn, layer_method::optq}) {
    for (const zero_kind zero : {zero_kind::symmetric, zero_kind::integer, zero_kind::scaled}) {
      for (const scalar_kind scalar : {scalar_kind::half, scalar_kind::bf16}) {
        for (const int bits : {2, 3, 4, 8}) body(method, bits, zero, scalar);
      }
    }
  }
}

using refiner = qeft::solver::detail::refiner<qeft::half_bits>;

}  // namespace

TEST_CASE("the least-squares system is that of the definition") {
  const problem p = make_problem(3, 100);
  const MatrixXd h = to_double(p.h, p.ic, p.ic);
  const MatrixXd w = to_double(p.w, p.oc, p.ic);
  for (const zero_kind zero : {zero_kind::symmetric, zero_kind::integer, zero_kind::scaled}) {
    for (const bool weak : {false, true}) {
      CAPTURE(static_cast<int>(zero), weak);
      quantized_matrix<> m = solve(p, options_of(layer_method::optq, 3, 32, zero, scalar_kind::half,
                                                 weak ? std::vector<std::int32_t>{5, 34, 63, 92}
                                                      : std::vector<std::int32_t>{}));
      const refiner r(on_host(1), p.w, p.h, m);
      const double scale =
          reduce_hessian(on_host(1), p.h, columns_weak_last(m), p.ic - (weak ? 4 : 0)).scale;
      const auto systems = r.equations(r.load(0, p.oc));
      for (index_t n = 0; n < p.oc; ++n) {
        const auto& eq = systems[static_cast<std::size_t>(n)];
        const linear_row row = linearize(m, n);
        const VectorXd start = row.values.head(row.params);
        REQUIRE(eq.right.size() == row.params);

        // Central differences of a quadratic function are exact.
        const auto gradient = [&](const VectorXd& at) {
          VectorXd out(row.params);
          for (index_t j = 0; j < row.params; ++j) {
            const double step = 1e-3;
            VectorXd up = at;
            VectorXd down = at;
            up[j] += step;
            down[j] -= step;
            out[j] = (least_error(row, w.row(n), h, up) - least_error(row, w.row(n), h, down)) /
                     (2.0 * step);
          }
          return out;
        };
        const VectorXd at_start = gradient(start);
        CHECK((at_start + 2.0 / scale * eq.right).norm() < 1e-4 * at_start.norm());
        const VectorXd solution = start + eq.matrix.ldlt().solve(eq.right);
        CHECK(gradient(solution).norm() < 1e-4 * at_start.norm());
        const double gain =
            least_error(row, w.row(n), h, start) - least_error(row, w.row(n), h, solution);
        const VectorXd step = solution - start;
        const double predicted = (2.0 * step.dot(eq.right) - step.dot(eq.matrix * step)) / scale;
        CHECK(gain == Approx(predicted).epsilon(1e-4));
      }
    }
  }
}

TEST_CASE("with codes fixed a row reaches the least squares of all its parameters") {
  const problem p = make_problem(4, 130);
  const MatrixXd h = to_double(p.h, p.ic, p.ic);
  const MatrixXd w = to_double(p.w, p.oc, p.ic);
  for (const zero_kind zero : {zero_kind::symmetric, zero_kind::integer, zero_kind::scaled}) {
    CAPTURE(static_cast<int>(zero));
    const quantized_matrix<> before = solve(
        p, options_of(layer_method::rtn, 4, 32, zero, scalar_kind::half, {5, 34, 63, 92, 121}));
    quantized_matrix<> m = before;
    const refiner r(on_host(1), p.w, p.h, m);
    auto t = r.load(0, p.oc);
    const auto systems = r.equations(t);
    for (index_t n = 0; n < p.oc; ++n) r.solve_params(t, n, systems[static_cast<std::size_t>(n)]);
    r.solve_weak(t);
    const VectorXd after = r.errors(t);
    const VectorXd start = row_errors(p, before);
    for (index_t n = 0; n < p.oc; ++n) {
      const double least = unrounded_least_error(linearize(before, n), w.row(n), h);
      CAPTURE(n, start[n], after[n], least);
      CHECK(least < 0.95 * start[n]);
      CHECK(after[n] >= least);
      CHECK(after[n] < least + 0.01 * start[n]);
    }
  }
}

TEST_CASE("unknowns rounded in turn take up the rounding of those before them") {
  random_source random(4);
  const index_t n = 7;
  for (int i = 0; i < 20; ++i) {
    qeft::solver::row_major_matrix<double> factor = MatrixXd::Zero(n, n);
    VectorXd wanted(n);
    for (index_t r = 0; r < n; ++r) {
      for (index_t c = r + 1; c < n; ++c) factor(r, c) = random.real();
      factor(r, r) = 1.5 + random.real();
      wanted[r] = 10.0 * random.real();
    }
    // The definition: the least squares of all that are not rounded yet, for each.
    VectorXd expected = wanted;
    for (index_t j = n - 1; j >= 0; --j) {
      const index_t later = n - 1 - j;
      const VectorXd rest = factor.rightCols(later) * (expected - wanted).tail(later);
      const VectorXd best = factor.leftCols(j + 1).colPivHouseholderQr().solve(-rest);
      expected[j] = std::nearbyint(wanted[j] + best[j]);
    }
    VectorXd x = wanted;
    qeft::solver::detail::round_in_turn(factor, x,
                                        [](index_t, double v) { return std::nearbyint(v); });
    CHECK(x == expected);
  }
}

TEST_CASE("a step of the parameters is taken only if it lowers E as rounded") {
  const problem p = make_problem(40, 100);
  const MatrixXd h = to_double(p.h, p.ic, p.ic);
  const MatrixXd w = to_double(p.w, p.oc, p.ic);
  for (const zero_kind zero : {zero_kind::integer, zero_kind::scaled}) {
    // With steps finer than what BF16 resolves.
    quantized_matrix<> m =
        solve(p, options_of(layer_method::optq, 8, 32, zero, scalar_kind::bf16, {5, 34, 63}));
    const qeft::solver::detail::refiner<qeft::bf16_bits> r(on_host(1), p.w, p.h, m);
    auto t = r.load(0, p.oc);
    const auto systems = r.equations(t);
    int stayed = 0;
    for (index_t n = 0; n < p.oc; ++n) {
      r.solve_params(t, n, systems[static_cast<std::size_t>(n)]);
      const linear_row row = linearize(m, n);
      const VectorXd start = row.values.head(row.params);
      VectorXd now(row.params);
      const index_t groups = m.descriptor().groups();
      for (index_t g = 0; g < groups; ++g) {
        const auto& q = t.params[static_cast<std::size_t>(n * groups + g)].quantizer;
        now[row.params - groups + g] = static_cast<double>(q.scale);
        if (zero == zero_kind::scaled) now[g] = static_cast<double>(q.offset);
      }
      const double before = least_error(row, w.row(n), h, start);
      CHECK(least_error(row, w.row(n), h, now) <= before * (1.0 + 1e-5));
      if (now == start) ++stayed;
    }
    CAPTURE(stayed);
    CHECK(stayed > 0);
    CHECK(stayed < p.oc);
  }
}

TEST_CASE("no single code can be better once codes stop moving") {
  const problem p = make_problem(4, 70, 3);
  const MatrixXd h = to_double(p.h, p.ic, p.ic);
  const MatrixXd w = to_double(p.w, p.oc, p.ic);
  for (const zero_kind zero : {zero_kind::integer, zero_kind::scaled}) {
    for (const int bits : {2, 4}) {
      CAPTURE(static_cast<int>(zero), bits);
      quantized_matrix<> m =
          solve(p, options_of(layer_method::rtn, bits, 32, zero, scalar_kind::half, {5, 34, 63}));
      const refiner r(on_host(1), p.w, p.h, m);
      auto t = r.load(0, p.oc);
      int moves = 0;
      for (bool moved = true; moved && moves < 50; ++moves) {
        const auto last = t.levels;
        r.move_codes(t);
        moved = t.levels != last;
      }
      CHECK(moves > 1);
      CHECK(moves < 50);
      const auto columns = columns_weak_last(m);
      for (index_t n = 0; n < p.oc; ++n) {
        linear_row row = linearize(m, n);
        const VectorXd params = row.values.head(row.params);
        const index_t first_scale = row.params - m.descriptor().groups();
        const auto set = [&](index_t i, double level) {
          row.basis(columns[static_cast<std::size_t>(i)], first_scale + i / 32) = level;
        };
        for (index_t i = 0; i < t.levels.cols(); ++i) set(i, static_cast<double>(t.levels(n, i)));
        const double reached = least_error(row, w.row(n), h, params);
        for (index_t i = 0; i < t.levels.cols(); ++i) {
          const auto& q = t.params[static_cast<std::size_t>(n * m.descriptor().groups() + i / 32)];
          const auto lower = static_cast<double>(q.quantizer.lower);
          for (int code = 0; code < 1 << bits; ++code) {
            set(i, lower + code);
            CHECK(least_error(row, w.row(n), h, params) > reached * (1.0 - 1e-4));
          }
          set(i, static_cast<double>(t.levels(n, i)));
        }
      }
    }
  }
}

TEST_CASE("E of every row falls with the rounds, whatever the format") {
  const problem p = make_problem(5, 100);
  for_each_format([&](layer_method method, int bits, zero_kind zero, scalar_kind scalar) {
    for (const index_t group_size : {index_t{32}, qeft::per_channel}) {
      for (const bool weak : {false, true}) {
        CAPTURE(static_cast<int>(method), bits, static_cast<int>(zero), static_cast<int>(scalar),
                group_size, weak);
        const quantized_matrix<> m = solve(p, options_of(method, bits, group_size, zero, scalar,
                                                         weak ? std::vector<std::int32_t>{5, 34, 92}
                                                              : std::vector<std::int32_t>{}));
        VectorXd last = row_errors(p, m);
        const VectorXd start = last;
        for (const int rounds : {0, 1, 2, 3}) {
          const refine_result r = refine(on_host(1), p.w, p.h, m, rounds);
          const VectorXd now = row_errors(p, r.matrix);
          CHECK((now.array() <= last.array() * (1.0 + 1e-12)).all());
          CHECK(r.before == Approx(start.sum()).epsilon(1e-9));
          CHECK(r.after == Approx(now.sum()).epsilon(1e-9));
          CHECK(same_bytes(r.matrix, m) == (rounds == 0));
          last = now;
          for (index_t n = 0; zero == zero_kind::integer && n < p.oc; ++n) {
            for (index_t g = 0; g < m.descriptor().groups(); ++g) {
              CHECK(r.matrix.read_params(n, g).zero == m.read_params(n, g).zero);
            }
          }
        }
        CHECK(last.sum() < (method == layer_method::rtn ? 0.8 : 0.99) * start.sum());
      }
    }
  });
}

TEST_CASE("rounds add up: refining twice is refining for two rounds") {
  const problem p = make_problem(70, 100);
  const quantized_matrix<> m = solve(
      p, options_of(layer_method::optq, 4, 32, zero_kind::integer, scalar_kind::half, {5, 34, 63}));
  const refine_result once = refine(on_host(1), p.w, p.h, m, 1);
  const refine_result twice = refine(on_host(1), p.w, p.h, once.matrix, 1);
  CHECK(once.after == twice.before);
  CHECK(same_bytes(twice.matrix, refine(on_host(1), p.w, p.h, m, 2).matrix));
}

TEST_CASE("refinement gains on what OPTQ leaves") {
  const problem p = make_problem(64, 320);
  std::vector<std::int32_t> weak;
  for (std::int32_t j = 5; j < p.ic; j += 29) weak.push_back(j);
  struct expected {
    zero_kind zero;
    int bits;
    double at_most;
  };
  for (const auto& [zero, bits, at_most] :
       {expected{zero_kind::integer, 4, 0.97}, expected{zero_kind::scaled, 4, 0.96},
        expected{zero_kind::integer, 3, 0.95}}) {
    layer_options o = options_of(layer_method::optq, bits, 128, zero, scalar_kind::half, weak);
    o.search.steps = 40;
    const quantized_matrix<> m = solve(p, o);
    std::string gains;
    double last = 1.0;
    for (const int rounds : {1, 2, 3}) {
      const refine_result r = refine(on_host(1), p.w, p.h, m, rounds);
      gains += std::to_string(r.after / r.before) + " ";
      last = r.after / r.before;
    }
    INFO(bits << " bits, zero " << static_cast<int>(zero) << ": " << gains);
    CHECK(last < at_most);
  }
}

TEST_CASE("the number of threads changes nothing in a refined layer") {
  for (const zero_kind zero : {zero_kind::integer, zero_kind::scaled}) {
    const problem p = make_problem(101, 130);
    const quantized_matrix<> m = solve(
        p, options_of(layer_method::optq, 3, 32, zero, scalar_kind::half, {5, 34, 63, 92, 121}));
    const refine_result one = refine(on_host(1), p.w, p.h, m, 2);
    const refine_result three = refine(on_host(3), p.w, p.h, m, 2);
    CHECK(same_bytes(one.matrix, three.matrix));
    CHECK(one.before == three.before);
    CHECK(one.after == three.after);
  }
}

TEST_CASE("any stored layer can be refined") {
  random_source random(20);
  for (int i = 0; i < 60; ++i) {
    const qeft_test::plain_layer layer = qeft_test::random_case(random, 20000);
    if (layer.d.in_channels > 700) continue;
    CAPTURE(i, qeft_test::describe(layer.d));
    const auto m = qeft_test::pack<qeft::layout::row_packed>(layer);
    problem p{layer.d.out_channels, layer.d.in_channels, qeft_test::weights_of(layer),
              correlated_hessian(layer.d.in_channels, random.integer(1, 200), 7)};
    float largest = 0.0F;
    for (const float x : p.w) largest = std::max(largest, std::abs(x));
    for (float& x : p.w) x += 0.1F * largest * static_cast<float>(random.real());
    const refine_result r = refine(on_host(2), p.w, p.h, m, 2);
    const VectorXd before = row_errors(p, m);
    const VectorXd after = row_errors(p, r.matrix);
    CHECK((after.array() <= before.array() * (1.0 + 1e-12)).all());
    CHECK(r.after == Approx(after.sum()).epsilon(1e-6));
    CHECK(after.sum() < before.sum());
  }
}

TEST_CASE("dead inputs keep their codes and weak columns") {
  problem p = make_problem(6, 100);
  const std::vector<index_t> dead{0, 7, 34, 40, 63};
  for (const index_t j : dead) {
    for (index_t i = 0; i < p.ic; ++i) {
      p.h[static_cast<std::size_t>(i * p.ic + j)] = 0.0F;
      p.h[static_cast<std::size_t>(j * p.ic + i)] = 0.0F;
    }
  }
  const quantized_matrix<> m = solve(p, options_of(layer_method::rtn, 4, 32, zero_kind::integer,
                                                   scalar_kind::half, {5, 34, 63, 92}));
  const refine_result r = refine(on_host(1), p.w, p.h, m, 2);
  CHECK(r.after < 0.8 * r.before);
  const auto before = qeft_test::codes_of(m);
  const auto after = qeft_test::codes_of(r.matrix);
  const index_t dense = p.ic - 4;
  const auto columns = columns_weak_last(m);
  for (index_t n = 0; n < p.oc; ++n) {
    for (index_t i = 0; i < dense; ++i) {
      const index_t column = columns[static_cast<std::size_t>(i)];
      if (std::find(dead.begin(), dead.end(), column) == dead.end()) continue;
      const auto at = static_cast<std::size_t>(n * dense + i);
      CHECK(before[at] == after[at]);
    }
    CHECK(m.read_weak(n, 1) == r.matrix.read_weak(n, 1));
    CHECK(m.read_weak(n, 2) == r.matrix.read_weak(n, 2));
  }
}

TEST_CASE("what the weak columns represent stays") {
  problem p = make_problem(4, 64);
  std::vector<std::int32_t> weak;
  for (std::int32_t j = 0; j < p.ic; j += 4) weak.push_back(j);
  std::mt19937 rng(5);
  std::normal_distribution<float> normal;
  // Every such column of x becomes the weak one before it, but for noise of this size.
  const auto represent = [&](index_t first, index_t last, float noise) {
    std::vector<float> x = correlated_activations(p.ic, 3 * p.ic, 1);
    for (std::size_t row = 0; row < x.size(); row += static_cast<std::size_t>(p.ic)) {
      for (index_t j = first; j < last; ++j) {
        x[row + static_cast<std::size_t>(j)] =
            x[row + static_cast<std::size_t>(j / 4 * 4)] * (1.0F + noise * normal(rng));
      }
    }
    p.h = hessian_of(x, p.ic);
  };
  index_t first = 5;  // input columns that are represented
  index_t last = 6;
  SECTION("a column equal to a weak one") { represent(first, last, 0.0F); }
  SECTION("a column nearly equal to a weak one") { represent(first, last, 2e-4F); }
  SECTION("the last group") {
    first = 42;
    last = 64;
    represent(first, last, 0.0F);
  }
  SECTION("fewer tokens than weak columns") {
    first = 0;
    last = 64;
    p.h = correlated_hessian(p.ic, 10, 1);
  }
  for (const layer_method method : {layer_method::rtn, layer_method::optq}) {
    for (const zero_kind zero : {zero_kind::symmetric, zero_kind::integer, zero_kind::scaled}) {
      const quantized_matrix<> m =
          solve(p, options_of(method, 4, 32, zero, scalar_kind::half, weak));
      const auto codes = qeft_test::codes_of(m);
      const auto values = qeft_test::dequantized(m);
      const auto columns = columns_weak_last(m);
      const index_t dense = p.ic - static_cast<index_t>(weak.size());
      for (const int rounds : {1, 3}) {
        const refine_result r = refine(on_host(1), p.w, p.h, m, rounds);
        const auto codes_after = qeft_test::codes_of(r.matrix);
        const auto values_after = qeft_test::dequantized(r.matrix);
        for (index_t n = 0; n < p.oc; ++n) {
          for (index_t i = 0; i < dense; ++i) {
            const index_t column = columns[static_cast<std::size_t>(i)];
            if (column < first || column >= last) continue;
            CAPTURE(static_cast<int>(method), static_cast<int>(zero), rounds, n, column);
            const auto code = static_cast<std::size_t>(n * dense + i);
            CHECK(codes[code] == codes_after[code]);
            const auto at = static_cast<std::size_t>(n * p.ic + column);
            CHECK(std::abs(values_after[at] - values[at]) < 0.006F);  // a step
          }
          for (index_t g = 0; g < m.descriptor().groups(); ++g) {
            const auto begin = columns.begin() + g * 32;
            const auto end = columns.begin() + std::min(dense, (g + 1) * 32);
            if (*begin < first || *(end - 1) >= last) continue;
            CHECK(r.matrix.read_params(n, g).scale_bits == m.read_params(n, g).scale_bits);
            CHECK(r.matrix.read_params(n, g).zero == m.read_params(n, g).zero);
          }
        }
      }
    }
  }
}

TEST_CASE("degenerate layers and Hessians give no NaN and no more error") {
  const auto check = [](const problem& p, const layer_options& o) {
    const quantized_matrix<> m = solve(p, o);
    const refine_result r = refine(on_host(1), p.w, p.h, m, 2);
    const VectorXd before = row_errors(p, m);
    const VectorXd after = row_errors(p, r.matrix);
    CHECK(after.allFinite());
    CHECK((after.array() <= before.array() * (1.0 + 1e-12)).all());
    CHECK(std::isfinite(r.after));
    for (const float x : qeft_test::dequantized(r.matrix)) REQUIRE(std::isfinite(x));
    return r;
  };
  const auto plain = [](zero_kind zero, std::vector<std::int32_t> weak) {
    return options_of(layer_method::rtn, 4, 32, zero, scalar_kind::half, std::move(weak));
  };
  for (const zero_kind zero : {zero_kind::symmetric, zero_kind::integer, zero_kind::scaled}) {
    CAPTURE(static_cast<int>(zero));
    const problem p = make_problem(4, 65);
    SECTION("a Hessian of zeros") {
      problem q = p;
      std::fill(q.h.begin(), q.h.end(), 0.0F);
      const layer_options o = plain(zero, {5, 34});
      CHECK(same_bytes(check(q, o).matrix, solve(q, o)));
    }
    SECTION("a Hessian of ones") {
      problem q = p;
      std::fill(q.h.begin(), q.h.end(), 1.0F);
      check(q, plain(zero, {}));
      check(q, plain(zero, {5, 34}));
    }
    SECTION("fewer tokens than channels") {
      problem q = p;
      q.h = correlated_hessian(p.ic, 3, 9);
      check(q, plain(zero, {}));
      check(q, plain(zero, {5, 34, 63}));
    }
    SECTION("constant groups and rows of zeros") {
      problem q = p;
      for (std::size_t i = 0; i < q.w.size(); ++i) q.w[i] = i < 130 ? 0.0F : 0.5F;
      check(q, plain(zero, {}));
      check(q, plain(zero, {5, 34}));
    }
    SECTION("all columns weak, and a group of one column") {
      std::vector<std::int32_t> all;
      for (std::int32_t j = 0; j < p.ic; ++j) all.push_back(j);
      check(p, plain(zero, all));
      all.pop_back();
      check(p, plain(zero, all));
      check(p, plain(zero, {}));
    }
    SECTION("the ends of FP32") {
      for (const float size : {1e-38F, 1e-30F, 1e30F, 1e34F}) {
        problem q = p;
        const float largest = *std::max_element(q.h.begin(), q.h.end());
        for (float& x : q.h) x = x / largest * size;
        const refine_result r = check(q, plain(zero, {5, 34}));
        CHECK(r.after < 0.9 * r.before);
      }
      problem q = p;
      for (float& x : q.w) x *= 1e37F;
      layer_options o = plain(zero, {5, 34});
      o.scalar = scalar_kind::bf16;
      const refine_result r = check(q, o);
      CHECK(r.after < r.before);
    }
  }
}

TEST_CASE("what refine refuses") {
  const problem p = make_problem(3, 40);
  const quantized_matrix<> m = solve(
      p, options_of(layer_method::rtn, 4, 32, zero_kind::integer, scalar_kind::half, {5, 34}));
  using qeft_test::throws_with;
  CHECK(throws_with(errc::invalid_argument, {"refine", "rounds is -1"},
                    [&] { refine(on_host(1), p.w, p.h, m, -1); }));
  CHECK(throws_with(errc::invalid_argument, {"refine", "w has 40", "3 x 40"}, [&] {
    refine(on_host(1), {p.w.data(), 40}, p.h, m, 1);
  }));
  CHECK(throws_with(errc::invalid_argument, {"refine", "Hessian has 40", "40 x 40"}, [&] {
    refine(on_host(1), p.w, {p.h.data(), 40}, m, 1);
  }));
  const auto with_h = [&](std::size_t at, float value) {
    return [&p, &m, at, value] {
      std::vector<float> h = p.h;
      h[at] = value;
      refine(on_host(1), p.w, h, m, 1);
    };
  };
  CHECK(throws_with(errc::not_finite, {"refine", "row 2, column 1"},
                    with_h(81, std::numeric_limits<float>::infinity())));
  CHECK(throws_with(errc::invalid_argument, {"refine", "not symmetric"}, with_h(1, 1e6F)));
  CHECK(throws_with(errc::not_positive_definite, {"refine", "H[1][1]"}, with_h(41, -1.0F)));
  std::vector<float> w = p.w;
  w[41] = std::numeric_limits<float>::quiet_NaN();
  CHECK(throws_with(errc::not_finite, {"refine", "row 1, column 1"},
                    [&] { refine(on_host(1), w, p.h, m, 1); }));
}
