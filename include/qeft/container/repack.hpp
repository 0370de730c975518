// SPDX-License-Identifier: Apache-2.0
// Moves a layer from one layout to another. Files hold row_packed; kernel layouts are made at load
// time.
#pragma once

#include "qeft/container/quantized_matrix.hpp"
#include "qeft/core/on_host.hpp"
#include "qeft/layout/simd_tile.hpp"

namespace qeft {
inline namespace QEFT_TARGET {
namespace detail {

/// Moves 32 dense codes of row n from column k, a multiple of 32, in `words` of a layout, to and
/// from a block: `Bits` words that hold them as a packed_array of their own. Code by code, for any
/// layout.
template <class Layout>
struct block_access {
  template <int Bits>
  static void read(const std::uint32_t* words, const layout::extent& e, index_t n, index_t k,
                   std::uint32_t* block) noexcept {
    for (int w = 0; w < Bits; ++w) block[w] = 0;
    for_each_field<Bits>(e, n, k, [&](code_address at, code_address in_block, std::uint32_t mask) {
      block[in_block.word] |= ((words[at.word] >> at.shift) & mask) << in_block.shift;
    });
  }
  /// @pre the words hold zeros where the codes go
  template <int Bits>
  static void write(std::uint32_t* words, const layout::extent& e, index_t n, index_t k,
                    const std::uint32_t* block) noexcept {
    for_each_field<Bits>(e, n, k, [&](code_address at, code_address in_block, std::uint32_t mask) {
      words[at.word] |= ((block[in_block.word] >> in_block.shift) & mask) << at.shift;
    });
  }

 private:
  template <int Bits, class Body>
  static void for_each_field(const layout::extent& e, index_t n, index_t k, const Body& body) {
    const index_t count = e.dense - k < 32 ? e.dense - k : 32;
    for (int p = 0; p < bit_planes<Bits>::count; ++p) {
      const std::uint32_t mask = (1U << static_cast<unsigned>(bit_planes<Bits>::width(p))) - 1U;
      for (index_t c = 0; c < count; ++c) {
        body(layout::locate<Layout, Bits>(e, p, n, k + c), packed_array<Bits>::locate(p, c, 32),
             mask);
      }
    }
  }
};

/// A row of row_packed holds each plane of a block as it is.
template <>
struct block_access<layout::row_packed> {
  template <int Bits>
  static void read(const std::uint32_t* words, const layout::extent& e, index_t n, index_t k,
                   std::uint32_t* block) noexcept {
    for (int p = 0; p < bit_planes<Bits>::count; ++p) {
      const std::uint32_t* from = words + layout::row_packed::tile_word<Bits>(e, p, n, k / 32);
      const index_t stored = stored_words<Bits>(e, p, k);
      std::uint32_t* to = block + bit_planes<Bits>::shift(p);
      for (index_t w = 0; w < bit_planes<Bits>::width(p); ++w) to[w] = w < stored ? from[w] : 0;
    }
  }
  template <int Bits>
  static void write(std::uint32_t* words, const layout::extent& e, index_t n, index_t k,
                    const std::uint32_t* block) noexcept {
    for (int p = 0; p < bit_planes<Bits>::count; ++p) {
      std::uint32_t* to = words + layout::row_packed::tile_word<Bits>(e, p, n, k / 32);
      const std::uint32_t* from = block + bit_planes<Bits>::shift(p);
      for (index_t w = 0; w < stored_words<Bits>(e, p, k); ++w) to[w] = from[w];
    }
  }

 private:
  /// Words of plane p that a row has from column k on, at most a block's.
  template <int Bits>
  static index_t stored_words(const layout::extent& e, int p, index_t k) noexcept {
    const index_t columns = e.dense - k < 32 ? e.dense - k : 32;
    return ceil_div(columns * bit_planes<Bits>::width(p), 32);
  }
};

/// A row of a tile of simd_tile holds the words of a block at a distance; those of a second plane
/// have their fields in another order.
template <>
struct block_access<layout::simd_tile> {
  using layout_type = layout::simd_tile;

  template <int Bits>
  static void read(const std::uint32_t* words, const layout::extent& e, index_t n, index_t k,
                   std::uint32_t* block) noexcept {
    using planes = bit_planes<Bits>;
    const std::uint32_t* row = words + first_word<Bits>(e, n, k);
    for (int w = 0; w < Bits; ++w) block[w] = row[w * layout_type::rows];
    if constexpr (is_interleaved<Bits>) {
      block[2] = even_bits(block[2]) | even_bits(block[2] >> 1U) << 16U;
    } else if constexpr (planes::count == 2) {
      for (int w = planes::shift(1); w < Bits; ++w) block[w] = 0;
      for_each_narrow_field<Bits>(
          [&](int from, int to, int shift, int to_shift, std::uint32_t mask) {
            block[to] |= ((row[from * layout_type::rows] >> shift) & mask) << to_shift;
          });
    }
  }
  template <int Bits>
  static void write(std::uint32_t* words, const layout::extent& e, index_t n, index_t k,
                    const std::uint32_t* block) noexcept {
    using planes = bit_planes<Bits>;
    std::uint32_t* row = words + first_word<Bits>(e, n, k);
    for (int w = 0; w < planes::width(0); ++w) row[w * layout_type::rows] = block[w];
    if constexpr (is_interleaved<Bits>) {
      row[2 * layout_type::rows] = spread(block[2] & 0xffffU) | spread(block[2] >> 16U) << 1U;
    } else if constexpr (planes::count == 2) {
      for_each_narrow_field<Bits>(
          [&](int to, int from, int to_shift, int shift, std::uint32_t mask) {
            row[to * layout_type::rows] |= ((block[from] >> shift) & mask) << to_shift;
          });
    }
  }

 private:
  /// Planes <2, 1>: the two halves of the second plane's word are interleaved.
  template <int Bits>
  static constexpr bool is_interleaved = bit_planes<Bits>::count == 2 &&
                                         bit_planes<Bits>::width(0) == 2;

  template <int Bits>
  static index_t first_word(const layout::extent& e, index_t n, index_t k) noexcept {
    return layout_type::tile_word<Bits>(e, 0, n / layout_type::rows, k / 32) +
           n % layout_type::rows;
  }
  /// body(word in the row, word in the block, shift in the row, shift in the block, mask) for the
  /// 32 fields of the second plane.
  template <int Bits, class Body>
  static void for_each_narrow_field(const Body& body) {
    using planes = bit_planes<Bits>;
    const std::uint32_t mask = (1U << static_cast<unsigned>(planes::width(1))) - 1U;
    for (int c = 0; c < 32; ++c) {
      const layout::tile_address at = layout_type::locate_in_tile<Bits>(1, 0, c);
      const int bit = c * planes::width(1);
      body(planes::shift(1) + at.word / static_cast<int>(layout_type::rows),
           planes::shift(1) + bit / 32, at.shift, bit % 32, mask);
    }
  }
  /// Bits 0, 2, 4 ... 30 of x at 0 .. 15.
  static std::uint32_t even_bits(std::uint32_t x) noexcept {
    x &= 0x55555555U;
    x = (x | x >> 1U) & 0x33333333U;
    x = (x | x >> 2U) & 0x0f0f0f0fU;
    x = (x | x >> 4U) & 0x00ff00ffU;
    return (x | x >> 8U) & 0x0000ffffU;
  }
  /// The inverse.
  static std::uint32_t spread(std::uint32_t x) noexcept {
    x = (x | x << 8U) & 0x00ff00ffU;
    x = (x | x << 4U) & 0x0f0f0f0fU;
    x = (x | x << 2U) & 0x33333333U;
    return (x | x << 1U) & 0x55555555U;
  }
};

/// Rows whose codes may share words in a layout, at least.
template <class Layout>
inline constexpr index_t rows_apart = Layout::rows < 32 ? 32 : Layout::rows;

}  // namespace detail

/// The same layer in layout `To`: every read_code, read_params and weak_weight is unchanged. Throws
/// std::bad_alloc. Layouts other than row_packed and simd_tile are read and written code by code.
template <class To, class From, class Memory>
quantized_matrix<To, Memory> repack(const on_host& exec,
                                    const quantized_matrix<From, Memory>& from) {
  static_assert(is_host_accessible_v<Memory>,
                "qeft::repack(on_host): the matrix must be in host memory");
  const matrix_descriptor& d = from.descriptor();
  if (d.out_channels == 0) return {};  // made without arguments, or moved from
  quantized_matrix<To, Memory> to(d, from.weak_index(), from.memory());
  const layout::extent e = d.extent();

  // No two threads write to one word: rows are handed out in whole tiles.
  visit_bits(d.bits, [&](auto bits) {
    exec.parallel_for(e.out_channels, detail::rows_apart<To>, [&](index_t begin, index_t end) {
      std::uint32_t block[bits];
      for (index_t n = begin; n < end; ++n) {
        for (index_t k = 0; k < e.dense; k += 32) {
          detail::block_access<From>::template read<bits>(from.code_words(), e, n, k, block);
          detail::block_access<To>::template write<bits>(to.code_words(), e, n, k, block);
        }
        for (index_t j = 0; j < e.weak; ++j) to.write_weak(n, j, from.read_weak(n, j));
      }
    });
  });
  // Packed zero points of any rows may share words: one thread.
  for (index_t n = 0; n < e.out_channels; ++n) {
    for (index_t g = 0; g < e.groups; ++g) {
      const stored_params params = from.read_params(n, g);
      to.write_params(n, g, params.scale_bits, params.zero);
    }
  }
  return to;
}

}  // namespace QEFT_TARGET
}  // namespace qeft
