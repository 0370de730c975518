// SPDX-License-Identifier: Apache-2.0
// Whole packed arrays at once: the fast counterparts of scatter_code and gather_code for
// packed_array, that is, for rows of row_packed matrices and for arrays of integer zero points.
#pragma once

#include "qeft/format/bit_planes.hpp"

namespace qeft {
inline namespace QEFT_TARGET {

/// Writes `count` codes (the upper bits of each are ignored) as a packed_array<Bits>.
/// @param words (packed_array<Bits>::words(count)), overwritten; padding becomes zero
template <int Bits>
void pack_array(const std::uint8_t* codes, index_t count, std::uint32_t* words) noexcept {
  using planes = bit_planes<Bits>;
  for (int p = 0; p < planes::count; ++p) {
    const auto width = static_cast<unsigned>(planes::width(p));
    const auto shift = static_cast<unsigned>(planes::shift(p));
    const std::uint32_t mask = (1U << width) - 1U;
    const index_t per_word = 32 / planes::width(p);
    for (index_t first = 0; first < count; first += per_word) {
      const index_t here = count - first < per_word ? count - first : per_word;
      std::uint32_t word = 0;
      for (index_t c = 0; c < here; ++c) {
        word |= ((static_cast<std::uint32_t>(codes[first + c]) >> shift) & mask)
                << (static_cast<unsigned>(c) * width);
      }
      *words++ = word;
    }
  }
}

/// The counterpart of pack_array.
template <int Bits>
void unpack_array(const std::uint32_t* words, index_t count, std::uint8_t* codes) noexcept {
  using planes = bit_planes<Bits>;
  for (index_t i = 0; i < count; ++i) codes[i] = 0;
  for (int p = 0; p < planes::count; ++p) {
    const auto width = static_cast<unsigned>(planes::width(p));
    const auto shift = static_cast<unsigned>(planes::shift(p));
    const std::uint32_t mask = (1U << width) - 1U;
    const index_t per_word = 32 / planes::width(p);
    for (index_t first = 0; first < count; first += per_word) {
      const index_t here = count - first < per_word ? count - first : per_word;
      std::uint32_t word = *words++;
      for (index_t c = 0; c < here; ++c) {
        codes[first + c] = static_cast<std::uint8_t>(codes[first + c] | ((word & mask) << shift));
        word >>= width;
      }
    }
  }
}

}  // namespace QEFT_TARGET
}  // namespace qeft
