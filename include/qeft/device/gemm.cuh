// SPDX-License-Identifier: Apache-2.0
// Products of a quantised layer with activations on a device: gemv for one token, gemm for any
// number.
#pragma once

#include "qeft/device/checks.cuh"
#include "qeft/device/many_tokens.cuh"
#include "qeft/device/many_tokens_sm90.cuh"
#include "qeft/kernel/any_layout.cuh"
#include "qeft/kernel/few_tokens.cuh"
#include "qeft/kernel/gather.cuh"
#include "qeft/tuning/few_tokens.hpp"

namespace qeft {
inline namespace QEFT_TARGET {
namespace device::detail {

/// Where the activations of a launch lie.
struct activation_plan {
  bool gathered;    // in the workspace first
  index_t stride;   // from one token to the next
  index_t weak_at;  // the first weak column of a token
};
template <class View>
activation_plan plan_activations(const View& w, const void* x) {
  using weak = typename View::weak_type;
  const index_t dense = w.dense_columns();
  constexpr bool at_end = weak::kind == weak_kind::none || weak::kind == weak_kind::tail;
  // Copies go by 16 bytes.
  if (at_end && w.in_channels % 8 == 0 && dense % 8 == 0 && is_aligned(x, 16)) {
    return {false, w.in_channels, dense};
  }
  return {true, round_up(dense, 8) + round_up(w.weak_columns(), 8), round_up(dense, 8)};
}

/// Bytes of the workspace for activations in order.
inline index_t gathered_bytes(const activation_plan& plan, index_t tokens) {
  return plan.gathered ? round_up(tokens * plan.stride * 2, 256) : 0;
}

template <class View>
tuning::parts parts_of(const View& w) {
  return tuning::make_parts(View::format_type::bits, w.dense_columns(), w.weak_columns());
}

/// The most shared memory that a block takes.
template <class Product>
constexpr int most_shared_bytes() noexcept {
  int most = 0;
  for (int parts = 1; parts <= 2 * tuning::most_parts; ++parts) {
    const int bytes =
        Product::shared_bytes(parts, tuning::plan_warps(parts, Product::rows / 16).warps);
    if (bytes > most) most = bytes;
  }
  return most;
}

/// The kernel for few tokens with its blocks of rows and of tokens, in clusters of so many or
/// without clusters (0).
template <class Product, class Kernel, class Args>
status launch_few_blocks(cudaStream_t stream, Kernel* k, const dim3& grid, int parts, int warps,
                         int cluster, const Args& args) {
  constexpr int most_shared = most_shared_bytes<Product>();
  if (status s = allow_shared("gemm", k, most_shared); !s.ok()) return s;
  const auto threads = static_cast<unsigned>(32 * warps);
  const int shared = Product::shared_bytes(parts, warps);
  return cluster == 0
             ? launch_kernel("gemm: the launch", k, grid, threads, shared, stream, args)
             : launch_cluster("gemm: the launch", k, grid, threads, cluster, shared, stream, args);
}

/// One launch for layers of the same IC, k and group size.
template <int RowTiles, int TokenTiles, index_t GroupColumns, class View, class Y, class Epilogue,
          int Layers>
status launch_few(cudaStream_t stream, kernel::product_args<View, Y, Epilogue> (&layers)[Layers],
                  int multiprocessors) {
  using product = block::few_tokens_product<View, RowTiles, TokenTiles, GroupColumns>;
  using in_cluster = kernel::product_in_cluster<View, RowTiles, TokenTiles, GroupColumns>;
  static_assert(most_shared_bytes<product>() <= 99 * 1024,
                "more than a device of compute capability 8.6 has");
  static_assert(most_shared_bytes<in_cluster>() <= 226 * 1024,
                "more than a device of compute capability 9.0 has");
  const index_t row_blocks = row_blocks_of(layers, product::rows);
  bool same_x = true;
  for (const auto& layer : layers) {
    same_x = same_x && layer.dense_x == layers[0].dense_x && layer.weak_x == layers[0].weak_x;
  }
  const index_t token_blocks = ceil_div(layers[0].tokens, product::most_tokens);
  const int parts = layers[0].parts.count();
  const tuning::warp_plan plan = tuning::plan_warps(parts, RowTiles);
  for (auto& layer : layers) layer.parts_each = plan.parts_each;
  constexpr int count = static_cast<int>(layer_numbers<Layers>::size());
  const auto k = kernel::few_tokens<RowTiles, TokenTiles, GroupColumns, count, View, Y, Epilogue>;
  const auto args = in_one_launch(layers, product::rows);
  const dim3 grid(static_cast<unsigned>(row_blocks), static_cast<unsigned>(token_blocks));
  bool in_clusters = false;
  if (status s = is_sm90a_code(k, in_clusters); !s.ok()) return s;
  if (!in_clusters) {
    return launch_few_blocks<product>(stream, k, grid, parts, plan.warps, 0, args);
  }
  const int cluster = same_x ? tuning::few_tokens_cluster(row_blocks, multiprocessors) : 1;
  return launch_few_blocks<in_cluster>(stream, k, grid, parts, plan.warps, cluster, args);
}

template <class View, class X, class Y, class Epilogue>
status launch_any(cudaStream_t stream, const View& w, const X* x, index_t tokens, Y* y,
                  const Epilogue& epilogue) {
  constexpr int rows = 8;
  const dim3 grid(static_cast<unsigned>(ceil_div(w.out_channels, rows)),
                  static_cast<unsigned>(tokens));
  return launch_kernel("gemm: the launch", kernel::any_layout<View, X, Y, Epilogue>, grid,
                       32 * rows, 0, stream, w, x, y, epilogue);
}

template <class View, class Y, class Epilogue, int Layers>
status launch_few(cudaStream_t stream, kernel::product_args<View, Y, Epilogue> (&layers)[Layers],
                  int multiprocessors) {
  const auto with_tiles = [&](auto row_tiles, auto token_tiles) {
    return with_group_columns(layers[0].w, [&](auto group_columns) {
      return launch_few<row_tiles, token_tiles, group_columns>(stream, layers, multiprocessors);
    });
  };
  index_t tiles = 0;
  for (const auto& layer : layers) tiles += layout::fragment::row_tiles(layer.w.extent());
  const auto with_rows = [&](auto token_tiles) {
    return tuning::row_tiles_for(tiles, multiprocessors) == 2
               ? with_tiles(constant<2>{}, token_tiles)
               : with_tiles(constant<1>{}, token_tiles);
  };
  return layers[0].tokens <= 8 ? with_rows(constant<1>{}) : with_rows(constant<2>{});
}

/// Puts activations in order, at `to`.
template <class View, class X>
status launch_order(cudaStream_t stream, const View& w, const activation_plan& plan, const X* x,
                    index_t tokens, X* to) {
  const dim3 grid(static_cast<unsigned>(ceil_div(w.in_channels, kernel::order_threads)),
                  static_cast<unsigned>(ceil_div(tokens, kernel::order_tokens)));
  return launch_kernel("gemm: the launch of order_activations",
                       kernel::order_activations<typename View::weak_type, X>, grid,
                       kernel::order_threads, 0, stream, w.weak, x, tokens, w.in_channels, to,
                       plan.stride, plan.weak_at);
}

/// @param x in the order of `plan`
template <class View, class X, class Y, class Epilogue>
auto args_of(const View& w, const activation_plan& plan, const X* x, index_t tokens, Y* y,
             const Epilogue& epilogue) {
  return kernel::product_args<decltype(as_tail(w)), Y, Epilogue>{as_tail(w),
                                                                 x,
                                                                 x + plan.weak_at,
                                                                 static_cast<int>(plan.stride),
                                                                 static_cast<int>(tokens),
                                                                 y,
                                                                 epilogue,
                                                                 parts_of(w)};
}

/// Picks the kernel.
/// @param layers of the same IC, k and group size
/// @param space  of part_sums_bytes
template <class View, class Y, class Epilogue, int Layers>
status launch_products(cudaStream_t stream,
                       kernel::product_args<View, Y, Epilogue> (&layers)[Layers],
                       std::byte* space) {
  int multiprocessors = 0;
  if (status s = qeft::detail::device_attribute(multiprocessors, cudaDevAttrMultiProcessorCount);
      !s.ok()) {
    return s;
  }
  if (layers[0].tokens < tuning::many_tokens_from) {
    return launch_few(stream, layers, multiprocessors);
  }
  bool suits_sm90 = false;
  if (status s = suits_many_tokens_sm90(layers, multiprocessors, suits_sm90); !s.ok()) return s;
  if (suits_sm90) {
    return launch_many_tokens_sm90(stream, layers, multiprocessors);
  }
  place_part_sums(layers, space);
  return launch_many(stream, layers);
}

/// Puts activations in order where that is needed, and multiplies. @pre supports_gemm
template <class View, class X, class Y, class Epilogue>
status launch(const on_stream& exec, const View& w, const X* x, index_t tokens, Y* y,
              const Epilogue& epilogue) {
  const activation_plan plan = plan_activations(w, x);
  if (plan.gathered) {
    auto* to = reinterpret_cast<X*>(exec.workspace.data());
    if (status s = launch_order(exec.stream, w, plan, x, tokens, to); !s.ok()) return s;
    x = to;
  }
  kernel::product_args<decltype(as_tail(w)), Y, Epilogue> layers[] = {
      args_of(w, plan, x, tokens, y, epilogue)};
  return launch_products(exec.stream, layers, exec.workspace.data() + gathered_bytes(plan, tokens));
}

}  // namespace device::detail

/// Bytes of workspace that gemm needs with these operands: for activations that it cannot read as
/// they lie, and for sums of parts when more than 16 tokens leave too few blocks otherwise.
template <class F, class W, class L, class M, class X>
index_t workspace_bytes(const on_stream&, const quantized_matrix_view<F, W, L, M>& w, const X* x,
                        index_t tokens) {
  device::detail::check_types<quantized_matrix_view<F, W, L, M>, X>();
  if constexpr (std::is_same_v<L, layout::fragment>) {
    namespace d = device::detail;
    const d::activation_plan plan = d::plan_activations(w, x);
    return d::gathered_bytes(plan, tokens) +
           d::part_sums_bytes(d::parts_of(w), {w.out_channels}, tokens);
  } else {
    return 0;
  }
}

/// Whether gemm would accept these operands, and why not.
template <class F, class W, class L, class M, class X, class Y>
status supports_gemm(const on_stream& exec, const quantized_matrix_view<F, W, L, M>& w, const X* x,
                     index_t tokens, const Y* y) {
  namespace d = device::detail;
  d::check_scalars<X, Y>();
  d::check_types<quantized_matrix_view<F, W, L, M>, X>();
  if (status s = d::check_layer("gemm", w); !s.ok()) return s;
  if (status s = d::check_tokens("gemm", tokens, {{"x", x}, {"y", y}}); !s.ok()) return s;
  if (status s = d::check_workspace("gemm", exec, workspace_bytes(exec, w, x, tokens)); !s.ok()) {
    return s;
  }
  return d::check_capability("gemm");
}

/// Y = X W^T (METHOD section 5), accumulated in FP32, then the epilogue. A token's result depends
/// neither on the other tokens nor on how the work is spread.
///
/// @param exec     returns once the work is on its stream; x, y and what w and the epilogue point
///                 to must live until it is done
/// @param w        OC x IC layer. Over a layout other than fragment it is multiplied by the
///                 definition, slowly
/// @param x        (tokens, IC) row-major, of the layer's scalar type. Read as it lies where weak
///                 columns come last, and IC, k and the address are such that 16 bytes can be
///                 copied; else put into order in the workspace first. Finite, and so small that
///                 2^bits * |x|, summed over 256 columns, fits FP32: else the outputs of that token
///                 may be infinite or NaN
/// @param tokens   0 to 65535
/// @param y        (tokens, OC) row-major, must not overlap x; float, half_bits or bf16_bits
/// @param epilogue what happens to an output before it is stored; see thread/epilogue.hpp
/// @return what supports_gemm says, or that a launch failed; then nothing, or only the workspace,
///         is written
template <class F, class W, class L, class M, class X, class Y, class Epilogue = epilogue::none>
status gemm(const on_stream& exec, const quantized_matrix_view<F, W, L, M>& w, const X* x,
            index_t tokens, Y* y, const Epilogue& epilogue = {}) {
  namespace d = device::detail;
  static_assert(epilogue::is_epilogue_v<Epilogue>,
                "qeft::gemm: Epilogue must be trivially copyable and callable as "
                "float(float value, qeft::index_t token, qeft::index_t channel) const");
  if (status s = supports_gemm(exec, w, x, tokens, y); !s.ok()) return s;
  if (tokens == 0) return {};
  if constexpr (std::is_same_v<L, layout::fragment>) {
    return d::launch(exec, w, x, tokens, y, epilogue);
  } else {
    return d::launch_any(exec.stream, w, x, tokens, y, epilogue);
  }
}

/// y = W x: gemm of one token. @param x (IC) @param y (OC)
template <class F, class W, class L, class M, class X, class Y, class Epilogue = epilogue::none>
status gemv(const on_stream& exec, const quantized_matrix_view<F, W, L, M>& w, const X* x, Y* y,
            const Epilogue& epilogue = {}) {
  return gemm(exec, w, x, 1, y, epilogue);
}

/// workspace_bytes of a layer whose format is known at run time; 0 where that is not built in.
template <class Formats = device_formats, class M, class X>
index_t workspace_bytes(const on_stream& exec, const quantized_matrix<layout::fragment, M>& w,
                        const X* x, index_t tokens) {
  index_t bytes = 0;
  static_cast<void>(device::detail::with_view<Formats, X>("gemm", w, [&](const auto& view) {
    bytes = workspace_bytes(exec, view, x, tokens);
    return status{};
  }));
  return bytes;
}

/// supports_gemm of a layer whose format is known at run time.
template <class Formats = device_formats, class M, class X, class Y>
status supports_gemm(const on_stream& exec, const quantized_matrix<layout::fragment, M>& w,
                     const X* x, index_t tokens, const Y* y) {
  return device::detail::with_view<Formats, X>(
      "gemm", w, [&](const auto& view) { return supports_gemm(exec, view, x, tokens, y); });
}

/// gemm of a layer whose format is known at run time, out of Formats. A format that is not built in
/// is errc::unsupported.
template <class Formats = device_formats, class M, class X, class Y,
          class Epilogue = epilogue::none>
status gemm(const on_stream& exec, const quantized_matrix<layout::fragment, M>& w, const X* x,
            index_t tokens, Y* y, const Epilogue& epilogue = {}) {
  return device::detail::with_view<Formats, X>(
      "gemm", w, [&](const auto& view) { return gemm(exec, view, x, tokens, y, epilogue); });
}

/// gemv of a layer whose format is known at run time, out of Formats.
template <class Formats = device_formats, class M, class X, class Y,
          class Epilogue = epilogue::none>
status gemv(const on_stream& exec, const quantized_matrix<layout::fragment, M>& w, const X* x, Y* y,
            const Epilogue& epilogue = {}) {
  return gemm<Formats>(exec, w, x, 1, y, epilogue);
}

}  // namespace QEFT_TARGET
}  // namespace qeft
