// SPDX-License-Identifier: Apache-2.0
// What the launch of several layers is made of.
#pragma once

#include <utility>

#include "qeft/kernel/product_args.cuh"

namespace qeft {
inline namespace QEFT_TARGET {
namespace device::detail {

/// Blocks of `rows` rows of all layers together.
template <class Args, int Layers>
index_t row_blocks_of(const Args (&layers)[Layers], index_t rows) {
  index_t blocks = 0;
  for (const auto& layer : layers) blocks += ceil_div(layer.w.out_channels, rows);
  return blocks;
}

/// Numbers of what a kernel takes: one layer, or most_layers, which may be more than there are.
template <int Layers>
using layer_numbers = std::make_integer_sequence<int, Layers == 1 ? 1 : kernel::most_layers>;

/// What a kernel takes whose blocks have `rows` rows.
/// @param product_of product_of(i) of layer i; behind the last layer that of the first one stands
template <class Args, int Layers, class ProductOf, int... Index>
auto in_one_launch(const Args (&layers)[Layers], index_t rows, const ProductOf& product_of,
                   std::integer_sequence<int, Index...>) {
  const auto blocks = [&](int i) {
    return i < Layers ? static_cast<int>(ceil_div(layers[i].w.out_channels, rows)) : 0;
  };
  return kernel::product_layers<sizeof...(Index), std::decay_t<decltype(product_of(0))>>{
      {product_of(Index < Layers ? Index : 0)...}, {blocks(Index)...}};
}
template <class Args, int Layers>
auto in_one_launch(const Args (&layers)[Layers], index_t rows) {
  return in_one_launch(
      layers, rows, [&](int i) { return layers[i]; }, layer_numbers<Layers>{});
}

}  // namespace device::detail
}  // namespace QEFT_TARGET
}  // namespace qeft
