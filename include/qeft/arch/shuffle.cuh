// SPDX-License-Identifier: Apache-2.0
// Values from other lanes of a warp.
#pragma once

#include "qeft/core/unroll.hpp"

namespace qeft::arch {

/// x of lane `lane` among each Width lanes in a row. All lanes take part.
template <int Width>
__device__ __forceinline__ std::uint32_t from_lane(std::uint32_t x, int lane) {
  return __shfl_sync(0xffffffffU, x, lane, Width);
}
template <int Width>
__device__ __forceinline__ float from_lane(float x, int lane) {
  return __shfl_sync(0xffffffffU, x, lane, Width);
}
/// The same with a constant lane, which takes no register.
template <int Width, int Lane>
__device__ __forceinline__ std::uint32_t from_lane(std::uint32_t x, constant<Lane>) {
  constexpr unsigned range = (32U - Width) << 8U | 31U;
  std::uint32_t of_lane;
  asm volatile("shfl.sync.idx.b32 %0, %1, %2, %3, 0xffffffff;"
               : "=r"(of_lane)
               : "r"(x), "n"(Lane), "n"(range));
  return of_lane;
}
template <int Width, int Lane>
__device__ __forceinline__ float from_lane(float x, constant<Lane>) {
  constexpr unsigned range = (32U - Width) << 8U | 31U;
  float of_lane;
  asm volatile("shfl.sync.idx.b32 %0, %1, %2, %3, 0xffffffff;"
               : "=f"(of_lane)
               : "f"(x), "n"(Lane), "n"(range));
  return of_lane;
}

}  // namespace qeft::arch
