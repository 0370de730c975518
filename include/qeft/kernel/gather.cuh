// SPDX-License-Identifier: Apache-2.0
// Activations in the order in which products read them.
#pragma once

#include "qeft/thread/activation_order.hpp"

namespace qeft::kernel {

/// to[t][slot] = x[t][activation_column(slot)], the dense columns from 0 on, the weak ones from
/// `weak_begin` on. Columns between are not written.
template <class Weak, class Scalar>
__global__ void gather(Weak weak, const Scalar* x, index_t in_channels, Scalar* to, index_t stride,
                       index_t weak_begin) {
  const index_t slot = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (slot >= in_channels) return;
  const index_t dense = in_channels - weak.count();
  const index_t column = activation_column(weak, slot, in_channels);
  const index_t token = blockIdx.y;
  to[token * stride + (slot < dense ? slot : weak_begin + slot - dense)] =
      x[token * in_channels + column];
}

}  // namespace qeft::kernel
