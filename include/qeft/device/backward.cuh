// SPDX-License-Identifier: Apache-2.0
// The gradients of a quantised layer on a device: of its input, and of its weak columns.
#pragma once

#include "qeft/device/checks.cuh"
#include "qeft/kernel/input_gradient.cuh"
#include "qeft/kernel/weak_gradient.cuh"

namespace qeft {
inline namespace QEFT_TARGET {
namespace device::detail {

using qeft::detail::cuda_status;
using qeft::detail::launch_kernel;

inline constexpr unsigned column_order_threads = 256;

/// Where the operands of input_gradient lie in the workspace, in bytes.
struct input_gradient_plan {
  index_t stride;  // of gradients
  index_t token_inverse;
  index_t group_factors;
  index_t rests;
  index_t columns;
  index_t dense_blocks;  // of the kernel, that take dense columns
  tuning::row_runs runs;
  index_t run_sums;  // of runs; 0 where blocks add them up themselves
  index_t bytes;
};
template <class View>
input_gradient_plan plan_input_gradient(const View& w, index_t tokens) {
  constexpr bool factors = needs_factors<typename View::scalar_type>;
  constexpr bool rests = View::format_type::zero == zero_kind::scaled;
  constexpr weak_kind weak = View::weak_type::kind;
  constexpr bool in_order = weak == weak_kind::none || weak == weak_kind::tail;
  input_gradient_plan p{};
  if (tokens <= 0 || w.out_channels <= 0) return p;
  const auto take = [&](index_t bytes) {
    const index_t at = p.bytes;
    p.bytes += round_up(bytes, 256);
    return at;
  };
  p.stride = round_up(w.out_channels, tuning::row_parts * tuning::round_rows);
  take(tokens * p.stride * 2);
  p.token_inverse = take(factors ? tokens * 4 : 0);
  p.group_factors = take(factors ? w.groups * 4 : 0);
  p.rests = take(rests ? tokens * w.groups * 4 : 0);
  p.columns = take(in_order ? 0 : w.in_channels * 4);

  using block = kernel::gradient_block<decltype(as_tail(w))>;
  p.dense_blocks = ceil_div(w.dense_columns(), block::columns);
  const index_t column_blocks = p.dense_blocks + ceil_div(w.weak_columns(), block::columns);
  p.runs = tuning::make_row_runs(p.stride / tuning::row_parts);
  if (p.runs.count > 1 &&
      tuning::gradient_by_runs(column_blocks * ceil_div(tokens, block::tokens))) {
    p.run_sums = take(p.runs.count * tuning::row_parts * tokens * w.in_channels * 4);
  }
  return p;
}

template <bool OneGroup, class View, class X>
status launch_input_gradient(cudaStream_t stream,
                             const kernel::input_gradient_args<View, X>& args) {
  using block = kernel::gradient_block<View>;
  const bool by_runs = args.run_sums != nullptr;
  const auto k = by_runs ? kernel::input_gradient_by_runs<OneGroup, View, X>
                         : kernel::input_gradient<OneGroup, View, X>;
  constexpr int shared_bytes = sizeof(typename block::shared_storage);
  static_assert(shared_bytes <= 99 * 1024, "more than compute capability 8.6 has");
  if (status s = allow_shared("input_gradient", k, shared_bytes); !s.ok()) return s;
  const index_t weak_blocks = ceil_div(args.w.weak_columns(), block::columns);
  const dim3 grid(static_cast<unsigned>(args.dense_blocks + weak_blocks),
                  static_cast<unsigned>(ceil_div(args.tokens, block::tokens)),
                  by_runs ? static_cast<unsigned>(args.runs.count) : 1U);
  if (status s = launch_kernel("input_gradient: the launch", k, grid, unsigned{block::threads},
                               shared_bytes, stream, args);
      !s.ok() || !by_runs) {
    return s;
  }
  constexpr int columns = kernel::add_runs_threads;
  const dim3 adding(static_cast<unsigned>(ceil_div(args.w.in_channels, columns)),
                    static_cast<unsigned>(args.tokens));
  return launch_kernel("input_gradient: the launch of add_runs", kernel::add_runs<View, X>, adding,
                       unsigned{columns}, 0, stream, args);
}

/// Shape and arrays of what concerns the weak columns only.
inline status check_weak(const char* function, index_t out_channels, index_t k, index_t tokens,
                         std::initializer_list<named_array> arrays) {
  // Blocks of columns are counted in the second dimension of a grid.
  constexpr index_t most_weak = index_t{65535} * tuning::weak_gradient_tile;
  if (out_channels < 1 || out_channels > most_channels || k < 0 || k > most_weak) {
    return refuse(text(function, ": w has ", out_channels, " rows and ", k,
                       " weak columns, but must have 1 to ", most_channels, " rows and at most ",
                       most_weak, " weak columns"));
  }
  return k == 0 ? check_tokens(function, tokens, {}) : check_tokens(function, tokens, arrays);
}

template <class X>
status check_weak_gradient(index_t out_channels, index_t k, const X* dy, const X* x_weak,
                           index_t tokens, const float* dw) {
  static_assert(is_half_v<X>,
                "qeft: weak_gradient needs qeft::half_bits or qeft::bf16_bits gradients");
  constexpr const char* name = "weak_gradient";
  if (status s = check_weak(name, out_channels, k, tokens, {{"dy", dy}, {"x_weak", x_weak}});
      !s.ok()) {
    return s;
  }
  if (k > 0) {
    if (status s = check_array(name, {"dw", dw}); !s.ok()) return s;
  }
  return check_capability(name);
}

template <class X>
status weak_gradient(const on_stream& exec, index_t out_channels, index_t k, const X* dy,
                     const X* x_weak, index_t tokens, float* dw, bool accumulate) {
  if (status s = check_weak_gradient(out_channels, k, dy, x_weak, tokens, dw); !s.ok()) return s;
  if (k == 0 || (tokens == 0 && accumulate)) return {};
  constexpr index_t tile = tuning::weak_gradient_tile;
  const dim3 grid(static_cast<unsigned>(ceil_div(out_channels, tile)),
                  static_cast<unsigned>(ceil_div(k, tile)));
  return launch_kernel("weak_gradient: the launch", kernel::weak_gradient<X>, grid,
                       unsigned{kernel::weak_gradient_threads}, 0, exec.stream,
                       kernel::weak_gradient_args<X>{{dy, static_cast<int>(out_channels)},
                                                     {x_weak, static_cast<int>(k)},
                                                     static_cast<int>(tokens),
                                                     accumulate,
                                                     dw});
}

}  // namespace device::detail

/// Bytes of workspace that input_gradient needs with these operands: for gradients as it reads them
/// and, where few tokens and columns leave too few blocks otherwise, for sums of runs of rows.
template <class F, class W, class L, class M, class Y>
index_t input_gradient_workspace_bytes(const on_stream&, const quantized_matrix_view<F, W, L, M>& w,
                                       const Y*, index_t tokens) {
  device::detail::check_types<quantized_matrix_view<F, W, L, M>, Y>();
  return device::detail::plan_input_gradient(w, tokens).bytes;
}

/// Whether input_gradient would accept these operands, and why not.
template <class F, class W, class L, class M, class Y, class X>
status supports_input_gradient(const on_stream& exec, const quantized_matrix_view<F, W, L, M>& w,
                               const Y* dy, index_t tokens, const X* dx) {
  namespace d = device::detail;
  static_assert(std::is_same_v<L, layout::fragment>,
                "qeft: input_gradient needs qeft::layout::fragment; repack the matrix");
  d::check_scalars<Y, X>();
  d::check_types<quantized_matrix_view<F, W, L, M>, Y>();
  constexpr const char* name = "input_gradient";
  if (status s = d::check_layer(name, w); !s.ok()) return s;
  if (status s = d::check_tokens(name, tokens, {{"dy", dy}, {"dx", dx}}); !s.ok()) return s;
  const index_t bytes = input_gradient_workspace_bytes(exec, w, dy, tokens);
  if (status s = d::check_workspace(name, exec, bytes); !s.ok()) return s;
  return d::check_capability(name);
}

/// dX = dY W (METHOD section 6), accumulated in FP32, from the packed layer: nothing of it is
/// dequantised in memory.
///
/// @param exec   returns once the work is on its stream; dy, dx and what w points to must live
///               until it is done
/// @param w      OC x IC layer
/// @param dy     (tokens, OC) row-major, of the layer's scalar type. A token with infinities or NaN
///               has infinities or NaN in dx; others are not touched by it. In FP16,
///               products of gradients and scales are exact down to 2^-18 times that of the token's
///               largest gradient and the group's largest scale, and have an error of 2^-38 times
///               it below; where that scale is above 1/2, those 2^12 times smaller lose bits
/// @param tokens 0 to 65535
/// @param dx     (tokens, IC) row-major, in the layer's order of input columns, whatever the
///               placement of weak ones; must not overlap dy; float, half_bits or bf16_bits
/// @return what supports_input_gradient says, or that a launch failed; then nothing, or only the
///         workspace, is written
template <class F, class W, class L, class M, class Y, class X>
status input_gradient(const on_stream& exec, const quantized_matrix_view<F, W, L, M>& w,
                      const Y* dy, index_t tokens, X* dx) {
  namespace d = device::detail;
  if (status s = supports_input_gradient(exec, w, dy, tokens, dx); !s.ok()) return s;
  if (tokens == 0) return {};
  const d::input_gradient_plan plan = d::plan_input_gradient(w, tokens);
  std::byte* const space = exec.workspace.data();
  const auto floats = [space](index_t at) { return reinterpret_cast<float*>(space + at); };
  const kernel::gradient_operands<Y> operands{
      reinterpret_cast<Y*>(space), static_cast<int>(plan.stride), floats(plan.token_inverse),
      floats(plan.group_factors), floats(plan.rests)};

  const std::int32_t* columns = nullptr;
  if constexpr (W::kind == weak_kind::indexed || W::kind == weak_kind::per_head) {
    auto* const to = reinterpret_cast<std::int32_t*>(space + plan.columns);
    columns = to;
    const auto blocks = static_cast<unsigned>(ceil_div(w.in_channels, d::column_order_threads));
    if (status s = d::launch_kernel("input_gradient: the launch of order_columns",
                                    kernel::order_columns<W>, blocks, d::column_order_threads, 0,
                                    exec.stream, w.weak, w.in_channels, to);
        !s.ok()) {
      return s;
    }
  }
  using view = decltype(as_tail(w));
  const index_t sets = needs_factors<Y> ? layout::fragment::group_sets(w.extent()) : 0;
  if (status s = d::launch_kernel(
          "input_gradient: the launch of prepare_gradient", kernel::prepare_gradient<view>,
          static_cast<unsigned>(tokens + sets), unsigned{kernel::prepare_threads}, 0, exec.stream,
          kernel::gradient_operands_args<view>{as_tail(w), dy, static_cast<int>(tokens), operands});
      !s.ok()) {
    return s;
  }
  const kernel::input_gradient_args<view, X> args{
      as_tail(w),
      operands,
      static_cast<int>(tokens),
      static_cast<int>(plan.dense_blocks),
      columns,
      dx,
      plan.runs,
      plan.run_sums > 0 ? floats(plan.run_sums) : nullptr};
  // Columns of a warp; groups are multiples of 32.
  constexpr index_t columns_together = warp::dense_columns<view, true>::columns;
  if (w.groups <= 1 || w.columns_per_group % columns_together == 0) {
    return d::launch_input_gradient<true>(exec.stream, args);
  }
  if constexpr (columns_together > 32) {
    return d::launch_input_gradient<false>(exec.stream, args);
  } else {
    return d::refuse("input_gradient: groups must be multiples of 32 columns");  // was checked
  }
}

/// Whether gather_weak would accept these operands, and why not.
template <class F, class W, class L, class M, class X>
status supports_gather_weak(const on_stream&, const quantized_matrix_view<F, W, L, M>& w,
                            const X* x, index_t tokens, const X* x_weak) {
  namespace d = device::detail;
  d::check_types<quantized_matrix_view<F, W, L, M>, X>();
  return d::check_weak("gather_weak", w.out_channels, w.weak_columns(), tokens,
                       {{"x", x}, {"x_weak", x_weak}});
}

/// x_weak[t][j] = x[t][weak column j]: all that weak_gradient needs of a layer's input (METHOD
/// section 6).
/// @param x      (tokens, IC) row-major, of the layer's scalar type
/// @param x_weak (tokens, k) row-major, must not overlap x
/// @return what supports_gather_weak says, or that a launch failed
template <class F, class W, class L, class M, class X>
status gather_weak(const on_stream& exec, const quantized_matrix_view<F, W, L, M>& w, const X* x,
                   index_t tokens, X* x_weak) {
  namespace d = device::detail;
  if (status s = supports_gather_weak(exec, w, x, tokens, x_weak); !s.ok()) return s;
  const index_t k = w.weak_columns();
  if (tokens == 0 || k == 0) return {};
  if constexpr (W::kind == weak_kind::none) {
    return {};
  } else {
    const index_t block_tokens = ceil_div(kernel::gather_weak_threads, k);
    return d::launch_kernel("gather_weak: the launch", kernel::gather_weak<W, X>,
                            static_cast<unsigned>(ceil_div(tokens, block_tokens)),
                            unsigned{kernel::gather_weak_threads}, 0, exec.stream, w.weak, x,
                            w.in_channels, static_cast<int>(tokens), static_cast<int>(block_tokens),
                            x_weak);
  }
}

/// Whether weak_gradient would accept these operands, and why not.
template <class F, class W, class L, class M, class X>
status supports_weak_gradient(const on_stream&, const quantized_matrix_view<F, W, L, M>& w,
                              const X* dy, const X* x_weak, index_t tokens, const float* dw) {
  device::detail::check_types<quantized_matrix_view<F, W, L, M>, X>();
  return device::detail::check_weak_gradient(w.out_channels, w.weak_columns(), dy, x_weak, tokens,
                                             dw);
}

/// dW_weak = dY^T X_weak (METHOD section 6), accumulated in FP32.
/// @param exec       returns once the work is on its stream
/// @param w          the layer; only its shape is looked at
/// @param dy         (tokens, OC) row-major, of the layer's scalar type
/// @param x_weak     (tokens, k) row-major: what gather_weak made
/// @param tokens     0 to 65535
/// @param dw         (OC, k) row-major, must overlap neither dy nor x_weak
/// @param accumulate whether the gradient is added to what dw holds, rather than stored
/// @return what supports_weak_gradient says, or that a launch failed
template <class F, class W, class L, class M, class X>
status weak_gradient(const on_stream& exec, const quantized_matrix_view<F, W, L, M>& w, const X* dy,
                     const X* x_weak, index_t tokens, float* dw, bool accumulate = false) {
  device::detail::check_types<quantized_matrix_view<F, W, L, M>, X>();
  return device::detail::weak_gradient(exec, w.out_channels, w.weak_columns(), dy, x_weak, tokens,
                                       dw, accumulate);
}

// The same for layers whose format is known at run time, out of Formats. A format that is not built
// in is errc::unsupported, and needs no workspace.

template <class Formats = device_formats, class M, class Y>
index_t input_gradient_workspace_bytes(const on_stream& exec,
                                       const quantized_matrix<layout::fragment, M>& w, const Y* dy,
                                       index_t tokens) {
  index_t bytes = 0;
  static_cast<void>(
      device::detail::with_view<Formats, Y>("input_gradient", w, [&](const auto& view) {
        bytes = input_gradient_workspace_bytes(exec, view, dy, tokens);
        return status{};
      }));
  return bytes;
}

template <class Formats = device_formats, class M, class Y, class X>
status supports_input_gradient(const on_stream& exec,
                               const quantized_matrix<layout::fragment, M>& w, const Y* dy,
                               index_t tokens, const X* dx) {
  return device::detail::with_view<Formats, Y>("input_gradient", w, [&](const auto& view) {
    return supports_input_gradient(exec, view, dy, tokens, dx);
  });
}

template <class Formats = device_formats, class M, class Y, class X>
status input_gradient(const on_stream& exec, const quantized_matrix<layout::fragment, M>& w,
                      const Y* dy, index_t tokens, X* dx) {
  return device::detail::with_view<Formats, Y>("input_gradient", w, [&](const auto& view) {
    return input_gradient(exec, view, dy, tokens, dx);
  });
}

template <class Formats = device_formats, class M, class X>
status supports_gather_weak(const on_stream& exec, const quantized_matrix<layout::fragment, M>& w,
                            const X* x, index_t tokens, const X* x_weak) {
  return device::detail::with_view<Formats, X>("gather_weak", w, [&](const auto& view) {
    return supports_gather_weak(exec, view, x, tokens, x_weak);
  });
}

template <class Formats = device_formats, class M, class X>
status gather_weak(const on_stream& exec, const quantized_matrix<layout::fragment, M>& w,
                   const X* x, index_t tokens, X* x_weak) {
  return device::detail::with_view<Formats, X>("gather_weak", w, [&](const auto& view) {
    return gather_weak(exec, view, x, tokens, x_weak);
  });
}

template <class Formats = device_formats, class M, class X>
status supports_weak_gradient(const on_stream& exec, const quantized_matrix<layout::fragment, M>& w,
                              const X* dy, const X* x_weak, index_t tokens, const float* dw) {
  return device::detail::with_view<Formats, X>("weak_gradient", w, [&](const auto& view) {
    return supports_weak_gradient(exec, view, dy, x_weak, tokens, dw);
  });
}

template <class Formats = device_formats, class M, class X>
status weak_gradient(const on_stream& exec, const quantized_matrix<layout::fragment, M>& w,
                     const X* dy, const X* x_weak, index_t tokens, float* dw,
                     bool accumulate = false) {
  return device::detail::with_view<Formats, X>("weak_gradient", w, [&](const auto& view) {
    return weak_gradient(exec, view, dy, x_weak, tokens, dw, accumulate);
  });
}

}  // namespace QEFT_TARGET
}  // namespace qeft
