// SPDX-License-Identifier: Apache-2.0
// The gradients of a quantised layer on the host: of its input, of its weak columns and of its
// scales.
#pragma once

#include "qeft/cpu/gradient_product.hpp"
#include "qeft/cpu/matmul.hpp"

namespace qeft {
inline namespace QEFT_TARGET {

namespace cpu::detail {

/// For every layout but simd_tile.
template <class View>
void input_gradient_by_definition(const on_host& exec, const View& w, const float* dy,
                                  index_t tokens, float* dx, bool accumulate) {
  exec.parallel_for(w.in_channels, 1, [&](index_t begin, index_t end) {
    for (index_t column = begin; column < end; ++column) {
      for (index_t t = 0; t < tokens; ++t) {
        float sum = 0.0F;
        for (index_t n = 0; n < w.out_channels; ++n) {
          sum += dy[t * w.out_channels + n] * dequantize(w, n, column);
        }
        float& to = dx[t * w.in_channels + column];
        to = accumulate ? to + sum : sum;
      }
    }
  });
}

/// What a scale is multiplied with: q - z, and q where zero points are scaled.
template <class View>
float scaled_code(const View& w, index_t n, index_t i) {
  const auto code = static_cast<float>(read_code(w, n, i));
  if constexpr (View::format_type::zero == zero_kind::scaled) return code;
  return code - read_params(w, n, w.group_of(i)).zero;
}

template <class View>
void scale_gradient_by_definition(const on_host& exec, const View& w, const float* dy,
                                  const float* x, index_t tokens, float* dscales, bool accumulate) {
  exec.parallel_for(w.out_channels, 1, [&](index_t begin, index_t end) {
    for (index_t n = begin; n < end; ++n) {
      for (index_t g = 0; g < w.groups; ++g) {
        const index_t first = g * w.columns_per_group;
        float sum = 0.0F;
        for (index_t i = first; i < first + w.columns_per_group && i < w.dense_columns(); ++i) {
          const index_t column = w.weak.dense_column(i, w.in_channels);
          float of_weight = 0.0F;
          for (index_t t = 0; t < tokens; ++t) {
            of_weight += dy[t * w.out_channels + n] * x[t * w.in_channels + column];
          }
          sum += of_weight * scaled_code(w, n, i);
        }
        float& to = dscales[n * w.groups + g];
        to = accumulate ? to + sum : sum;
      }
    }
  });
}

/// body(tile_layer, run_list, integral_constant<int, bits>) of a layer over simd_tile.
template <class F, class W, class Body>
void with_tile_layer(const quantized_matrix_view<F, W, layout::simd_tile>& w, const Body& body) {
  run_list runs;
  runs.assign(w.weak, w.in_channels);
  body(make_tile_layer(w), runs, std::integral_constant<int, F::bits>{});
}
/// The same of one whose format is known at run time: compiled per code width, not per format.
template <class Formats, class M, class Body>
void with_tile_layer(const quantized_matrix<layout::simd_tile, M>& w, const Body& body) {
  check_built_in(w.descriptor(), Formats{});
  const run_list runs = make_runs(w);
  visit_bits(w.descriptor().bits, [&](auto bits) {
    if constexpr (has_width<bits>(Formats{})) body(make_tile_layer(w), runs, bits);
  });
}

/// Takes vector kernels out of CUDA units that cannot compile them.
template <class Executor>
QEFT_ALWAYS_INLINE constexpr void check_gradient_isa() {
  static_assert(
      !std::is_same_v<if_host<Executor>, isa::not_in_this_cuda_unit>,
      "qeft: this nvcc does not take the vector kernels: compile the call in a .cpp "
      "file, or choose qeft::cpu::with<qeft::cpu::exact, qeft::cpu::isa::portable>(exec)");
}

/// What a function of gradients does with a layer: body(tile_layer, run_list, bits) over simd_tile,
/// by_definition(view) over any other layout.
template <class, class Executor, class F, class W, class L, class Body, class Definition>
void launch_gradient(const quantized_matrix_view<F, W, L>& w, const Body& body,
                     const Definition& by_definition) {
  if constexpr (std::is_same_v<L, layout::simd_tile>) {
    check_gradient_isa<Executor>();
    with_tile_layer(w, body);
  } else {
    by_definition(w);
  }
}
template <class Formats, class Executor, class L, class M, class Body, class Definition>
void launch_gradient(const quantized_matrix<L, M>& w, const Body& body,
                     const Definition& by_definition) {
  if constexpr (std::is_same_v<L, layout::simd_tile>) {
    check_gradient_isa<Executor>();
    with_tile_layer<Formats>(w, body);
  } else {
    w.template visit<Formats>(by_definition);
  }
}

/// input_gradient of any layer. @tparam Formats those that are built in, for an owner
template <class Formats, class Executor, class Layer>
status launch_input_gradient(const Executor& exec, const Layer& w, const float* dy, index_t tokens,
                             float* dx, bool accumulate) {
  return as_status("input_gradient: no memory for the packed gradients", [&] {
    launch_gradient<Formats, Executor>(
        w,
        [&](const tile_layer& layer, const run_list& runs, auto bits) {
          using isa = if_host<Executor>;
          input_gradient_product<bits, isa>(layer, runs, dx).run(exec, dy, tokens, accumulate);
        },
        [&](const auto& view) {
          input_gradient_by_definition(exec, view, dy, tokens, dx, accumulate);
        });
  });
}

/// scale_gradient of any layer.
template <class Formats, class Executor, class Layer>
status launch_scale_gradient(const Executor& exec, const Layer& w, const float* dy, const float* x,
                             index_t tokens, float* dscales, bool accumulate) {
  return as_status("scale_gradient: no memory for the packed inputs", [&] {
    launch_gradient<Formats, Executor>(
        w,
        [&](const tile_layer& layer, const run_list& runs, auto bits) {
          using isa = if_host<Executor>;
          scale_gradient_product<bits, isa>(layer, runs, dscales)
              .run(exec, dy, x, tokens, accumulate);
        },
        [&](const auto& view) {
          scale_gradient_by_definition(exec, view, dy, x, tokens, dscales, accumulate);
        });
  });
}

template <class Weak>
void gather_weak(const on_host& exec, const Weak& weak, index_t in_channels, const float* x,
                 index_t tokens, float* x_weak) {
  const index_t k = weak.count();
  const index_t dense = in_channels - k;
  exec.parallel_for(tokens, 16, [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) {
      for_each_weak_run(weak, in_channels, [&](const activation_run& run) {
        const float* from = x + t * in_channels + run.column;
        float* to = x_weak + t * k + run.slot - dense;
        for (index_t i = 0; i < run.count; ++i) to[i] = from[i];
      });
    }
  });
}

/// What is checked beside tokens where a gradient is stored even if there are none.
inline status check_gradient(const char* function, const char* name, const float* gradient,
                             index_t count) {
  if (count == 0 || gradient != nullptr) return {};
  return refuse(text(function, ": ", name, " is null, but has ", count, " elements"));
}

}  // namespace cpu::detail

/// Whether input_gradient would accept these operands, and why not.
template <class Executor, class F, class W, class L, class = cpu::detail::if_host<Executor>>
status supports_input_gradient(const Executor&, const quantized_matrix_view<F, W, L>& w,
                               const float* dy, index_t tokens, const float* dx) {
  if (status s = cpu::detail::check_layer("input_gradient", w); !s.ok()) return s;
  return cpu::detail::check_tokens("input_gradient", tokens, {{"dy", dy}, {"dx", dx}});
}

/// The same for a layer whose format is known at run time, all but whether that is built in.
template <class Executor, class L, class M, class = cpu::detail::if_host<Executor>>
status supports_input_gradient(const Executor&, const quantized_matrix<L, M>& w, const float* dy,
                               index_t tokens, const float* dx) {
  static_assert(is_host_accessible_v<M>, "qeft::input_gradient: the matrix must be in host memory");
  if (status s = validate(w.descriptor()); !s.ok()) return s;
  return cpu::detail::check_tokens("input_gradient", tokens, {{"dy", dy}, {"dx", dx}});
}

/// dX = dY W (METHOD section 6), accumulated in FP32, from the packed layer: at most a panel of it
/// is dequantised at a time. A token's result depends neither on the other tokens, nor on their
/// number, nor on the number of threads.
///
/// @param exec       on_host, or a cpu::executor, of which only the instruction set counts; blocks
///                   until done
/// @param w          OC x IC layer. Over layout::simd_tile by vector kernels; over any other layout
///                   by the definition, slowly
/// @param dy         (tokens, OC) row-major
/// @param tokens     >= 0
/// @param dx         (tokens, IC) row-major, in the layer's order of input columns, whatever the
///                   placement of weak ones; must not overlap dy
/// @param accumulate whether the gradient is added to what dx holds, rather than stored
/// @return what supports_input_gradient says, and errc::out_of_memory; on failure dx is untouched
template <class Executor, class F, class W, class L, class = cpu::detail::if_host<Executor>>
status input_gradient(const Executor& exec, const quantized_matrix_view<F, W, L>& w,
                      const float* dy, index_t tokens, float* dx, bool accumulate = false) {
  if (status s = supports_input_gradient(exec, w, dy, tokens, dx); !s.ok()) return s;
  using formats = format_list<F>;
  return cpu::detail::launch_input_gradient<formats>(exec, w, dy, tokens, dx, accumulate);
}

/// input_gradient of a layer whose format is known at run time, out of Formats. A format that is
/// not built in is errc::unsupported.
template <class Formats = default_formats, class Executor, class L, class M,
          class = cpu::detail::if_host<Executor>>
status input_gradient(const Executor& exec, const quantized_matrix<L, M>& w, const float* dy,
                      index_t tokens, float* dx, bool accumulate = false) {
  if (status s = supports_input_gradient(exec, w, dy, tokens, dx); !s.ok()) return s;
  return cpu::detail::launch_input_gradient<Formats>(exec, w, dy, tokens, dx, accumulate);
}

/// Whether gather_weak would accept these operands, and why not.
template <class Executor, class F, class W, class L, class = cpu::detail::if_host<Executor>>
status supports_gather_weak(const Executor&, const quantized_matrix_view<F, W, L>& w,
                            const float* x, index_t tokens, const float* x_weak) {
  if (status s = cpu::detail::check_layer("gather_weak", w); !s.ok()) return s;
  if (w.weak_columns() == 0) return cpu::detail::check_tokens("gather_weak", tokens, {});
  return cpu::detail::check_tokens("gather_weak", tokens, {{"x", x}, {"x_weak", x_weak}});
}

/// The same for a layer whose format is known at run time.
template <class Executor, class L, class M, class = cpu::detail::if_host<Executor>>
status supports_gather_weak(const Executor&, const quantized_matrix<L, M>& w, const float* x,
                            index_t tokens, const float* x_weak) {
  static_assert(is_host_accessible_v<M>, "qeft::gather_weak: the matrix must be in host memory");
  if (status s = validate(w.descriptor()); !s.ok()) return s;
  if (w.descriptor().weak_columns == 0) {
    return cpu::detail::check_tokens("gather_weak", tokens, {});
  }
  return cpu::detail::check_tokens("gather_weak", tokens, {{"x", x}, {"x_weak", x_weak}});
}

/// x_weak[t][j] = x[t][weak column j]: all that weak_gradient needs of a layer's input (METHOD
/// section 6).
/// @param x      (tokens, IC) row-major
/// @param x_weak (tokens, k) row-major, weak columns in ascending order; must not overlap x
/// @return what supports_gather_weak says
template <class Executor, class F, class W, class L, class = cpu::detail::if_host<Executor>>
status gather_weak(const Executor& exec, const quantized_matrix_view<F, W, L>& w, const float* x,
                   index_t tokens, float* x_weak) {
  if (status s = supports_gather_weak(exec, w, x, tokens, x_weak); !s.ok()) return s;
  return cpu::detail::as_status("gather_weak: no memory", [&] {
    cpu::detail::gather_weak(exec, w.weak, w.in_channels, x, tokens, x_weak);
  });
}

/// gather_weak of a layer whose format is known at run time.
template <class Executor, class L, class M, class = cpu::detail::if_host<Executor>>
status gather_weak(const Executor& exec, const quantized_matrix<L, M>& w, const float* x,
                   index_t tokens, float* x_weak) {
  if (status s = supports_gather_weak(exec, w, x, tokens, x_weak); !s.ok()) return s;
  const matrix_descriptor& d = w.descriptor();
  return cpu::detail::as_status("gather_weak: no memory", [&] {
    visit_weak(d, w.weak_index().data(), [&](const auto& weak) {
      cpu::detail::gather_weak(exec, weak, d.in_channels, x, tokens, x_weak);
    });
  });
}

/// Whether weak_gradient would accept these operands, and why not.
template <class Executor, class = cpu::detail::if_host<Executor>>
status supports_weak_gradient(const Executor&, index_t out_channels, index_t k, const float* dy,
                              const float* x_weak, index_t tokens, const float* dw) {
  constexpr index_t most = index_t{1} << 30;  // as in a matrix_descriptor
  if (out_channels < 1 || out_channels > most || k < 0 || k > most) {
    return cpu::detail::refuse(text("weak_gradient: out_channels is ", out_channels, " and k is ",
                                    k, ", but must be in [1, 2^30] and [0, 2^30]"));
  }
  if (k == 0) return cpu::detail::check_tokens("weak_gradient", tokens, {});
  if (status s =
          cpu::detail::check_tokens("weak_gradient", tokens, {{"dy", dy}, {"x_weak", x_weak}});
      !s.ok()) {
    return s;
  }
  return cpu::detail::check_gradient("weak_gradient", "dw", dw, out_channels * k);
}

/// dW_weak = dY^T X_weak (METHOD section 6), accumulated in FP32: tokens are added in ascending
/// order, whatever the number of threads.
/// @param exec         on_host, or a cpu::executor, of which only the instruction set counts
/// @param out_channels OC of the layer
/// @param k            its weak columns
/// @param dy           (tokens, OC) row-major
/// @param x_weak       (tokens, k) row-major: what gather_weak made
/// @param tokens       >= 0; the gradient of none is zero
/// @param dw           (OC, k) row-major, must overlap neither dy nor x_weak
/// @param accumulate   whether the gradient is added to what dw holds, rather than stored
/// @return what supports_weak_gradient says, and errc::out_of_memory; on failure dw is untouched
template <class Executor, class = cpu::detail::if_host<Executor>>
status weak_gradient(const Executor& exec, index_t out_channels, index_t k, const float* dy,
                     const float* x_weak, index_t tokens, float* dw, bool accumulate = false) {
  if (status s = supports_weak_gradient(exec, out_channels, k, dy, x_weak, tokens, dw); !s.ok()) {
    return s;
  }
  cpu::detail::check_gradient_isa<Executor>();
  return cpu::detail::as_status("weak_gradient: no memory for the packed inputs", [&] {
    cpu::detail::weak_gradient_product<cpu::detail::if_host<Executor>>(out_channels, k, dw)
        .run(exec, dy, x_weak, tokens, accumulate);
  });
}

/// Whether scale_gradient would accept these operands, and why not.
template <class Executor, class F, class W, class L, class = cpu::detail::if_host<Executor>>
status supports_scale_gradient(const Executor&, const quantized_matrix_view<F, W, L>& w,
                               const float* dy, const float* x, index_t tokens,
                               const float* dscales) {
  if (status s = cpu::detail::check_layer("scale_gradient", w); !s.ok()) return s;
  if (status s = cpu::detail::check_tokens("scale_gradient", tokens, {{"dy", dy}, {"x", x}});
      !s.ok()) {
    return s;
  }
  return cpu::detail::check_gradient("scale_gradient", "dscales", dscales,
                                     w.out_channels * w.groups);
}

/// The same for a layer whose format is known at run time, all but whether that is built in.
template <class Executor, class L, class M, class = cpu::detail::if_host<Executor>>
status supports_scale_gradient(const Executor&, const quantized_matrix<L, M>& w, const float* dy,
                               const float* x, index_t tokens, const float* dscales) {
  static_assert(is_host_accessible_v<M>, "qeft::scale_gradient: the matrix must be in host memory");
  if (status s = validate(w.descriptor()); !s.ok()) return s;
  if (status s = cpu::detail::check_tokens("scale_gradient", tokens, {{"dy", dy}, {"x", x}});
      !s.ok()) {
    return s;
  }
  const matrix_descriptor& d = w.descriptor();
  return cpu::detail::check_gradient("scale_gradient", "dscales", dscales,
                                     d.out_channels * d.groups());
}

/// The gradient of the scales of a layer, for training them while its codes and zero points stay:
/// dL/ds[n][g] = sum of dW[n][j] (q - z)[n][j] over the dense columns j of group g, or of
/// dW[n][j] q[n][j] where zero points are scaled, with dW = dY^T X, of which at most a panel exists
/// at a time. Accumulated in FP32, in an order that does not depend on the number of threads.
///
/// @param exec       on_host, or a cpu::executor, of which only the instruction set counts; blocks
///                   until done
/// @param w          OC x IC layer. Over layout::simd_tile by vector kernels; over any other layout
///                   by the definition, slowly
/// @param dy         (tokens, OC) row-major
/// @param x          (tokens, IC) row-major, the layer's input
/// @param tokens     >= 0; the gradient of none is zero
/// @param dscales    (OC, groups) row-major, must overlap neither dy nor x
/// @param accumulate whether the gradient is added to what dscales holds, rather than stored
/// @return what supports_scale_gradient says, and errc::out_of_memory; on failure dscales is
///         untouched
template <class Executor, class F, class W, class L, class = cpu::detail::if_host<Executor>>
status scale_gradient(const Executor& exec, const quantized_matrix_view<F, W, L>& w,
                      const float* dy, const float* x, index_t tokens, float* dscales,
                      bool accumulate = false) {
  if (status s = supports_scale_gradient(exec, w, dy, x, tokens, dscales); !s.ok()) return s;
  using formats = format_list<F>;
  return cpu::detail::launch_scale_gradient<formats>(exec, w, dy, x, tokens, dscales, accumulate);
}

/// scale_gradient of a layer whose format is known at run time, out of Formats. A format that is
/// not built in is errc::unsupported.
template <class Formats = default_formats, class Executor, class L, class M,
          class = cpu::detail::if_host<Executor>>
status scale_gradient(const Executor& exec, const quantized_matrix<L, M>& w, const float* dy,
                      const float* x, index_t tokens, float* dscales, bool accumulate = false) {
  if (status s = supports_scale_gradient(exec, w, dy, x, tokens, dscales); !s.ok()) return s;
  return cpu::detail::launch_scale_gradient<Formats>(exec, w, dy, x, tokens, dscales, accumulate);
}

}  // namespace QEFT_TARGET
}  // namespace qeft
