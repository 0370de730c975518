// SPDX-License-Identifier: Apache-2.0
// Y = X W^T by the definition, for layouts that have no kernels of their own.
#pragma once

#include "qeft/arch/index.cuh"
#include "qeft/container/quantized_matrix_view.hpp"
#include "qeft/thread/epilogue.hpp"

namespace qeft::kernel {

/// A warp takes one row; blockIdx.y is the token. Lanes take columns in turn, and their sums are
/// added pairwise.
/// @param x (tokens, IC)  @param y (tokens, OC)
template <class View, class X, class Y, class Epilogue>
__global__ void any_layout(const __grid_constant__ View w, const X* x, Y* y,
                           const __grid_constant__ Epilogue epilogue) {
  const index_t channel = static_cast<index_t>(blockIdx.x) * (blockDim.x / 32U) + arch::warp();
  const index_t token = blockIdx.y;
  if (channel >= w.out_channels) return;
  const X* const from = x + token * w.in_channels;
  float sum = 0.0F;
  for (index_t c = arch::lane(); c < w.in_channels; c += 32) {
    sum = fmaf(dequantize(w, channel, c), to_float(from[c]), sum);
  }
  for (int distance = 16; distance > 0; distance /= 2) {
    sum += __shfl_xor_sync(0xffffffffU, sum, distance);
  }
  if (arch::lane() == 0) {
    y[token * w.out_channels + epilogue::destination(epilogue, channel)] =
        from_float<Y>(epilogue(sum, token, channel));
  }
}

}  // namespace qeft::kernel
