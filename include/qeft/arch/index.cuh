// SPDX-License-Identifier: Apache-2.0
// Where a thread stands. Blocks have one dimension.
#pragma once

#include "qeft/core/config.hpp"

namespace qeft::arch {

/// This thread's number in its warp.
__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x % 32U); }
/// Its warp's number in the block.
__device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x / 32U); }
/// The same from one lane, so that the compiler knows it to be the same in all. All lanes take
/// part.
__device__ __forceinline__ int uniform_warp() { return __shfl_sync(0xffffffffU, warp(), 0); }

}  // namespace qeft::arch
