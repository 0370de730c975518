// SPDX-License-Identifier: Apache-2.0
// From one layout to another, for any two layouts, and rows in another order on the way.
#pragma once

#include "qeft/arch/index.cuh"
#include "qeft/layout/fragment.hpp"
#include "qeft/layout/row_packed.hpp"
#include "qeft/layout/simd_tile.hpp"

namespace qeft::kernel {

/// Row n of what is written is row source[n] of what is read; without a list, row n.
struct row_source {
  const std::int32_t* source;  // (OC), or null

  __device__ index_t operator()(index_t n) const { return source == nullptr ? n : source[n]; }
};

/// Whether no word holds fields of two tiles or planes. Else those of a row are written one by one.
template <class Layout>
inline constexpr bool tiles_apart = false;
template <>
inline constexpr bool tiles_apart<layout::row_packed> = true;
template <>
inline constexpr bool tiles_apart<layout::fragment> = true;
template <>
inline constexpr bool tiles_apart<layout::simd_tile> = true;

/// Words of a plane from the first one of a tile to its last one.
template <class Layout, int Bits, int Plane>
inline constexpr int tile_span = [] {
  int words = 0;
  if constexpr (Plane < bit_planes<Bits>::count) {
    for (int r = 0; r < static_cast<int>(Layout::rows); ++r) {
      for (int c = 0; c < static_cast<int>(Layout::template columns<Bits>); ++c) {
        const int word = Layout::template locate_in_tile<Bits>(Plane, r, c).word;
        words = word < words ? words : word + 1;
      }
    }
  }
  return words;
}();

template <class To>
inline constexpr int repack_warps = tiles_apart<To> ? 4 : 1;

/// A warp makes a tile of codes in shared memory, then writes those of its words that are not zero.
/// blockIdx.x counts rows of tiles; the warps of gridDim.y blocks share their columns.
/// @param to zeros before
template <int Bits, class To, class From>
__global__ void __launch_bounds__(32 * repack_warps<To>)
    repack_codes(layout::extent e, const std::uint32_t* from, std::uint32_t* to,
                 row_source source) {
  using planes = bit_planes<Bits>;
  constexpr int columns = static_cast<int>(To::template columns<Bits>);
  constexpr int codes = static_cast<int>(To::rows) * columns;
  constexpr int first_words = tile_span<To, Bits, 0>;
  constexpr int words = first_words + tile_span<To, Bits, 1>;
  constexpr int warps = repack_warps<To>;
  __shared__ std::uint32_t shared[warps][words];
  const int lane = arch::lane();
  const int warp = arch::warp();
  std::uint32_t* const tile = shared[warp];

  const index_t n_tile = blockIdx.x;
  const index_t k_tiles = ceil_quotient(e.dense, columns);
  for (index_t k_tile = blockIdx.y * warps + warp; k_tile < k_tiles; k_tile += gridDim.y * warps) {
    for (int i = lane; i < words; i += 32) tile[i] = 0;
    __syncwarp();
    for (int i = lane; i < codes; i += 32) {
      const index_t n = n_tile * To::rows + i / columns;
      const index_t k = k_tile * columns + i % columns;
      if (n >= e.out_channels || k >= e.dense) continue;
      for (int p = 0; p < planes::count; ++p) {
        const code_address at = layout::locate<From, Bits>(e, p, source(n), k);
        const std::uint32_t field = (from[at.word] >> at.shift) & ((1U << planes::width(p)) - 1U);
        const layout::tile_address in =
            To::template locate_in_tile<Bits>(p, i / columns, i % columns);
        atomicOr(tile + p * first_words + in.word, field << in.shift);
      }
    }
    __syncwarp();
    for (int p = 0; p < planes::count; ++p) {
      std::uint32_t* const place = to + To::template tile_word<Bits>(e, p, n_tile, k_tile);
      const std::uint32_t* const plane = tile + p * first_words;
      for (int i = lane; i < (p == 0 ? first_words : words - first_words); i += 32) {
        if (plane[i] != 0) place[i] = tiles_apart<To> ? plane[i] : place[i] | plane[i];
      }
      __syncwarp();
    }
  }
}

/// The 16-bit arrays of a layer.
template <class T>
struct scalar_arrays {
  T* scales;
  T* zeros;  // when they are scaled
  T* weak;
};

/// A warp copies scales, scaled zero points and weak columns of a row.
template <class To, class From>
__global__ void repack_scalars(layout::extent e, scalar_arrays<const std::uint16_t> from,
                               scalar_arrays<std::uint16_t> to, row_source source) {
  const index_t n = (index_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32;
  if (n >= e.out_channels) return;
  const index_t s = source(n);
  const index_t lane = arch::lane();
  for (index_t j = lane; j < e.weak; j += 32) {
    to.weak[To::weak_index(e, n, j)] = from.weak[From::weak_index(e, s, j)];
  }
  for (index_t g = lane; g < e.groups; g += 32) {
    to.scales[To::scale_index(e, n, g)] = from.scales[From::scale_index(e, s, g)];
    if (e.zero != zero_kind::scaled) continue;
    to.zeros[To::zero_index(e, n, g)] = from.zeros[From::zero_index(e, s, g)];
  }
}

/// A warp copies integer zero points of a row, any two of which may share a word.
/// @param to zeros before, where they go
template <int Bits, class To, class From>
__global__ void repack_zeros(layout::extent e, const std::uint32_t* from, std::uint32_t* to,
                             row_source source) {
  using planes = bit_planes<Bits>;
  const index_t n = (index_t{blockIdx.x} * blockDim.x + threadIdx.x) / 32;
  if (n >= e.out_channels) return;
  for (index_t g = arch::lane(); g < e.groups; g += 32) {
    const unsigned zero = gather_code<Bits>(from, layout::zero_place<From, Bits>{e, source(n), g});
    for (int p = 0; p < planes::count; ++p) {
      const code_address at = To::template locate_zero<Bits>(e, p, n, g);
      const std::uint32_t field = (zero >> planes::shift(p)) & ((1U << planes::width(p)) - 1U);
      atomicOr(to + at.word, field << at.shift);
    }
  }
}

}  // namespace qeft::kernel
