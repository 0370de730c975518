// SPDX-License-Identifier: Apache-2.0
// Quantises one linear layer: the entry point of the solver (METHOD section 3).
#pragma once

#include <chrono>
#include <vector>

#include "qeft/core/text.hpp"
#include "qeft/solver/layer.hpp"
#include "qeft/solver/layer_error.hpp"
#include "qeft/solver/optq.hpp"
#include "qeft/solver/refine.hpp"
#include "qeft/solver/rtn.hpp"
#include "qeft/solver/target.hpp"

namespace qeft::solver {
inline namespace QEFT_TARGET {

namespace detail {

inline void check_layer(const on_host& exec, span<const float> w, index_t out_channels,
                        index_t in_channels, span<const float> h, const layer_options& o,
                        span<const float> mismatch) {
  check(o, out_channels, in_channels);
  check_matrix(exec, w, out_channels, in_channels, "quantize_layer: w");
  if (o.method == layer_method::optq || o.refine_rounds > 0 || !h.empty()) {
    check_matrix(exec, h, in_channels, in_channels, "quantize_layer: the Hessian");
    check_symmetric(exec, h.data(), in_channels, "quantize_layer: the Hessian");
  }
  if (mismatch.empty()) return;
  if (o.method == layer_method::rtn) {
    fail(errc::invalid_argument,
         "quantize_layer: the method is RTN, which compensates nothing, but a mismatch is given");
  }
  check_matrix(exec, mismatch, out_channels, in_channels, "quantize_layer: the mismatch");
}

/// What damping adds to the diagonal of `h` where no solver has factored it.
inline double refine_damping(const layer_builder& builder, const layer_options& o,
                             span<const float> h) {
  const layout::extent e = builder.extent();
  const permutation positions(make_solve_order(builder, o, h).input);
  const index_t counted = o.damping.robust_mean ? e.dense : e.dense + e.weak;
  return o.damping.damping * mean_diagonal(h, positions, counted);
}

class stopwatch {
 public:
  /// Seconds since construction or the last call.
  double lap() {
    const auto now = std::chrono::steady_clock::now();
    const double seconds = std::chrono::duration<double>(now - last_).count();
    last_ = now;
    return seconds;
  }

 private:
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

}  // namespace detail

/// Quantises W by RTN or OPTQ, then refines it as often as the options say, with the Hessian damped
/// as for the solver. The result does not
/// depend on the number of threads and never holds NaN or infinity: what is not finite in `w` or
/// `h` is an error that names row and column, a Hessian that no damping repairs is
/// errc::not_positive_definite, and a group or weak column that leaves the range of its 16-bit type
/// is errc::not_finite (see choose_scalar).
///
/// OPTQ sets robust columns of dead inputs (H_jj = 0) to zero; RTN and weak columns keep them. With
/// a Hessian of zeros OPTQ equals RTN.
///
/// With a mismatch M (asymmetric calibration, METHOD section 9) OPTQ approximates the target
/// W + M (H + l I)^-1 instead of W, l being the damping that the factorisation used. The errors in
/// the report are then those against the target.
/// @param w (out_channels, in_channels), row-major
/// @param h (in_channels, in_channels), symmetric; may be empty for layer_method::rtn unless it is
///          refined
/// @param mismatch M, (out_channels, in_channels), as output_mismatch returns it; OPTQ only
inline layer_result quantize_layer(const on_host& exec, span<const float> w, index_t out_channels,
                                   index_t in_channels, span<const float> h,
                                   const layer_options& options, span<const float> mismatch = {}) {
  detail::check_layer(exec, w, out_channels, in_channels, h, options, mismatch);
  detail::layer_builder builder(out_channels, in_channels, options);
  layer_result result;
  detail::stopwatch watch;
  double added = 0.0;  // to the diagonal of H
  if (options.method == layer_method::rtn) {
    detail::solve_rtn(exec, w.data(), in_channels, options, builder);
    if (options.refine_rounds > 0) added = detail::refine_damping(builder, options, h);
  } else {
    const detail::solve_order order = detail::make_solve_order(builder, options, h);
    const permutation positions(order.input);
    inverse_factor factor =
        factor_inverse(exec, h, positions, builder.extent().dense, options.damping);
    result.report.factor_seconds = watch.lap();
    if (!mismatch.empty()) {
      result.target = asymmetric_target(exec, w, mismatch, out_channels, positions, factor);
      w = result.target;
    }
    detail::optq_solver(w.data(), options, order, factor, builder).run(exec);
    result.report.damping = factor.damping;
    added = factor.added;
    result.report.dead_inputs = std::move(factor.dead_inputs);
  }
  result.matrix = std::move(builder).finish();
  result.report.solve_seconds = watch.lap();
  if (options.refine_rounds > 0) {
    const host_buffer<float> damped = damped_hessian(exec, h, in_channels, added);
    result.matrix = refine(exec, w, damped, std::move(result.matrix), options.refine_rounds).matrix;
    result.report.refine_seconds = watch.lap();
  }
  if (options.measure_error) {
    const layer_error e = measure_error(exec, w, result.matrix, h);
    if (!h.empty()) result.report.output_error = e.output;
    result.report.squared_error = e.squared;
    result.report.measure_seconds = watch.lap();
  }
  return result;
}

/// ||dW_:,j||^2 per input column of a trial RTN quantisation without weak columns: the factor of
/// OWQ's metric H_jj * ||dW_:,j||^2 (METHOD section 2). Format and search are those of `options`.
inline std::vector<double> perturbation(const on_host& exec, span<const float> w,
                                        index_t out_channels, index_t in_channels,
                                        layer_options options) {
  options.method = layer_method::rtn;
  options.weak_columns.clear();
  options.refine_rounds = 0;
  options.measure_error = false;
  const layer_result trial = quantize_layer(exec, w, out_channels, in_channels, {}, options);
  return column_error(exec, w, trial.matrix);
}

}  // namespace QEFT_TARGET
}  // namespace qeft::solver
