// SPDX-License-Identifier: Apache-2.0
// Products of a quantised layer with activations on the host: gemv for one token, gemm for any
// number.
#pragma once

#include "qeft/cpu/checks.hpp"
#include "qeft/cpu/executor.hpp"
#include "qeft/cpu/tile_product.hpp"
#include "qeft/thread/dot.hpp"
#include "qeft/thread/group.hpp"

namespace qeft {
inline namespace QEFT_TARGET {

namespace cpu::detail {

template <class T>
inline constexpr bool is_activation_scalar_v =
    std::is_same_v<T, float> || std::is_same_v<T, half_bits> || std::is_same_v<T, bf16_bits>;

/// For every layout but simd_tile.
template <class View, class X, class Y, class Epilogue>
void multiply_by_definition(const on_host& exec, const View& w, const X* x, index_t tokens, Y* y,
                            const Epilogue& epilogue) {
  exec.parallel_for(w.out_channels, 1, [&](index_t begin, index_t end) {
    for (index_t n = begin; n < end; ++n) {
      for (index_t t = 0; t < tokens; ++t) {
        const float value = row_dot(w, n, x + t * w.in_channels, serial_group{});
        y[t * w.out_channels + epilogue::destination(epilogue, n)] =
            from_float<Y>(epilogue(value, t, n));
      }
    }
  });
}

template <bool Batch, class Executor, class F, class W, class L, class X, class Y, class Epilogue>
void launch(const Executor& exec, const quantized_matrix_view<F, W, L>& w, const X* x,
            index_t tokens, Y* y, const Epilogue& epilogue) {
  using activation = typename policies<Executor>::activation;
  using isa = typename policies<Executor>::isa;
  if constexpr (std::is_same_v<L, layout::simd_tile>) {
    run_list runs;
    runs.assign(w.weak, w.in_channels);
    multiply<Batch, F::bits, activation, isa>(
        exec, make_tile_layer(w), activation_source::of<isa>(x, w.in_channels, runs), tokens,
        make_output<isa>(y, epilogue, w.out_channels));
  } else {
    multiply_by_definition(exec, w, x, tokens, y, epilogue);
  }
}

/// as_status of gemm.
template <class Body>
status as_gemm_status(const Body& body) {
  return as_status("gemm: no memory for the packed activations", body);
}

/// An error that lists what is built in, unless one of `Formats` fits the descriptor.
template <class... Formats>
void check_built_in(const matrix_descriptor& d, const format_list<Formats...>& built_in) {
  if (!(format_matches<Formats>(d) || ...)) qeft::detail::fail_format(d, built_in);
}
template <int Bits, class... Formats>
constexpr bool has_width(const format_list<Formats...>&) {
  return ((Formats::bits == Bits) || ...);
}
/// The runs of a layer whose weak policy is known at run time.
template <class M>
run_list make_runs(const quantized_matrix<layout::simd_tile, M>& w) {
  run_list runs;
  const matrix_descriptor& d = w.descriptor();
  visit_weak(d, w.weak_index().data(), [&](const auto& weak) { runs.assign(weak, d.in_channels); });
  return runs;
}

/// A layer whose format is known at run time: compiled per code width, not per format.
template <bool Batch, class Formats, class Executor, class M, class X, class Y, class Epilogue>
void launch(const Executor& exec, const quantized_matrix<layout::simd_tile, M>& w, const X* x,
            index_t tokens, Y* y, const Epilogue& epilogue) {
  using activation = typename policies<Executor>::activation;
  using isa = typename policies<Executor>::isa;
  const matrix_descriptor& d = w.descriptor();
  check_built_in(d, Formats{});
  const run_list runs = make_runs(w);
  const tile_layer layer = make_tile_layer(w);
  const auto source = activation_source::of<isa>(x, d.in_channels, runs);
  const output to = make_output<isa>(y, epilogue, d.out_channels);
  visit_bits(d.bits, [&](auto bits) {
    if constexpr (has_width<bits>(Formats{})) {
      multiply<Batch, bits, activation, isa>(exec, layer, source, tokens, to);
    }
  });
}

/// The same over any other layout: compiled per format, slow.
template <bool, class Formats, class Executor, class L, class M, class X, class Y, class Epilogue>
void launch(const Executor& exec, const quantized_matrix<L, M>& w, const X* x, index_t tokens, Y* y,
            const Epilogue& epilogue) {
  w.template visit<Formats>(
      [&](const auto& view) { multiply_by_definition(exec, view, x, tokens, y, epilogue); });
}

/// Takes a function out of the overloads where Executor is not one of the host.
template <class Executor>
using if_host = typename policies<Executor>::isa;

/// What gemm asks of its types.
template <class Executor, class L, class X, class Y, class Epilogue>
QEFT_ALWAYS_INLINE constexpr void check_types() {
  static_assert(is_activation_scalar_v<X> && is_activation_scalar_v<Y>,
                "qeft::gemm: X and Y must be float, qeft::half_bits or qeft::bf16_bits");
  static_assert(std::is_same_v<L, layout::simd_tile> ||
                    std::is_same_v<typename policies<Executor>::activation, exact>,
                "qeft::gemm: the int8 activation policy needs layout::simd_tile");
  static_assert(!std::is_same_v<if_host<Executor>, isa::not_in_this_cuda_unit> ||
                    !std::is_same_v<L, layout::simd_tile>,
                "qeft::gemm: this nvcc does not take the vector kernels: compile the call in a "
                ".cpp file, or choose qeft::cpu::with<qeft::cpu::exact, "
                "qeft::cpu::isa::portable>(exec)");
  static_assert(epilogue::is_epilogue_v<Epilogue>,
                "qeft::gemm: Epilogue must be trivially copyable and callable as "
                "float(float value, qeft::index_t token, qeft::index_t channel) const");
}

}  // namespace cpu::detail

/// Whether gemm would accept these operands, and why not.
template <class Executor, class F, class W, class L, class X, class Y,
          class = cpu::detail::if_host<Executor>>
status supports_gemm(const Executor&, const quantized_matrix_view<F, W, L>& w, const X* x,
                     index_t tokens, const Y* y) {
  if (status s = cpu::detail::check_layer("gemm", w); !s.ok()) return s;
  return cpu::detail::check_tokens("gemm", tokens, {{"x", x}, {"y", y}});
}

/// supports_gemm of a layer whose format is known at run time, all but whether that is built in.
template <class Executor, class L, class M, class X, class Y,
          class = cpu::detail::if_host<Executor>>
status supports_gemm(const Executor&, const quantized_matrix<L, M>& w, const X* x, index_t tokens,
                     const Y* y) {
  static_assert(is_host_accessible_v<M>, "qeft::gemm: the matrix must be in host memory");
  if (status s = validate(w.descriptor()); !s.ok()) return s;  // moved from, or never filled
  return cpu::detail::check_tokens("gemm", tokens, {{"x", x}, {"y", y}});
}

/// Y = X W^T (METHOD section 5), accumulated in FP32, then the epilogue. A token's result depends
/// neither on the other tokens, nor on their number, nor on the number of threads.
///
/// @param exec     on_host, or cpu::with<Activation, Isa>(on_host): cpu::exact with FP32 arithmetic
///                 and the best instruction set unless said otherwise; blocks until done
/// @param w        OC x IC layer. Over layout::simd_tile by vector kernels; over any other layout
///                 by the definition, slowly, and with exact activations only
/// @param x        (tokens, IC) row-major; float, half_bits or bf16_bits. Finite, and so small that
///                 scale * 2^bits * |x|, summed over a group, fits FP32: else the outputs of that
///                 token may be infinite or NaN
/// @param tokens   >= 0
/// @param y        (tokens, OC) row-major, must not overlap x; float, half_bits or bf16_bits
/// @param epilogue what happens to an output before it is stored; see thread/epilogue.hpp
/// @return what supports_gemm says, and errc::out_of_memory: the packed activations of up to 192
///         tokens are allocated per call. On failure y is untouched, unless the epilogue
///         threw: qeft::error and std::bad_alloc come back as a status, anything else goes on
template <class Executor, class F, class W, class L, class X, class Y,
          class Epilogue = epilogue::none, class = cpu::detail::if_host<Executor>>
status gemm(const Executor& exec, const quantized_matrix_view<F, W, L>& w, const X* x,
            index_t tokens, Y* y, const Epilogue& epilogue = {}) {
  cpu::detail::check_types<Executor, L, X, Y, Epilogue>();
  if (status s = supports_gemm(exec, w, x, tokens, y); !s.ok()) return s;
  return cpu::detail::as_gemm_status(
      [&] { cpu::detail::launch<true>(exec, w, x, tokens, y, epilogue); });
}

/// y = W x: gemm of one token. @param x (IC) @param y (OC)
template <class Executor, class F, class W, class L, class X, class Y,
          class Epilogue = epilogue::none, class = cpu::detail::if_host<Executor>>
status gemv(const Executor& exec, const quantized_matrix_view<F, W, L>& w, const X* x, Y* y,
            const Epilogue& epilogue = {}) {
  cpu::detail::check_types<Executor, L, X, Y, Epilogue>();
  if (status s = supports_gemm(exec, w, x, 1, y); !s.ok()) return s;
  return cpu::detail::as_gemm_status(
      [&] { cpu::detail::launch<false>(exec, w, x, 1, y, epilogue); });
}

/// gemm of a layer whose format is known at run time, out of Formats. A format that is not built in
/// is errc::unsupported.
template <class Formats = default_formats, class Executor, class L, class M, class X, class Y,
          class Epilogue = epilogue::none, class = cpu::detail::if_host<Executor>>
status gemm(const Executor& exec, const quantized_matrix<L, M>& w, const X* x, index_t tokens, Y* y,
            const Epilogue& epilogue = {}) {
  cpu::detail::check_types<Executor, L, X, Y, Epilogue>();
  if (status s = supports_gemm(exec, w, x, tokens, y); !s.ok()) return s;
  return cpu::detail::as_gemm_status(
      [&] { cpu::detail::launch<true, Formats>(exec, w, x, tokens, y, epilogue); });
}

/// gemv of a layer whose format is known at run time, out of Formats.
template <class Formats = default_formats, class Executor, class L, class M, class X, class Y,
          class Epilogue = epilogue::none, class = cpu::detail::if_host<Executor>>
status gemv(const Executor& exec, const quantized_matrix<L, M>& w, const X* x, Y* y,
            const Epilogue& epilogue = {}) {
  cpu::detail::check_types<Executor, L, X, Y, Epilogue>();
  if (status s = supports_gemm(exec, w, x, 1, y); !s.ok()) return s;
  return cpu::detail::as_gemm_status(
      [&] { cpu::detail::launch<false, Formats>(exec, w, x, 1, y, epilogue); });
}

}  // namespace QEFT_TARGET
}  // namespace qeft
