// SPDX-License-Identifier: Apache-2.0
// The launch of products with many tokens on compute capability 9.0.
#pragma once

#include <cuda.h>

#include "qeft/device/many_tokens.cuh"
#include "qeft/kernel/many_tokens_sm90.cuh"

namespace qeft {
inline namespace QEFT_TARGET {
namespace device::detail {

using qeft::detail::launch_cluster;

/// cuTensorMapEncodeTiled, a function of the driver, which this library is not linked with; null
/// where there is none.
inline decltype(&cuTensorMapEncodeTiled) tensor_map_encoder() {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
    const cudaError_t code = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                              12000, cudaEnableDefault, &found);
#else
    const cudaError_t code =
        cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    if (code != cudaSuccess) static_cast<void>(cudaGetLastError());
    return code == cudaSuccess && found == cudaDriverEntryPointSuccess
               ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function)
               : nullptr;
  }();
  return encode;
}

/// A tensor map over the first `columns` columns of a matrix x, whose rows are `tokens` tokens.
/// @param x      16-byte aligned
/// @param stride elements from one token to the next, a multiple of 8
/// @pre there is a tensor_map_encoder
template <class Ring, class Scalar>
status make_tensor_map(CUtensorMap& map, const Scalar* x, index_t columns, int tokens, int stride) {
  const cuuint64_t size[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(tokens)};
  const cuuint64_t row_bytes[] = {static_cast<cuuint64_t>(stride) * sizeof(Scalar)};
  const cuuint32_t box[] = {Ring::box_columns, Ring::box_tokens};
  const cuuint32_t every[] = {1, 1};
  const CUresult code =
      tensor_map_encoder()(&map,
                           std::is_same_v<Scalar, half_bits> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                                             : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                           2, const_cast<Scalar*>(x), size, row_bytes, box, every,
                           CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (code == CUDA_SUCCESS) return {};
  return {errc::device_error,
          text("gemm: cuTensorMapEncodeTiled failed with ", static_cast<int>(code), " for ", tokens,
               " tokens of ", columns, " columns, ", stride, " elements apart")};
}

/// Whether launch_many_tokens_sm90 can be used. (All that a unit instantiates is made for the same
/// architectures.)
template <class View, class Y, class Epilogue>
status has_many_tokens_sm90(const kernel::product_args<View, Y, Epilogue>&, bool& has) {
  return is_sm90a_code(kernel::many_tokens_sm90<64, tuning::chunk_columns, 1, View, Y, Epilogue>,
                       has);
}

/// A product with the tensor maps that it needs.
template <class Ring, class View, class Y, class Epilogue>
status add_tensor_maps(kernel::many_tokens_sm90_product<View, Y, Epilogue>& product) {
  const auto& args = product.args;
  const auto describe = [&](CUtensorMap& map, const auto* x, index_t columns) {
    return columns == 0 ? status{}
                        : make_tensor_map<Ring>(map, x, columns, args.tokens, args.stride);
  };
  if (status s = describe(product.dense_x, args.dense_x, args.w.dense_columns()); !s.ok()) return s;
  return describe(product.weak_x, args.weak_x, args.w.weak_columns());
}

template <int Tokens, index_t GroupColumns, class View, class Y, class Epilogue, int Layers>
status launch_many_tokens_sm90(cudaStream_t stream,
                               const kernel::product_args<View, Y, Epilogue> (&layers)[Layers],
                               int multiprocessors) {
  using tune = tuning::many_tokens_sm90;
  using scalar = typename View::scalar_type;
  using ring = block::activation_ring<scalar, Tokens>;
  using product = kernel::many_tokens_sm90_product<View, Y, Epilogue>;
  constexpr int shared_bytes = kernel::many_tokens_shared<scalar, Tokens>::bytes();
  constexpr int count = static_cast<int>(layer_numbers<Layers>::size());
  const auto k = kernel::many_tokens_sm90<Tokens, GroupColumns, count, View, Y, Epilogue>;
  if (status s = allow_shared("gemm", k, shared_bytes); !s.ok()) return s;
  const int cluster = row_blocks_of(layers, tune::rows) == Layers ? 1 : tune::cluster;
  const index_t rows = tune::rows * cluster;
  auto args = in_one_launch(
      layers, rows,
      [&](int i) {
        return product{{}, {}, layers[i]};
      },
      layer_numbers<Layers>{});
  for (int i = 0; i < Layers; ++i) {
    if (status s = add_tensor_maps<ring>(args.of[i]); !s.ok()) return s;
  }
  for (int i = Layers; i < count; ++i) {
    args.of[i].dense_x = args.of[0].dense_x;
    args.of[i].weak_x = args.of[0].weak_x;
  }
  const index_t clusters = row_blocks_of(layers, rows) * ceil_div(layers[0].tokens, Tokens);
  const index_t most = multiprocessors / cluster;
  const auto blocks = static_cast<unsigned>((clusters < most ? clusters : most) * cluster);
  return launch_cluster("gemm: the launch", k, blocks, tune::threads, cluster, shared_bytes, stream,
                        args);
}
template <int Tokens, class View, class Y, class Epilogue, int Layers>
status launch_many_tokens_sm90(cudaStream_t stream,
                               const kernel::product_args<View, Y, Epilogue> (&layers)[Layers],
                               int multiprocessors) {
  return with_group_columns(layers[0].w, [&](auto group_columns) {
    return launch_many_tokens_sm90<Tokens, group_columns>(stream, layers, multiprocessors);
  });
}
/// Y = X W^T of layers of the same IC, k and group size, for any number of tokens from 1 on: picks
/// the kernel. @pre has_many_tokens_sm90(layers[0])
template <class View, class Y, class Epilogue, int Layers>
status launch_many_tokens_sm90(cudaStream_t stream,
                               const kernel::product_args<View, Y, Epilogue> (&layers)[Layers],
                               int multiprocessors) {
  using tune = tuning::many_tokens_sm90;
  if constexpr (View::format_type::zero != zero_kind::scaled) {  // whose sums need more registers
    const index_t row_blocks = row_blocks_of(layers, tune::rows);
    if (tune::tokens_for(row_blocks, layers[0].tokens, multiprocessors) == 128) {
      return launch_many_tokens_sm90<128>(stream, layers, multiprocessors);
    }
  }
  return launch_many_tokens_sm90<64>(stream, layers, multiprocessors);
}

/// Whether that can be used, and the product is not for kernels that take fewer tokens or spread
/// the parts of columns over blocks.
template <class View, class Y, class Epilogue, int Layers>
status suits_many_tokens_sm90(const kernel::product_args<View, Y, Epilogue> (&layers)[Layers],
                              int multiprocessors, bool& suits) {
  using tune = tuning::many_tokens_sm90;
  suits = false;
  if (!tune::suits(row_blocks_of(layers, tune::rows), layers[0].tokens, multiprocessors) ||
      tensor_map_encoder() == nullptr) {
    return {};
  }
  return has_many_tokens_sm90(layers[0], suits);
}

}  // namespace device::detail
}  // namespace QEFT_TARGET
}  // namespace qeft
