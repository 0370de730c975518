// SPDX-License-Identifier: Apache-2.0
// How a product with many tokens is launched.
#pragma once

#include "qeft/device/checks.cuh"
#include "qeft/device/in_one_launch.cuh"
#include "qeft/kernel/many_tokens.cuh"

namespace qeft {
inline namespace QEFT_TARGET {
namespace device::detail {

using qeft::detail::cuda_status;
using qeft::detail::launch_kernel;

/// body(constant) with the GroupColumns of warp::part_product that suit a layer.
template <class View, class Body>
status with_group_columns(const View& w, const Body& body) {
  constexpr int chunk = tuning::chunk_columns;
  if (w.groups <= 1 || w.columns_per_group % chunk == 0) return body(constant<chunk>{});
  if (w.columns_per_group == chunk / 4) return body(constant<chunk / 4>{});
  return body(constant<static_cast<int>(dynamic)>{});
}

/// Bytes for the sums of parts of layers, (parts, tokens, OC) of each; 0 where blocks add them up
/// themselves.
template <int Layers>
index_t part_sums_bytes(const tuning::parts& parts, const index_t (&out_channels)[Layers],
                        index_t tokens) {
  index_t row_blocks = 0;
  index_t channels = 0;
  for (const index_t oc : out_channels) {
    row_blocks += ceil_div(oc, tuning::many_block_rows);
    channels += oc;
  }
  return tuning::many_by_parts(row_blocks, tokens) ? parts.count() * tokens * channels * 4 : 0;
}

/// Gives layers their place for sums of parts, where blocks take one part each.
/// @param space of part_sums_bytes
template <class View, class Y, class Epilogue, int Layers>
void place_part_sums(kernel::product_args<View, Y, Epilogue> (&layers)[Layers], std::byte* space) {
  const index_t row_blocks = row_blocks_of(layers, tuning::many_block_rows);
  if (!tuning::many_by_parts(row_blocks, layers[0].tokens)) return;
  auto* sums = reinterpret_cast<float*>(space);
  for (auto& layer : layers) {
    layer.part_sums = sums;
    sums += index_t{layer.parts.count()} * layer.tokens * layer.w.out_channels;
  }
}

template <int TokenWarps, index_t GroupColumns, class View, class Y, class Epilogue, int Layers>
status launch_many(cudaStream_t stream,
                   const kernel::product_args<View, Y, Epilogue> (&layers)[Layers]) {
  using shape = kernel::many_tokens_block<typename View::scalar_type, TokenWarps>;
  constexpr int shared_bytes = sizeof(typename shape::shared_storage);
  constexpr int count = static_cast<int>(layer_numbers<Layers>::size());
  constexpr int threads = 32 * tuning::many_row_warps * TokenWarps;
  const auto k = kernel::many_tokens<TokenWarps, GroupColumns, count, View, Y, Epilogue>;
  if (status s = allow_shared("gemm", k, shared_bytes); !s.ok()) return s;
  const auto tokens = static_cast<unsigned>(layers[0].tokens);
  const bool by_parts = layers[0].part_sums != nullptr;
  const dim3 grid(
      static_cast<unsigned>(row_blocks_of(layers, tuning::many_block_rows)),
      static_cast<unsigned>(ceil_div(layers[0].tokens, tuning::many_block_tokens(TokenWarps))),
      by_parts ? static_cast<unsigned>(layers[0].parts.count()) : 1U);
  if (status s = launch_kernel("gemm: the launch", k, grid, threads, shared_bytes, stream,
                               in_one_launch(layers, tuning::many_block_rows));
      !s.ok() || !by_parts) {
    return s;
  }
  constexpr int channels = kernel::add_parts_threads;
  return launch_kernel("gemm: the launch of add_parts", kernel::add_parts<count, View, Y, Epilogue>,
                       dim3(static_cast<unsigned>(row_blocks_of(layers, channels)), tokens),
                       unsigned{channels}, 0, stream, in_one_launch(layers, channels));
}

template <class View, class Y, class Epilogue, int Layers>
status launch_many(cudaStream_t stream,
                   const kernel::product_args<View, Y, Epilogue> (&layers)[Layers]) {
  return with_group_columns(layers[0].w, [&](auto group_columns) {
    return tuning::many_token_warps(layers[0].tokens) == 1
               ? launch_many<1, group_columns>(stream, layers)
               : launch_many<2, group_columns>(stream, layers);
  });
}

}  // namespace device::detail
}  // namespace QEFT_TARGET
}  // namespace qeft
