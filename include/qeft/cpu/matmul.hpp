// SPDX-License-Identifier: Apache-2.0
// Products of a quantised layer with activations on the host: gemv for one token, gemm for any
// number.
#pragma once

#include "qeft/container/quantized_matrix.hpp"
#include "qeft/cpu/tile_product.hpp"
#include "qeft/thread/dot.hpp"
#include "qeft/thread/group.hpp"

namespace qeft {

namespace cpu::detail {

/// The stored bytes of every weak policy are those of weak_tail.
template <class F, class W>
quantized_matrix_view<F, weak_tail<>, layout::simd_tile> as_tail(
    const quantized_matrix_view<F, W, layout::simd_tile>& w) {
  return {w.out_channels, w.in_channels, w.run_time_group, {{w.weak_columns()}},
          w.codes,        w.scales,      w.zeros,          w.weak_values};
}

template <class T>
inline constexpr bool is_activation_scalar_v =
    std::is_same_v<T, float> || std::is_same_v<T, half_bits> || std::is_same_v<T, bf16_bits>;

inline status check_operands(index_t tokens, const void* x, const void* y) {
  if (tokens < 0) {
    return {errc::invalid_argument,
            "gemm: tokens is " + std::to_string(tokens) + ", but must not be negative"};
  }
  if (tokens > 0 && (x == nullptr || y == nullptr)) {
    return {errc::invalid_argument, std::string("gemm: ") + (x == nullptr ? "x" : "y") +
                                        " is null, but there are " + std::to_string(tokens) +
                                        " tokens"};
  }
  return {};
}

}  // namespace cpu::detail

/// Whether gemm would accept these operands, and why not.
template <class F, class W, class L, class X, class Y>
status supports_gemm(const quantized_matrix_view<F, W, L>& w, const X* x, index_t tokens,
                     const Y* y) {
  if (w.out_channels < 1 || w.in_channels < 1 || w.dense_columns() < 0) {
    return {errc::invalid_argument,
            "gemm: w is " + std::to_string(w.out_channels) + " x " + std::to_string(w.in_channels) +
                " with " + std::to_string(w.weak_columns()) +
                " weak columns, but must have at least one row and column and at most in_channels "
                "weak columns"};
  }
  if (F::group_size == dynamic && !is_supported_group_size(w.run_time_group)) {
    return {errc::invalid_argument,
            "gemm: w has run_time_group = " + std::to_string(w.run_time_group) +
                ", but must have a positive multiple of 32, or -1"};
  }
  const bool no_zeros = F::zero != zero_kind::symmetric && w.zeros == nullptr;
  const bool no_codes =
      w.dense_columns() > 0 && (w.codes == nullptr || w.scales == nullptr || no_zeros);
  const bool no_weak = w.weak_columns() > 0 && w.weak_values == nullptr;
  if (no_codes || no_weak) {
    return {errc::invalid_argument, std::string("gemm: w has no ") +
                                        (no_codes ? "codes, scales or zeros" : "weak values") +
                                        "; make the view with quantized_matrix::view"};
  }
  return cpu::detail::check_operands(tokens, x, y);
}

/// Y = X W^T (METHOD section 5), accumulated in FP32. A token's result depends neither on the other
/// tokens, nor on their number, nor on the number of threads.
///
/// @param exec       executor; blocks until done
/// @param w          OC x IC layer. Over layout::simd_tile by vector kernels; over any other layout
///                   by the definition, slowly, and with exact activations only
/// @param x          (tokens, IC) row-major; float, half_bits or bf16_bits. Finite, and small
/// enough
///                   that scale * 2^bits * |x|, summed over a group, fits FP32: else the outputs of
///                   that token may be infinite or NaN
/// @param tokens     >= 0
/// @param y          (tokens, OC) row-major, must not overlap x; float, half_bits or bf16_bits
/// @param activation cpu::exact: FP32 arithmetic. cpu::int8: see there
/// @param isa        instruction set, one of cpu::isa that is compiled in
/// @return what supports_gemm says; on failure y is untouched. May throw std::bad_alloc: the packed
///         activations of up to 192 tokens are allocated per call
template <class F, class W, class L, class X, class Y, class Activation = cpu::exact,
          class Isa = cpu::native_isa>
status gemm(const on_host& exec, const quantized_matrix_view<F, W, L>& w, const X* x,
            index_t tokens, Y* y, Activation activation = {}, [[maybe_unused]] Isa isa = {}) {
  static_assert(cpu::detail::is_activation_scalar_v<X> && cpu::detail::is_activation_scalar_v<Y>,
                "qeft::gemm: X and Y must be float, qeft::half_bits or qeft::bf16_bits");
  static_assert(std::is_same_v<Activation, cpu::exact> || std::is_same_v<Activation, cpu::int8>,
                "qeft::gemm: Activation must be qeft::cpu::exact or qeft::cpu::int8");
  static_assert(std::is_same_v<L, layout::simd_tile> || std::is_same_v<Activation, cpu::exact>,
                "qeft::gemm: the int8 activation policy needs layout::simd_tile");
  static_cast<void>(activation);
  if (status s = supports_gemm(w, x, tokens, y); !s.ok()) return s;
  if constexpr (std::is_same_v<L, layout::simd_tile>) {
    const auto tail = cpu::detail::as_tail(w);
    cpu::detail::multiply<F::bits, Activation, Isa>(
        exec, cpu::detail::tile_layer<Isa>(tail),
        cpu::detail::make_source<Isa>(x, w.weak, w.in_channels), tokens,
        cpu::detail::make_output<Isa>(y));
  } else {
    exec.parallel_for(w.out_channels, 1, [&](index_t begin, index_t end) {
      for (index_t n = begin; n < end; ++n) {
        for (index_t t = 0; t < tokens; ++t) {
          y[t * w.out_channels + n] =
              from_float<Y>(row_dot(w, n, x + t * w.in_channels, serial_group{}));
        }
      }
    });
  }
  return {};
}

/// y = W x: gemm of one token. @param x (IC) @param y (OC)
template <class F, class W, class L, class X, class Y, class Activation = cpu::exact,
          class Isa = cpu::native_isa>
status gemv(const on_host& exec, const quantized_matrix_view<F, W, L>& w, const X* x, Y* y,
            Activation activation = {}, Isa isa = {}) {
  return gemm(exec, w, x, 1, y, activation, isa);
}

/// gemm for a layer whose format is known at run time, out of Formats. A format that is not built
/// in is errc::unsupported.
template <class Formats = default_formats, class L, class X, class Y, class Activation = cpu::exact,
          class Isa = cpu::native_isa>
status gemm(const on_host& exec, const quantized_matrix<L>& w, const X* x, index_t tokens, Y* y,
            Activation activation = {}, Isa isa = {}) {
  status result;
  try {
    w.template visit<Formats>([&](const auto& view) {
      static_cast<void>(result = gemm(exec, view, x, tokens, y, activation, isa));
    });
  } catch (const error& e) {
    return {e.code(), e.what()};
  }
  return result;
}

/// gemv for a layer whose format is known at run time, out of Formats.
template <class Formats = default_formats, class L, class X, class Y, class Activation = cpu::exact,
          class Isa = cpu::native_isa>
status gemv(const on_host& exec, const quantized_matrix<L>& w, const X* x, Y* y,
            Activation activation = {}, Isa isa = {}) {
  return gemm<Formats>(exec, w, x, 1, y, activation, isa);
}

}  // namespace qeft
