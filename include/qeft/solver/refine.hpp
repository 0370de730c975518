// SPDX-License-Identifier: Apache-2.0
// Refinement of a quantised layer: group parameters, codes and weak columns in turn, each the best
// for the others (METHOD section 9).
#pragma once

#include <Eigen/Cholesky>
#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>
#include <vector>

#include "qeft/container/pack.hpp"
#include "qeft/container/quantized_matrix.hpp"
#include "qeft/core/host_buffer.hpp"
#include "qeft/core/text.hpp"
#include "qeft/solver/group_search.hpp"
#include "qeft/solver/matrix_ops.hpp"
#include "qeft/solver/reduced_hessian.hpp"

namespace qeft::solver {
inline namespace QEFT_TARGET {

struct refine_result {
  quantized_matrix<> matrix;
  double before = 0.0;  // E = tr(dW H dW^T) of the layer as given
  double after = 0.0;   // and as returned
};

namespace detail {

/// Input columns of the dense columns, then of the weak ones: (IC).
inline std::vector<index_t> columns_weak_last(const quantized_matrix<>& m) {
  const matrix_descriptor& d = m.descriptor();
  const layout::extent e = d.extent();
  std::vector<index_t> columns;
  columns.reserve(static_cast<std::size_t>(d.in_channels));
  visit_weak(d, m.weak_index().data(), [&](auto weak) {
    for (index_t i = 0; i < e.dense; ++i) columns.push_back(weak.dense_column(i, d.in_channels));
    for (index_t j = 0; j < e.weak; ++j) columns.push_back(weak.weak_column(j, d.in_channels));
  });
  return columns;
}

/// Rounds x, where |factor (x - y)|^2 is least at y = x: one unknown after another, from the last
/// to the first, each at the value that is best for those that are rounded already.
/// @param factor (n, n) upper triangular
/// @param round  value of unknown j that can be stored: round(j, wanted value)
template <class Round>
void round_in_turn(const row_major_matrix<double>& factor, Eigen::VectorXd& x, const Round& round) {
  Eigen::VectorXd moved(x.size());
  for (index_t j = x.size() - 1; j >= 0; --j) {
    const index_t later = x.size() - 1 - j;
    const double carried = factor.row(j).tail(later).dot(moved.tail(later)) / factor(j, j);
    const double rounded = round(j, x[j] - carried);
    moved[j] = rounded - x[j];
    x[j] = rounded;
  }
}

/// dw_n H dw_n^T of every row n of dw (rows, n), in double. Reads the blocks of H on and above the
/// diagonal.
inline Eigen::VectorXd row_errors(const row_major_matrix<double>& dw, const float* h) {
  constexpr index_t block = 256;
  const index_t n = dw.cols();
  Eigen::VectorXd sum = Eigen::VectorXd::Zero(dw.rows());
  row_major_matrix<double> tile;
  row_major_matrix<double> product;
  for (index_t c = 0; c < n; c += block) {
    const index_t cols = std::min(block, n - c);
    product.setZero(dw.rows(), cols);
    for (index_t r = 0; r < c; r += block) {
      tile = map_rows(h + r * n + c, block, cols, n).template cast<double>();
      product.noalias() += dw.middleCols(r, block) * tile;
    }
    product *= 2.0;
    tile = map_rows(h + c * n + c, cols, cols, n).template cast<double>();
    product.noalias() += dw.middleCols(c, cols) * tile;
    sum += product.cwiseProduct(dw.middleCols(c, cols)).rowwise().sum();
  }
  return sum;
}

/// Least squares for the group parameters of a row: step^T matrix step - 2 right^T step is by how
/// much E, times reduced_hessian::scale, changes when they move by `step` and the weak columns
/// follow. Unknowns: the scaled zeros of all groups if the format has them, then the scales.
struct normal_equations {
  Eigen::MatrixXd matrix;
  Eigen::VectorXd right;
  Eigen::VectorXd noise;  // what the diagonal of `matrix` may be by rounding alone
};

/// Refines tiles of rows; rows are independent.
template <class Scalar>
class refiner {
 public:
  /// Some rows as stored: weight = scale * level + offset.
  struct tile_values {
    index_t first_row = 0;
    row_major_matrix<float> levels;    // (rows, dense)
    std::vector<group_choice> params;  // (rows, groups)
    row_major_matrix<float> weak;      // (rows, k)

    index_t rows() const { return levels.rows(); }
  };

  /// @param w (OC, IC)  @param h (IC, IC)
  refiner(const on_host& exec, span<const float> w, span<const float> h, quantized_matrix<>& m)
      : w_(w.data()),
        h_(h.data()),
        m_(m),
        e_(m.descriptor().extent()),
        n_(m.descriptor().in_channels),
        format_{m.descriptor().bits, m.descriptor().zero, m.descriptor().scalar},
        group_size_(m.descriptor().columns_per_group()),
        first_scale_(format_.zero == zero_kind::scaled ? e_.groups : 0),
        columns_(columns_weak_last(m)),
        reduced_(reduce_hessian(exec, h, columns_, e_.dense)) {
    if (format_.zero == zero_kind::scaled) sum_groups();
  }

  /// Refines all rows in `rounds` rounds. Returns E before and after.
  std::pair<double, double> run(const on_host& exec, int rounds) const {
    constexpr index_t tile_rows = 32;
    const index_t tiles = ceil_div(e_.out_channels, tile_rows);
    std::vector<std::pair<double, double>> errors(static_cast<std::size_t>(tiles));
    exec.parallel_for(tiles, 1, [&](index_t begin, index_t end) {
      for (index_t t = begin; t < end; ++t) {
        const index_t first = t * tile_rows;
        errors[static_cast<std::size_t>(t)] =
            refine_tile(load(first, std::min(tile_rows, e_.out_channels - first)), rounds);
      }
    });
    std::pair<double, double> sum{0.0, 0.0};
    for (const auto& [before, after] : errors) {
      sum.first += before;
      sum.second += after;
    }
    return sum;
  }

  tile_values load(index_t first_row, index_t rows) const {
    tile_values t;
    t.first_row = first_row;
    t.levels.resize(rows, e_.dense);
    t.weak.resize(rows, e_.weak);
    t.params.reserve(static_cast<std::size_t>(rows * e_.groups));
    std::vector<std::uint8_t> codes(static_cast<std::size_t>(e_.dense));
    for (index_t r = 0; r < rows; ++r) {
      const index_t n = first_row + r;
      visit_bits(format_.bits, [&](auto bits) {
        unpack_array<bits>(m_.code_words() + n * layout::row_packed::row_words<bits>(e_), e_.dense,
                           codes.data());
      });
      for (index_t g = 0; g < e_.groups; ++g) {
        const auto [scale, zero] = m_.read_params(n, g);
        t.params.push_back(choice(scale, zero));
        for (index_t i = group_begin(g); i < group_end(g); ++i) {
          t.levels(r, i) = t.params.back().quantizer.lower +
                           static_cast<float>(codes[static_cast<std::size_t>(i)]);
        }
      }
      for (index_t j = 0; j < e_.weak; ++j) {
        t.weak(r, j) = to_float(Scalar{m_.read_weak(n, j)});
      }
    }
    return t;
  }

  /// W - dequantised of the dense columns: (rows, dense).
  row_major_matrix<float> dense_errors(const tile_values& t) const {
    row_major_matrix<float> dw(t.rows(), e_.dense);
    for (index_t r = 0; r < t.rows(); ++r) {
      for (index_t g = 0; g < e_.groups; ++g) {
        const group_quantizer& q = quantizer(t, r, g);
        for (index_t i = group_begin(g); i < group_end(g); ++i) {
          dw(r, i) = original(t, r, i) - q.value(t.levels(r, i));
        }
      }
    }
    return dw;
  }

  /// The system of every row.
  std::vector<normal_equations> equations(const tile_values& t) const {
    const index_t unknowns = first_scale_ + e_.groups;
    const row_major_matrix<float> dw = dense_errors(t);
    std::vector<normal_equations> out(static_cast<std::size_t>(t.rows()));
    for (normal_equations& eq : out) {
      eq.matrix.resize(unknowns, unknowns);
      eq.right.resize(unknowns);
      eq.noise.resize(unknowns);
    }
    row_major_matrix<float> product;  // the levels of group g times H
    for (index_t g = 0; g < e_.groups; ++g) {
      const index_t begin = group_begin(g);
      const index_t count = group_end(g) - begin;
      product.noalias() = t.levels.middleCols(begin, count) * hessian_rows(begin, count);
      for (index_t r = 0; r < t.rows(); ++r) {
        normal_equations& eq = out[static_cast<std::size_t>(r)];
        eq.right[first_scale_ + g] = dot(product.row(r), dw.row(r));
        eq.noise[first_scale_ + g] =
            dot(group_of(t.levels, r, g).cwiseAbs2(), group_of(reduced_.noise, 0, g));
        for (index_t other = 0; other < e_.groups; ++other) {
          const auto p = group_of(product, r, other);
          eq.matrix(first_scale_ + g, first_scale_ + other) = dot(p, group_of(t.levels, r, other));
          if (first_scale_ == 0) continue;
          const double mixed = p.template cast<double>().sum();
          eq.matrix(first_scale_ + g, other) = mixed;
          eq.matrix(other, first_scale_ + g) = mixed;
        }
      }
    }
    if (first_scale_ == 0) return out;
    for (index_t r = 0; r < t.rows(); ++r) {
      normal_equations& eq = out[static_cast<std::size_t>(r)];
      eq.matrix.topLeftCorner(e_.groups, e_.groups) = group_group_;
      for (index_t g = 0; g < e_.groups; ++g) {
        eq.right[g] = dot(group_sums_.row(g), dw.row(r));
        eq.noise[g] = group_of(reduced_.noise, 0, g).template cast<double>().sum();
      }
    }
    return out;
  }

  /// Moves the parameters of row r to the solution, rounded as stored, if E falls by it.
  void solve_params(tile_values& t, index_t r, normal_equations eq) const {
    for (index_t j = 0; j < eq.right.size(); ++j) {
      if (eq.matrix(j, j) > eq.noise[j]) continue;
      eq.matrix.row(j).setZero();  // E does not depend on it
      eq.matrix.col(j).setZero();
      eq.matrix(j, j) = 1.0;
      eq.right[j] = 0.0;
    }
    Eigen::MatrixXd damped = eq.matrix;
    damped.diagonal() *= 1.0 + refine_ridge;
    const Eigen::LLT<Eigen::MatrixXd> llt(damped);
    if (llt.info() != Eigen::Success) return;
    const Eigen::VectorXd start = unknowns(t, r);
    Eigen::VectorXd x = start + llt.solve(eq.right);
    if (!x.allFinite()) return;
    round_in_turn(llt.matrixU(), x, [&](index_t j, double wanted) {
      if (j < first_scale_) return static_cast<double>(to_float(store<Scalar>(wanted)));
      return wanted > 0.0 ? static_cast<double>(to_float(store_scale<Scalar>(wanted))) : start[j];
    });
    const Eigen::VectorXd step = x - start;
    if (!(step.dot(eq.matrix * step) < 2.0 * step.dot(eq.right))) return;
    for (index_t g = 0; g < e_.groups; ++g) {
      group_choice& p = params(t, r, g);
      const unsigned zero = first_scale_ == 0 ? p.zero : store<Scalar>(x[g]).bits;
      p = choice(store<Scalar>(x[first_scale_ + g]).bits, zero);
    }
  }

  /// Coordinate descent: every code in turn moves to the best for all others.
  void move_codes(tile_values& t) const {
    row_major_matrix<float> gradient(t.rows(), e_.dense);  // dW H
    gradient.noalias() = dense_errors(t) * hessian_rows(0, e_.dense);
    constexpr int sweeps = 2;
    for (index_t r = 0; r < t.rows(); ++r) {
      for (int s = 0; s < sweeps; ++s) sweep(t, r, gradient.row(r).data());
    }
  }

  /// The best weak columns for the dense ones, rounded as stored.
  void solve_weak(tile_values& t) const {
    if (e_.weak == 0) return;
    const row_major_matrix<double> right =
        dense_errors(t).template cast<double>() * reduced_.dense_weak;
    const auto factor = reduced_.weak_factor.template triangularView<Eigen::Upper>();
    for (index_t r = 0; r < t.rows(); ++r) {
      Eigen::VectorXd x = factor.transpose().solve(right.row(r).transpose());
      x = factor.solve(x).eval();
      for (index_t j = 0; j < e_.weak; ++j) {
        x[j] += static_cast<double>(alive(j) ? original(t, r, e_.dense + j) : t.weak(r, j));
      }
      round_in_turn(reduced_.weak_factor, x, [&](index_t j, double wanted) {
        return static_cast<double>(alive(j) ? to_float(store<Scalar>(wanted)) : t.weak(r, j));
      });
      t.weak.row(r) = x.transpose().cast<float>();
    }
  }

  /// E of every row as stored.
  Eigen::VectorXd errors(const tile_values& t) const {
    row_major_matrix<double> dw(t.rows(), n_);
    for (index_t r = 0; r < t.rows(); ++r) {
      const auto set = [&](index_t i, float value) {
        dw(r, columns_[static_cast<std::size_t>(i)]) =
            static_cast<double>(original(t, r, i)) - static_cast<double>(value);
      };
      for (index_t g = 0; g < e_.groups; ++g) {
        const group_quantizer& q = quantizer(t, r, g);
        for (index_t i = group_begin(g); i < group_end(g); ++i) set(i, q.value(t.levels(r, i)));
      }
      for (index_t j = 0; j < e_.weak; ++j) set(e_.dense + j, t.weak(r, j));
    }
    return row_errors(dw, h_);
  }

 private:
  /// The rows of H that every sum over a group adds up, for scaled zeros.
  void sum_groups() {
    group_sums_.resize(e_.groups, e_.dense);
    group_group_.resize(e_.groups, e_.groups);
    for (index_t g = 0; g < e_.groups; ++g) {
      const index_t begin = group_begin(g);
      group_sums_.row(g) = hessian_rows(begin, group_end(g) - begin).colwise().sum();
      for (index_t other = 0; other < e_.groups; ++other) {
        group_group_(g, other) = group_of(group_sums_, g, other).template cast<double>().sum();
      }
    }
  }

  std::pair<double, double> refine_tile(tile_values best, int rounds) const {
    Eigen::VectorXd least = errors(best);
    const double before = least.sum();
    for (int round = 0; round < rounds; ++round) {
      tile_values trial = best;
      const std::vector<normal_equations> systems = equations(trial);
      for (index_t r = 0; r < trial.rows(); ++r) {
        solve_params(trial, r, systems[static_cast<std::size_t>(r)]);
      }
      move_codes(trial);
      solve_weak(trial);
      if (!keep_better(best, least, trial)) break;
    }
    return {before, least.sum()};
  }

  /// Stores the rows of `trial` with less E than in `best`. Returns whether there are any.
  bool keep_better(tile_values& best, Eigen::VectorXd& least, const tile_values& trial) const {
    const Eigen::VectorXd e = errors(trial);
    bool any = false;
    for (index_t r = 0; r < trial.rows(); ++r) {
      if (!(e[r] < least[r])) continue;
      any = true;
      least[r] = e[r];
      best.levels.row(r) = trial.levels.row(r);
      best.weak.row(r) = trial.weak.row(r);
      for (index_t g = 0; g < e_.groups; ++g) params(best, r, g) = params(trial, r, g);
      store_row(best, r);
    }
    return any;
  }

  /// Integer zero points, which share words with those of other rows, never change.
  void store_row(const tile_values& t, index_t r) const {
    const index_t n = t.first_row + r;
    std::vector<std::uint8_t> codes(static_cast<std::size_t>(e_.dense));
    for (index_t g = 0; g < e_.groups; ++g) {
      const group_choice& p = t.params[static_cast<std::size_t>(r * e_.groups + g)];
      if (format_.zero == zero_kind::integer) {
        m_.scale_scalars()[layout::row_packed::scale_index(e_, n, g)] = p.scale_bits;
      } else {
        m_.write_params(n, g, p.scale_bits, p.zero);
      }
      for (index_t i = group_begin(g); i < group_end(g); ++i) {
        codes[static_cast<std::size_t>(i)] = p.quantizer.code(t.levels(r, i));
      }
    }
    visit_bits(format_.bits, [&](auto bits) {
      pack_array<bits>(codes.data(), e_.dense,
                       m_.code_words() + n * layout::row_packed::row_words<bits>(e_));
    });
    for (index_t j = 0; j < e_.weak; ++j) {
      m_.write_weak(n, j, from_float<Scalar>(t.weak(r, j)).bits);
    }
  }

  /// @param gradient (dense) row r of dW H, kept up to date
  void sweep(tile_values& t, index_t r, float* gradient) const {
    for (index_t g = 0; g < e_.groups; ++g) {
      const group_quantizer q = quantizer(t, r, g);
      for (index_t i = group_begin(g); i < group_end(g); ++i) {
        const float curvature = reduced_.curvature[static_cast<std::size_t>(i)];
        if (!(curvature > 0.0F)) continue;
        // Less than half a step: it is the best already.
        if (!(std::abs(gradient[i]) > 0.5F * q.scale * curvature)) continue;
        float& level = t.levels(r, i);
        const float value = q.value(level);
        const float better = q.level(value + gradient[i] / curvature);
        const float step = q.value(better) - value;
        if (!(step * (2.0F * gradient[i] - step * curvature) > 0.0F)) continue;
        level = better;
        const float* h = reduced_.dense.data() + i * e_.dense;
        for (index_t c = 0; c < e_.dense; ++c) gradient[c] -= step * h[c];
      }
    }
  }

  Eigen::VectorXd unknowns(const tile_values& t, index_t r) const {
    Eigen::VectorXd x(first_scale_ + e_.groups);
    for (index_t g = 0; g < e_.groups; ++g) {
      x[first_scale_ + g] = static_cast<double>(quantizer(t, r, g).scale);
      if (first_scale_ != 0) x[g] = static_cast<double>(quantizer(t, r, g).offset);
    }
    return x;
  }

  group_choice choice(std::uint16_t scale_bits, unsigned zero) const {
    return {scale_bits, static_cast<std::uint16_t>(zero),
            quantizer_of(format_, Scalar{scale_bits}, zero)};
  }
  group_choice& params(tile_values& t, index_t r, index_t g) const {
    return t.params[static_cast<std::size_t>(r * e_.groups + g)];
  }
  const group_choice& params(const tile_values& t, index_t r, index_t g) const {
    return t.params[static_cast<std::size_t>(r * e_.groups + g)];
  }
  const group_quantizer& quantizer(const tile_values& t, index_t r, index_t g) const {
    return params(t, r, g).quantizer;
  }
  /// The weight of dense column i, or of weak column i - dense.
  float original(const tile_values& t, index_t r, index_t i) const {
    return w_[(t.first_row + r) * n_ + columns_[static_cast<std::size_t>(i)]];
  }
  bool alive(index_t j) const { return reduced_.weak_alive[static_cast<std::size_t>(j)]; }
  index_t group_begin(index_t g) const { return g * group_size_; }
  index_t group_end(index_t g) const { return std::min(e_.dense, (g + 1) * group_size_); }
  auto hessian_rows(index_t begin, index_t count) const {
    return map_rows(reduced_.dense.data() + begin * e_.dense, count, e_.dense, e_.dense);
  }
  template <class Matrix>
  auto group_of(const Matrix& x, index_t r, index_t g) const {
    return x.row(r).segment(group_begin(g), group_end(g) - group_begin(g));
  }
  template <class A, class B>
  static double dot(const A& a, const B& b) {
    return a.template cast<double>().dot(b.template cast<double>());
  }

  const float* w_;
  const float* h_;
  quantized_matrix<>& m_;
  layout::extent e_;
  index_t n_;  // IC
  group_format format_;
  index_t group_size_;
  index_t first_scale_;  // the first scale among the unknowns
  std::vector<index_t> columns_;
  reduced_hessian reduced_;
  row_major_matrix<float> group_sums_;    // (groups, dense)
  row_major_matrix<double> group_group_;  // (groups, groups)
};

inline void check_refine(const on_host& exec, span<const float> w, span<const float> h,
                         const matrix_descriptor& d, int rounds) {
  check_matrix(exec, w, d.out_channels, d.in_channels, "refine: w");
  check_matrix(exec, h, d.in_channels, d.in_channels, "refine: the Hessian");
  if (rounds < 0) {
    fail(errc::invalid_argument, text("refine: rounds is ", rounds, ", but must not be negative"));
  }
  check_symmetric(exec, h.data(), d.in_channels, "refine: the Hessian");
}

}  // namespace detail

/// Lowers E = tr(dW H dW^T) of a quantised layer at the same storage, whatever solver it is from.
/// One round of a row: (1) with the codes as they are, scales, scaled zeros and weak columns move
/// to the least E (least squares), rounded as they are stored; (2) with scales and zeros as they
/// are, one code after another moves to the best for all others, twice; (3) the weak columns follow
/// once more. Integer zero points stay, and so do codes and weak columns of dead inputs
/// (H_jj = 0). In (1) and (2) weak columns are eliminated: the steps minimise what is left of E
/// when they follow. Parameters and codes that change it by no more than rounding stay too.
///
/// E is of `h` as it is given. An undamped Hessian is overfitted where its tokens are few (at 1.25
/// per input channel E on text of the same kind rose by 4 %, from four on it fell) and where other
/// text is met; damped_hessian makes one that is not.
///
/// A row's round counts only if E of that row, computed in double from what would be stored, falls:
/// more rounds never raise E of any row. The result does not depend on the number of threads.
///
/// What is not finite in `w` or `h` is an error that names row and column, and a Hessian that is
/// not positive semidefinite may be errc::not_positive_definite.
/// @param w (out_channels, in_channels), row-major: what the layer should be
/// @param h (in_channels, in_channels), symmetric
inline refine_result refine(const on_host& exec, span<const float> w, span<const float> h,
                            quantized_matrix<> m, int rounds) {
  detail::check_refine(exec, w, h, m.descriptor(), rounds);
  refine_result result;
  result.matrix = std::move(m);
  std::tie(result.before, result.after) =
      detail::visit_scalar(result.matrix.descriptor().scalar, [&](auto scalar) {
        return detail::refiner<decltype(scalar)>(exec, w, h, result.matrix).run(exec, rounds);
      });
  return result;
}

}  // namespace QEFT_TARGET
}  // namespace qeft::solver
