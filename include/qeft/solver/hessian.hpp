// SPDX-License-Identifier: Apache-2.0
// The Hessian of a layer's squared output error, and the cross moments of asymmetric calibration,
// accumulated sample by sample (METHOD sections 2 and 9).
#pragma once

#include <vector>

#include "qeft/core/checked_product.hpp"
#include "qeft/core/host_buffer.hpp"
#include "qeft/core/text.hpp"
#include "qeft/solver/matrix_ops.hpp"

namespace qeft::solver {
inline namespace QEFT_TARGET {

namespace detail {
/// What all accumulators ask of a sample; `who` names the function, `what` the array.
inline void check_sample(const on_host& exec, const float* x, index_t tokens, index_t channels,
                         const char* who, const char* what = "x (tokens x in_channels)") {
  if (tokens < 0) {
    fail(errc::invalid_argument, text(who, ": tokens is ", tokens, ", but must not be negative"));
  }
  check_finite(exec, x, tokens, channels, text(who, ": ", what));
}

inline constexpr index_t moment_tile = 192;  // a few tiles per thread even at 576 channels
}  // namespace detail

/// diag(H) alone, for the choice of weak columns before any layer is quantised: (in_channels) sums
/// in double.
class diagonal_accumulator {
 public:
  explicit diagonal_accumulator(index_t in_channels)
      : sum_(static_cast<std::size_t>(
            checked_product(in_channels, 1, "diagonal_accumulator: in_channels"))) {}

  /// Adds a sample: x is (tokens, in_channels), row-major. Channels are summed over the tokens in
  /// order, so results do not depend on the number of threads. Throws not_finite naming token and
  /// channel; the sum is then unchanged.
  void add(const on_host& exec, const float* x, index_t tokens) {
    const auto n = static_cast<index_t>(sum_.size());
    detail::check_sample(exec, x, tokens, n, "diagonal_accumulator::add");
    exec.parallel_for(n, 64, [&](index_t begin, index_t end) {
      for (index_t t = 0; t < tokens; ++t) {
        const float* row = x + t * n;
        for (index_t j = begin; j < end; ++j) {
          const auto v = static_cast<double>(row[j]);
          sum_[static_cast<std::size_t>(j)] += v * v;
        }
      }
    });
    tokens_ += tokens;
  }

  /// As hessian_accumulator::diagonal.
  std::vector<double> diagonal() const {
    std::vector<double> d = sum_;
    for (double& v : d) v *= tokens_ == 0 ? 0.0 : 2.0 / static_cast<double>(tokens_);
    return d;
  }

 private:
  index_t tokens_ = 0;
  std::vector<double> sum_;
};

/// H = 2 X X^T / T over T tokens: the mean over tokens, so that it does not depend on how tokens
/// are cut into samples. Only the sample being added is resident.
///
/// Sums are FP32: their error, about 1e-6 of sqrt(H_ii H_jj) after 65,536 tokens, is far below the
/// damping that every use of H adds, and double would cost twice the memory and time. Each tile of
/// H is one task and takes the tokens in order, so results do not depend on the number of threads.
class hessian_accumulator {
 public:
  explicit hessian_accumulator(index_t in_channels) : n_(in_channels) {
    if (in_channels < 1) {
      fail(errc::invalid_argument,
           text("hessian_accumulator: in_channels is ", in_channels, ", but must be positive"));
    }
    sum_.resize(static_cast<std::size_t>(checked_product(n_, n_, "hessian_accumulator")));
  }

  index_t in_channels() const noexcept { return n_; }
  /// Tokens added so far.
  index_t tokens() const noexcept { return tokens_; }

  /// Adds a sample: x is (tokens, in_channels), row-major. Throws not_finite naming token and
  /// channel; the sum is then unchanged.
  void add(const on_host& exec, const float* x, index_t tokens) {
    detail::check_sample(exec, x, tokens, n_, "hessian_accumulator::add");
    if (tokens == 0) return;
    const index_t blocks = ceil_div(n_, tile);
    exec.parallel_for(blocks * (blocks + 1) / 2, 1, [&](index_t begin, index_t end) {
      for (index_t t = begin; t < end; ++t) {
        // Task t is tile (row, col) of the upper triangle, counted column by column.
        index_t col = 0;
        while ((col + 1) * (col + 2) / 2 <= t) ++col;
        const index_t row = t - col * (col + 1) / 2;
        const index_t r = row * tile;
        const index_t c = col * tile;
        const index_t rows = std::min(tile, n_ - r);
        const index_t cols = std::min(tile, n_ - c);
        map_rows(sum_.data() + r * n_ + c, rows, cols, n_).noalias() +=
            map_rows(x + r, tokens, rows, n_).transpose() * map_rows(x + c, tokens, cols, n_);
      }
    });
    tokens_ += tokens;
  }

  /// diag(H) so far: the sensitivity of QEFT's global selection.
  std::vector<double> diagonal() const {
    std::vector<double> d(static_cast<std::size_t>(n_));
    for (index_t j = 0; j < n_; ++j) {
      d[static_cast<std::size_t>(j)] =
          tokens_ == 0 ? 0.0
                       : 2.0 * static_cast<double>(sum_[static_cast<std::size_t>(j * (n_ + 1))]) /
                             static_cast<double>(tokens_);
    }
    return d;
  }

  /// Moves H out, (in_channels, in_channels), symmetric; zero without tokens. The accumulator is
  /// spent.
  host_buffer<float> finish() && {
    const double factor = tokens_ == 0 ? 0.0 : 2.0 / static_cast<double>(tokens_);
    for (index_t r = 0; r < n_; ++r) {
      for (index_t c = r; c < n_; ++c) {
        const auto upper = static_cast<std::size_t>(r * n_ + c);
        const auto h = static_cast<float>(static_cast<double>(sum_[upper]) * factor);
        if (!std::isfinite(h)) {
          fail(errc::not_finite,
               text("hessian_accumulator::finish: H overflows at channels ", r, " and ", c));
        }
        sum_[upper] = h;
        sum_[static_cast<std::size_t>(c * n_ + r)] = h;
      }
    }
    return std::move(sum_);
  }

 private:
  static constexpr index_t tile = detail::moment_tile;

  index_t n_;
  index_t tokens_ = 0;
  host_buffer<float> sum_;  // upper tiles of X X^T
};

/// 2 A B^T / T over T tokens, for two arrays that are given token by token side by side. With
/// a = x_fp - x_q, the difference between a layer's inputs in the full-precision and the quantised
/// model, and b = x_q this is D of METHOD section 9; with a = h_fp - h_q, that of the residual
/// stream, it is R. Sums as hessian_accumulator's: FP32, one task per tile, tokens in order.
class cross_accumulator {
 public:
  /// @param rows channels of a  @param cols channels of b
  cross_accumulator(index_t rows, index_t cols) : rows_(rows), cols_(cols) {
    if (rows < 1 || cols < 1) {
      fail(errc::invalid_argument, text("cross_accumulator: rows is ", rows, " and cols ", cols,
                                        ", but both must be positive"));
    }
    sum_.resize(static_cast<std::size_t>(checked_product(rows, cols, "cross_accumulator")));
  }

  /// Adds a sample: a is (tokens, rows) and b (tokens, cols), both row-major. Throws not_finite
  /// naming token and channel; the sum is then unchanged.
  void add(const on_host& exec, const float* a, const float* b, index_t tokens) {
    detail::check_sample(exec, a, tokens, rows_, "cross_accumulator::add", "a (tokens x rows)");
    detail::check_sample(exec, b, tokens, cols_, "cross_accumulator::add", "b (tokens x cols)");
    if (tokens == 0) return;
    const index_t tiles_across = ceil_div(cols_, tile);
    exec.parallel_for(ceil_div(rows_, tile) * tiles_across, 1, [&](index_t begin, index_t end) {
      for (index_t t = begin; t < end; ++t) {
        const index_t r = t / tiles_across * tile;
        const index_t c = t % tiles_across * tile;
        const index_t rows = std::min(tile, rows_ - r);
        const index_t cols = std::min(tile, cols_ - c);
        map_rows(sum_.data() + r * cols_ + c, rows, cols, cols_).noalias() +=
            map_rows(a + r, tokens, rows, rows_).transpose() * map_rows(b + c, tokens, cols, cols_);
      }
    });
    tokens_ += tokens;
  }

  /// Moves the moment out, (rows, cols) row-major; zero without tokens. The accumulator is spent.
  host_buffer<float> finish() && {
    const double factor = tokens_ == 0 ? 0.0 : 2.0 / static_cast<double>(tokens_);
    for (index_t i = 0; i < rows_ * cols_; ++i) {
      float& sum = sum_[static_cast<std::size_t>(i)];
      sum = static_cast<float>(static_cast<double>(sum) * factor);
      if (!std::isfinite(sum)) {
        fail(errc::not_finite, text("cross_accumulator::finish: the moment overflows at row ",
                                    i / cols_, ", column ", i % cols_));
      }
    }
    return std::move(sum_);
  }

 private:
  static constexpr index_t tile = detail::moment_tile;

  index_t rows_;
  index_t cols_;
  index_t tokens_ = 0;
  host_buffer<float> sum_;  // A B^T
};

}  // namespace QEFT_TARGET
}  // namespace qeft::solver
