// SPDX-License-Identifier: Apache-2.0
// The sizes a layout needs to place everything a layer stores, and what a layout is.
//
// A layout is a stateless type that owns the storage: it says how many words and scalars a layer
// needs and where each code, scale, zero point and weak value lies among them. In its static
// members all indices are in range; n is an output channel, k a dense column, g a group, j a weak
// column, p a bit plane of a code.
//
// Codes, 32-bit words in tiles of `rows` x `columns<Bits>`; tiles of different rows share no word:
//   rows, columns<Bits>                    positive constants
//   code_words<Bits>(e)                    words of codes
//   tile_word<Bits>(e, p, n_tile, k_tile)  the word from which plane p of a tile is counted
//   locate_in_tile<Bits>(p, r, c)          field of row r and column c of a tile, in 32 bits
// Scales, and zero points when they are `scaled`, 16-bit scalars:
//   scale_count(e), scale_index(e, n, g)
//   zero_count(e), zero_index(e, n, g)     used only when e.zero is `scaled`
// Integer zero points, fields of 32-bit words:
//   zero_words<Bits>(e), locate_zero<Bits>(e, p, n, g)
// Weak columns, 16-bit scalars:
//   weak_count(e), weak_index(e, n, j)
// Zero points beside the scales:
//   zeros_in_scales                        when true, zero points of both kinds lie in the array of
//                                          scales, and zero_count and zero_words are not asked for
//
// Maps are injective and closed-form on host and device. What no map reaches is padding and holds
// zeros. tests/support/layout_laws.hpp checks all of this for any layout.
#pragma once

#include "qeft/core/math.hpp"
#include "qeft/format/bit_planes.hpp"
#include "qeft/format/quant_format.hpp"

namespace qeft::layout {

struct extent {
  index_t out_channels;                 // OC
  index_t dense;                        // IC - k, columns that have codes
  index_t groups;                       // groups per row
  index_t weak;                         // k, full-precision columns
  zero_kind zero = zero_kind::integer;  // kind of zero points
};

/// A field of a 32-bit word of a tile.
struct tile_address {
  int word;
  int shift;  // of the field's lowest bit
};

/// Where bit plane p of the code of output channel n and dense column k lies.
template <class Layout, int Bits>
QEFT_HOST_DEVICE constexpr code_address locate(const extent& e, int p, index_t n,
                                               index_t k) noexcept {
  constexpr index_t columns = Layout::template columns<Bits>;
  const index_t n_tile = quotient(n, Layout::rows);
  const index_t k_tile = quotient(k, columns);
  const tile_address in = Layout::template locate_in_tile<Bits>(
      p, static_cast<int>(n - n_tile * Layout::rows), static_cast<int>(k - k_tile * columns));
  return {Layout::template tile_word<Bits>(e, p, n_tile, k_tile) + in.word, in.shift};
}

/// locate for one code, as gather_code and scatter_code want it. (A type, because CUDA C++ does not
/// let host-device functions call the lambda of a host function.)
template <class Layout, int Bits>
struct code_place {
  extent e;
  index_t n;  // output channel
  index_t k;  // dense column
  QEFT_HOST_DEVICE constexpr code_address operator()(int p) const noexcept {
    return locate<Layout, Bits>(e, p, n, k);
  }
};

/// Where the planes of an integer zero point lie.
template <class Layout, int Bits>
struct zero_place {
  extent e;
  index_t n;  // output channel
  index_t g;  // group
  QEFT_HOST_DEVICE constexpr code_address operator()(int p) const noexcept {
    return Layout::template locate_zero<Bits>(e, p, n, g);
  }
};

}  // namespace qeft::layout
