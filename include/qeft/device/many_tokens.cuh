// SPDX-License-Identifier: Apache-2.0
// How a product with many tokens is launched.
#pragma once

#include "qeft/device/checks.cuh"
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

/// Bytes for the sums of parts, (parts, tokens, OC); 0 where a block adds them up itself.
inline index_t part_sums_bytes(const tuning::parts& parts, index_t out_channels, index_t tokens) {
  return tuning::many_by_parts(out_channels, tokens) ? parts.count() * tokens * out_channels * 4
                                                     : 0;
}

/// @param part_sums of part_sums_bytes, or null
template <int TokenWarps, index_t GroupColumns, class View, class Y, class Epilogue>
status launch_many(cudaStream_t stream, const kernel::product_args<View, Y, Epilogue>& args,
                   float* part_sums) {
  using activations = block::activations<typename View::scalar_type, tuning::many_token_tiles,
                                         tuning::many_row_warps, TokenWarps>;
  constexpr int threads = 32 * tuning::many_row_warps * TokenWarps;
  const auto k = kernel::many_tokens<TokenWarps, GroupColumns, View, Y, Epilogue>;
  if (status s = allow_shared("gemm", k, activations::shared_bytes); !s.ok()) return s;
  const dim3 grid(
      static_cast<unsigned>(ceil_div(args.w.out_channels, tuning::many_block_rows)),
      static_cast<unsigned>(ceil_div(args.tokens, tuning::many_block_tokens(TokenWarps))),
      part_sums == nullptr ? 1U : static_cast<unsigned>(args.parts.count()));
  if (status s = launch_kernel("gemm: the launch", k, grid, threads, activations::shared_bytes,
                               stream, args, part_sums);
      !s.ok() || part_sums == nullptr) {
    return s;
  }
  const dim3 adding(static_cast<unsigned>(ceil_div(args.w.out_channels, 256)),
                    static_cast<unsigned>(args.tokens));
  return launch_kernel("gemm: the launch of add_parts", kernel::add_parts<View, Y, Epilogue>,
                       adding, 256, 0, stream, args, static_cast<const float*>(part_sums));
}

template <class View, class Y, class Epilogue>
status launch_many(cudaStream_t stream, const kernel::product_args<View, Y, Epilogue>& args,
                   float* part_sums) {
  return with_group_columns(args.w, [&](auto group_columns) {
    return tuning::many_token_warps(args.tokens) == 1
               ? launch_many<1, group_columns>(stream, args, part_sums)
               : launch_many<2, group_columns>(stream, args, part_sums);
  });
}

}  // namespace device::detail
}  // namespace QEFT_TARGET
}  // namespace qeft
