// SPDX-License-Identifier: Apache-2.0
// What quantising one linear layer takes and returns, and the pieces that RTN and OPTQ share.
#pragma once

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "qeft/container/pack.hpp"
#include "qeft/container/quantized_matrix.hpp"
#include "qeft/core/host_buffer.hpp"
#include "qeft/core/text.hpp"
#include "qeft/reorder/permutation.hpp"
#include "qeft/solver/cholesky.hpp"
#include "qeft/solver/group_search.hpp"

namespace qeft::solver {
inline namespace QEFT_TARGET {

enum class layer_method {
  rtn,   // round to nearest, no compensation; needs no Hessian
  optq,  // error-compensated, column by column
};

/// Sizes that change speed and rounding only.
struct optq_tuning {
  index_t block_columns = 128;  // columns between two updates of all later columns
  index_t tile_rows = 64;       // rows that a thread carries through all columns
};

struct layer_options {
  layer_method method = layer_method::optq;
  int bits = 4;              // 2, 3, 4 or 8
  index_t group_size = 128;  // multiple of 32, or per_channel
  zero_kind zero = zero_kind::integer;
  scalar_kind scalar = scalar_kind::half;
  group_search_options search;
  std::vector<std::int32_t> weak_columns;  // input columns kept in full precision, ascending
  bool static_groups = false;              // OPTQ: all group parameters from the original weights
  bool act_order = false;  // OPTQ: robust columns by falling H_jj; implies static_groups
  /// Damping by the mean over all columns follows the paper; robust_mean leaves the weak ones out.
  damping_options damping;
  int refine_rounds = 0;      // after the solver, see refine
  bool measure_error = true;  // fill layer_report::output_error and squared_error
  optq_tuning tuning;
};

struct layer_report {
  std::optional<double> output_error;   // E = tr(dW H dW^T), undamped H; empty without a Hessian
  std::optional<double> squared_error;  // ||dW||^2, dW = target - dequantised, dead inputs included
  double damping = 0.0;                 // lambda that was used; above the option when H needed more
  std::vector<std::int32_t> dead_inputs;  // input columns with H_jj = 0
  double factor_seconds = 0.0;
  double solve_seconds = 0.0;
  double refine_seconds = 0.0;
  double measure_seconds = 0.0;
};

struct layer_result {
  quantized_matrix<> matrix;  // weak columns `indexed` (or none), dense columns in original order
  layer_report report;
  host_buffer<float> target;  // (OC, IC) that was approximated instead of W; empty for W itself
};

namespace detail {

inline matrix_descriptor describe(index_t out_channels, index_t in_channels,
                                  const layer_options& o) {
  matrix_descriptor d;
  d.out_channels = out_channels;
  d.in_channels = in_channels;
  d.bits = o.bits;
  d.group_size = o.group_size;
  d.zero = o.zero;
  d.scalar = o.scalar;
  d.weak_columns = static_cast<index_t>(o.weak_columns.size());
  d.weak = d.weak_columns == 0 ? weak_kind::none : weak_kind::indexed;
  return d;
}

}  // namespace detail

/// Throws when an option breaks its rule for a layer of this shape.
inline void check(const layer_options& o, index_t out_channels, index_t in_channels) {
  const matrix_descriptor d = detail::describe(out_channels, in_channels, o);
  validate(d).throw_if_error();
  validate_weak_index(o.weak_columns, d.weak_columns, in_channels).throw_if_error();
  check(o.search);
  check(o.damping);
  if (o.refine_rounds < 0) {
    fail(errc::invalid_argument,
         text("layer_options: refine_rounds is ", o.refine_rounds, ", but must not be negative"));
  }
  if (o.tuning.block_columns < 1 || o.tuning.tile_rows < 1) {
    fail(errc::invalid_argument,
         text("optq_tuning: block_columns is ", o.tuning.block_columns, " and tile_rows is ",
              o.tuning.tile_rows, ", but both must be positive"));
  }
}

namespace detail {

/// Collects rows in any order and from any thread (one thread per row), then packs what rows share.
class layer_builder {
 public:
  layer_builder(index_t out_channels, index_t in_channels, const layer_options& o)
      : matrix_(describe(out_channels, in_channels, o), o.weak_columns),
        extent_(matrix_.descriptor().extent()),
        format_{o.bits, o.zero, o.scalar} {
    choices_.resize(static_cast<std::size_t>(out_channels * extent_.groups));
    dense_columns_ = weak_last(in_channels, o.weak_columns).source();
    dense_columns_.resize(static_cast<std::size_t>(extent_.dense));
  }

  const layout::extent& extent() const noexcept { return extent_; }
  const group_format& format() const noexcept { return format_; }
  index_t group_size() const noexcept { return matrix_.descriptor().columns_per_group(); }
  /// Input columns of the dense columns, ascending.
  const std::vector<std::int32_t>& dense_columns() const noexcept { return dense_columns_; }
  span<const std::int32_t> weak_columns() const noexcept { return matrix_.weak_index(); }

  /// Searches the parameters of a group for these weights and stores them. Throws when the weights
  /// do not fit the scalar type.
  /// @param importance of every weight, or empty: all equal
  group_quantizer find_params(index_t row, index_t group, span<const float> weights,
                              const group_search_options& search,
                              span<const float> importance = {}) {
    if (!fits(weights, format_)) {
      const detail::weight_range range(weights);
      fail(errc::not_finite,
           text("quantize_layer: the weights of row ", row, ", group ", group, " reach from ",
                range.low, " to ", range.high, ", which overflows the group parameters in ",
                to_string(format_.scalar)));
    }
    const group_choice choice = solver::find_params(weights, format_, search, importance);
    choices_[static_cast<std::size_t>(row * extent_.groups + group)] = {choice.scale_bits,
                                                                        choice.zero};
    return choice.quantizer;
  }

  /// @param codes (dense columns)
  void set_codes(index_t row, const std::uint8_t* codes) {
    visit_bits(format_.bits, [&](auto bits) {
      auto* words = reinterpret_cast<std::uint32_t*>(matrix_.codes().data());
      pack_array<bits>(codes, extent_.dense,
                       words + row * layout::row_packed::row_words<bits>(extent_));
    });
  }

  /// Rounds to the scalar type; a value that does not fit is an error.
  void set_weak(index_t row, index_t j, float value) {
    visit_scalar(format_.scalar, [&](auto scalar) {
      const auto stored = from_float<decltype(scalar)>(value);
      if (!std::isfinite(to_float(stored))) {
        fail(errc::not_finite,
             text("quantize_layer: weak column ", weak_columns()[j], ", row ", row, " became ",
                  value, ", which overflows ", to_string(format_.scalar)));
      }
      matrix_.write_weak(row, j, stored.bits);
    });
  }

  quantized_matrix<> finish() && {
    for (index_t n = 0; n < extent_.out_channels; ++n) {
      for (index_t g = 0; g < extent_.groups; ++g) {
        const auto [scale_bits, zero] = choices_[static_cast<std::size_t>(n * extent_.groups + g)];
        matrix_.write_params(n, g, scale_bits, zero);
      }
    }
    return std::move(matrix_);
  }

 private:
  quantized_matrix<> matrix_;
  layout::extent extent_;
  group_format format_;
  // Scale and zero of every group: in the matrix, zero points of several rows share words.
  std::vector<std::pair<std::uint16_t, std::uint16_t>> choices_;
  std::vector<std::int32_t> dense_columns_;
};

}  // namespace detail

}  // namespace QEFT_TARGET
}  // namespace qeft::solver
