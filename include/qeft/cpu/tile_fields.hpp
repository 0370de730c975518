// SPDX-License-Identifier: Apache-2.0
// Codes to numbers, 32 columns of one row of layout::simd_tile at a time. `Word` is std::uint32_t,
// or a vector of such words that belong to different rows.
#pragma once

#include "qeft/layout/simd_tile.hpp"

namespace qeft {
inline namespace QEFT_TARGET {
namespace cpu {

/// A row of a tile as `words` words of fields at equal distances, each field one whole code.
///
/// Codes of one bit plane lie in such words as they are stored. Those of two planes, a wide one and
/// a narrow one, are brought together: every stored word of the wide plane gives two words of
/// fields, with its even and its odd columns, and each gets the bits of the narrow plane on top.
template <int Bits>
struct tile_fields {
  using planes = bit_planes<Bits>;
  static_assert(planes::count <= 2, "qeft::cpu::tile_fields: at most two bit planes");

  static constexpr int wide = planes::width(0);  // bits
  static constexpr int narrow = planes::count == 2 ? planes::width(1) : 0;
  /// Words of fields made of one stored word; their columns alternate.
  static constexpr int interleave = planes::count;
  static constexpr int distance = wide * interleave;  // of fields, in bits
  static constexpr int words = distance;
  static constexpr int per_word = 32 / distance;
  static constexpr unsigned max_code = (1U << static_cast<unsigned>(Bits)) - 1U;

  /// Column of field f of word w.
  QEFT_ALWAYS_INLINE static constexpr int column(int w, int f) noexcept {
    return w / interleave * per_word * interleave + f * interleave + w % interleave;
  }
  /// Word and lowest bit of a column's field.
  QEFT_ALWAYS_INLINE static constexpr code_address locate(int c) noexcept {
    const int stored = c / (per_word * interleave);
    const int in_stored = c % (per_word * interleave);
    return {stored * interleave + in_stored % interleave, in_stored / interleave * distance};
  }

  /// The stored words of the tile's row that word w of the fields is made of: of the wide plane,
  /// and of the narrow one (the same again where there is none).
  QEFT_ALWAYS_INLINE static constexpr int low_word(int w) noexcept { return w / interleave; }
  QEFT_ALWAYS_INLINE static constexpr int high_word(int w) noexcept {
    if constexpr (planes::count == 1) {
      return low_word(w);
    } else {
      return wide + low_word(w) * narrow / wide;
    }
  }

  /// Word W of the fields.
  template <int W, class Word>
  QEFT_ALWAYS_INLINE static constexpr Word join(Word low, [[maybe_unused]] Word high) noexcept {
    if constexpr (planes::count == 1) {
      return low;
    } else {
      // The layout keeps the narrow bits of a column where its wide field lies, moved up by a
      // number of fields that depends on the stored word; they belong on top of the wide field.
      constexpr int to_lowest = W % interleave * wide;
      constexpr int to_top = wide - to_lowest - low_word(W) % (wide / narrow) * narrow;
      return (shift_right<to_lowest>(low) & repeated((1U << wide) - 1U)) |
             (shift_right<-to_top>(high) & repeated(((1U << narrow) - 1U) << wide));
    }
  }

  /// isolate<c>() returns code * 2^exponent(c). Isolating a field where it lies costs one
  /// operation; the power of two goes into the activation.
  QEFT_ALWAYS_INLINE static constexpr int exponent(int c) noexcept {
    return touches_sign(c) ? 0 : locate(c).shift;
  }
  /// The field of column C, out of its word of fields: code * 2^exponent(C) as a non-negative int.
  template <int C, class Word>
  QEFT_ALWAYS_INLINE static constexpr Word isolate(Word word) noexcept {
    constexpr int shift = locate(C).shift;
    if constexpr (touches_sign(C)) {
      return word >> shift;
    } else {
      return word & (max_code << static_cast<unsigned>(shift));
    }
  }

  // Four codes to a word, one per byte, for integer dot products. Bytes hold at most 4 bits, so
  // that 16 products with signed bytes fit 16 bits; longer codes are taken in two halves.
  static constexpr int halves = Bits > 4 ? 2 : 1;
  static constexpr int quads = 8;  // per half

  /// Word of fields that quad q is taken from.
  QEFT_ALWAYS_INLINE static constexpr int quad_word(int q) noexcept { return q * words / quads; }
  /// Column of byte b of quad q.
  QEFT_ALWAYS_INLINE static constexpr int quad_column(int q, int b) noexcept {
    constexpr int per_byte = 8 / distance;
    return column(quad_word(q), b * per_byte + q % per_byte);
  }
  /// Quad Q out of its word of fields: four times 4 bits `Half` of the codes.
  template <int Q, int Half, class Word>
  QEFT_ALWAYS_INLINE static constexpr Word isolate_quad(Word word) noexcept {
    constexpr int shift = halves == 2 ? 4 * Half : Q % (8 / distance) * distance;
    constexpr std::uint32_t mask = 0x01010101U * (halves == 2 ? 0xfU : max_code);
    return shift_right<shift>(word) & mask;
  }

 private:
  QEFT_ALWAYS_INLINE static constexpr bool touches_sign(int c) noexcept {
    return locate(c).shift + Bits == 32;
  }
  /// `field` in every field of a word.
  QEFT_ALWAYS_INLINE static constexpr std::uint32_t repeated(std::uint32_t field) noexcept {
    std::uint32_t word = 0;
    for (int shift = 0; shift < 32; shift += distance) word |= field << shift;
    return word;
  }
  /// Left by -Shift where Shift is negative.
  template <int Shift, class Word>
  QEFT_ALWAYS_INLINE static constexpr Word shift_right(Word word) noexcept {
    if constexpr (Shift > 0) {
      return word >> Shift;
    } else if constexpr (Shift < 0) {
      return word << -Shift;
    } else {
      return word;
    }
  }
};

}  // namespace cpu
}  // namespace QEFT_TARGET
}  // namespace qeft
