// SPDX-License-Identifier: Apache-2.0
// Codes to numbers, 32 columns of one row of layout::simd_tile at a time. `Word` is std::uint32_t,
// or a vector of such words that belong to different rows.
#pragma once

#include "qeft/layout/simd_tile.hpp"

namespace qeft {

/// A row of a tile as `words` words of fields at equal distances, each field one whole code.
///
/// For 2, 4 and 8 bits these are the stored words. The two planes of 3-bit codes are brought
/// together into nibbles: even and odd columns of 0..15, then even and odd columns of 16..31.
template <int Bits>
struct tile_fields {
  static constexpr int columns = 32;
  static constexpr int distance = Bits == 3 ? 4 : Bits;  // in bits
  static constexpr int words = distance;
  static constexpr int per_word = 32 / distance;
  static constexpr unsigned max_code = (1U << static_cast<unsigned>(Bits)) - 1U;

  /// Column of field f of word w.
  QEFT_HOST_DEVICE static constexpr int column(int w, int f) noexcept {
    if (Bits == 3) return 16 * (w / 2) + 2 * f + w % 2;
    return w * per_word + f;
  }
  /// Word and lowest bit of a column's field.
  QEFT_HOST_DEVICE static constexpr code_address locate(int c) noexcept {
    if (Bits == 3) return {2 * (c / 16) + c % 2, 4 * (c % 16 / 2)};
    return {c / per_word, c % per_word * distance};
  }

  /// The stored words of the tile's row that word w of the fields is made of: its own, and for 3
  /// bits the one with the high bits.
  QEFT_HOST_DEVICE static constexpr int low_word(int w) noexcept { return Bits == 3 ? w / 2 : w; }
  QEFT_HOST_DEVICE static constexpr int high_word(int w) noexcept { return Bits == 3 ? 2 : w; }

  /// Word W of the fields.
  template <int W, class Word>
  QEFT_HOST_DEVICE static constexpr Word join(Word low, [[maybe_unused]] Word high) noexcept {
    if constexpr (Bits == 3) {
      // Column c of the tile has its high bit at 2 * (c % 16) + c / 16 and wants it two bits above
      // the field's lowest.
      constexpr std::uint32_t low_mask = 0x33333333U;
      constexpr std::uint32_t high_mask = 0x44444444U;
      if constexpr (W == 0) return (low & low_mask) | ((high << 2) & high_mask);
      if constexpr (W == 1) return ((low >> 2) & low_mask) | (high & high_mask);
      if constexpr (W == 2) return (low & low_mask) | ((high << 1) & high_mask);
      if constexpr (W == 3) return ((low >> 2) & low_mask) | ((high >> 1) & high_mask);
    } else {
      return low;
    }
  }

  /// isolate<c>() returns code * 2^exponent(c). Isolating a field where it lies costs one
  /// operation; the power of two goes into the activation, where it is exact.
  QEFT_HOST_DEVICE static constexpr int exponent(int c) noexcept {
    return touches_sign(c) ? 0 : locate(c).shift;
  }
  /// The field of column C, out of its word of fields: code * 2^exponent(C) as a non-negative int.
  template <int C, class Word>
  QEFT_HOST_DEVICE static constexpr Word isolate(Word word) noexcept {
    constexpr int shift = locate(C).shift;
    if constexpr (touches_sign(C)) {
      return word >> shift;
    } else {
      return word & (max_code << static_cast<unsigned>(shift));
    }
  }

  // Four codes to a word, one per byte, for integer dot products. Bytes hold at most 4 bits, so
  // that 16 products with signed bytes fit 16 bits; codes of 8 bits are taken in two halves.
  static constexpr int halves = Bits == 8 ? 2 : 1;
  static constexpr int quads = 8;  // per half

  /// Word of fields that quad q is taken from.
  QEFT_HOST_DEVICE static constexpr int quad_word(int q) noexcept { return q * words / quads; }
  /// Column of byte b of quad q.
  QEFT_HOST_DEVICE static constexpr int quad_column(int q, int b) noexcept {
    constexpr int per_byte = 8 / distance;
    return column(quad_word(q), b * per_byte + q % per_byte);
  }
  /// Quad Q out of its word of fields: four times 4 bits `Half` of the codes.
  template <int Q, int Half, class Word>
  QEFT_HOST_DEVICE static constexpr Word isolate_quad(Word word) noexcept {
    constexpr int shift = Bits == 8 ? 4 * Half : Q % (8 / distance) * distance;
    constexpr std::uint32_t mask = 0x01010101U * (Bits == 8 ? 0xfU : max_code);
    if constexpr (shift == 0) {
      return word & mask;
    } else {
      return (word >> shift) & mask;
    }
  }

 private:
  QEFT_HOST_DEVICE static constexpr bool touches_sign(int c) noexcept {
    return locate(c).shift + Bits == 32;
  }
};

}  // namespace qeft
