// SPDX-License-Identifier: Apache-2.0
// The 16-bit type in which a layer's scales, scaled zero points and weak columns lose least.
#pragma once

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "qeft/core/text.hpp"
#include "qeft/solver/quantize_layer.hpp"

namespace qeft::solver {
inline namespace QEFT_TARGET {

/// A layer whose weights do not exceed this fits `scalar`, whatever its format: a quarter of what
/// would fit as it is, since compensation makes weights larger.
constexpr float largest_weight(scalar_kind scalar) noexcept {
  return scalar == scalar_kind::half ? 0x1p14F : 0x1p117F;
}

namespace detail {

/// Of w, (rows, cols): the largest magnitude.
inline float largest_magnitude(span<const float> w) noexcept {
  float largest = 0.0F;
  for (const float x : w) largest = std::max(largest, std::abs(x));
  return largest;
}

/// Whether FP16 stores one of these columns less exactly than BF16 stores any number: with a
/// relative error above 2^-9.
inline bool half_loses_column(span<const float> w, index_t in_channels,
                              const std::vector<std::int32_t>& columns) {
  for (const std::int32_t c : columns) {
    double lost = 0.0;
    double whole = 0.0;
    for (index_t i = c; i < w.size(); i += in_channels) {
      const auto x = static_cast<double>(w[i]);
      const double e = x - static_cast<double>(to_float(from_float<half_bits>(w[i])));
      lost += e * e;
      whole += x * x;
    }
    if (lost > 0x1p-18 * whole) return true;
  }
  return false;
}

/// The rows in which a group's min-max scale lies below the normal numbers of FP16, one after
/// another.
inline std::vector<float> rows_of_small_scales(span<const float> w, index_t out_channels,
                                               index_t in_channels, const layer_options& o) {
  const matrix_descriptor d = describe(out_channels, in_channels, o);
  const index_t size = d.columns_per_group();
  std::vector<std::int32_t> columns = weak_last(in_channels, o.weak_columns).source();
  columns.resize(static_cast<std::size_t>(d.dense_columns()));
  std::vector<float> group;
  std::vector<float> rows;
  for (index_t n = 0; n < out_channels; ++n) {
    const span<const float> row(w.data() + n * in_channels, in_channels);
    for (index_t first = 0; first < d.dense_columns(); first += size) {
      group.clear();
      for (index_t i = first; i < std::min(first + size, d.dense_columns()); ++i) {
        group.push_back(row[columns[static_cast<std::size_t>(i)]]);
      }
      const double scale = weight_range(group).scale({o.bits, o.zero, scalar_kind::half}, 1, 1);
      if (scale > 0.0 && scale < 0x1p-14) {
        rows.insert(rows.end(), row.begin(), row.end());
        break;
      }
    }
  }
  return rows;
}

/// sum over rows of ||row - quantised row||^2 / ||row||^2 after min-max rounding.
inline double relative_row_error(const on_host& exec, span<const float> w, index_t in_channels,
                                 layer_options o) {
  o.method = layer_method::rtn;
  o.search.method = search_method::minmax;
  o.refine_rounds = 0;
  o.measure_error = false;
  const index_t rows = w.size() / in_channels;
  const layer_result trial = quantize_layer(exec, w, rows, in_channels, {}, o);
  std::vector<double> relative(static_cast<std::size_t>(rows));
  for_each_error_tile(exec, w, trial.matrix, 1, [&](index_t n, index_t, const float* dw) {
    const auto squares = [&](const float* x) {
      return map_rows(x, 1, in_channels, in_channels).template cast<double>().squaredNorm();
    };
    relative[static_cast<std::size_t>(n)] = squares(dw) / squares(w.data() + n * in_channels);
  });
  double sum = 0.0;
  for (const double r : relative) sum += r;
  return sum;
}

}  // namespace detail

/// FP16, which is the finer of the two, unless weights exceed largest_weight(half), FP16 would
/// store a weak column less exactly than BF16 does, or FP16 scales are so small (subnormal, or
/// zero) that the rows in question come out worse by 2.5 % than with BF16 scales. So the relative
/// error of a layer does not depend on the size of its weights.
/// @param w       (out_channels, in_channels), finite
/// @param options of the layer, its weak columns included; `scalar` is not used
/// @throws qeft::error for weights above largest_weight(bf16), which neither type is sure to hold
inline scalar_kind choose_scalar(const on_host& exec, span<const float> w, index_t out_channels,
                                 index_t in_channels, layer_options options) {
  check(options, out_channels, in_channels);
  if (w.size() != out_channels * in_channels) {
    fail(errc::invalid_argument,
         text("choose_scalar: w has ", w.size(), " elements, but must have ", out_channels, " x ",
              in_channels));
  }
  const float largest = detail::largest_magnitude(w);
  if (!(largest <= largest_weight(scalar_kind::bf16))) {
    fail(errc::not_finite, text("choose_scalar: a weight has magnitude ", largest,
                                ", but group scales hold up to 2^117, in BF16"));
  }
  if (largest > largest_weight(scalar_kind::half)) return scalar_kind::bf16;
  if (detail::half_loses_column(w, in_channels, options.weak_columns)) return scalar_kind::bf16;

  const std::vector<float> rows =
      detail::rows_of_small_scales(w, out_channels, in_channels, options);
  if (rows.empty()) return scalar_kind::half;
  const auto error = [&](scalar_kind scalar) {
    options.scalar = scalar;
    return detail::relative_row_error(exec, rows, in_channels, options);
  };
  const double half = error(scalar_kind::half);
  return half > 1.05 * error(scalar_kind::bf16) ? scalar_kind::bf16 : scalar_kind::half;
}

}  // namespace QEFT_TARGET
}  // namespace qeft::solver
