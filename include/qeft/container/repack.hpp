// SPDX-License-Identifier: Apache-2.0
// Moves a layer from one layout to another. Files hold row_packed; kernel layouts are made at load
// time.
#pragma once

#include <numeric>

#include "qeft/container/copy_rows.hpp"
#include "qeft/core/on_host.hpp"
#include "qeft/layout/simd_tile.hpp"

namespace qeft {
inline namespace QEFT_TARGET {
namespace detail {

/// The codes of 32 rows and 32 columns: words[0 .. Bits - 1][r] are a packed_array of the codes of
/// row r.
template <int Bits>
struct code_block {
  std::uint32_t words[static_cast<std::size_t>(Bits)][32] = {};
};

/// Moves 32 x 32 codes from row n and dense column k, multiples of 32, in `words` of a layout, to
/// and from a block; less at the end. Code by code, for any layout.
/// @pre the block holds zeros before read, and the words where the codes go before write
template <class Layout>
struct block_access {
  template <int Bits>
  static void read(const std::uint32_t* words, const layout::extent& e, index_t n, index_t k,
                   code_block<Bits>& block) noexcept {
    for_each_field<Bits>(
        e, n, k, [&](code_address at, index_t r, code_address in_block, std::uint32_t mask) {
          block.words[in_block.word][r] |= ((words[at.word] >> at.shift) & mask) << in_block.shift;
        });
  }
  template <int Bits>
  static void write(std::uint32_t* words, const layout::extent& e, index_t n, index_t k,
                    const code_block<Bits>& block) noexcept {
    for_each_field<Bits>(
        e, n, k, [&](code_address at, index_t r, code_address in_block, std::uint32_t mask) {
          words[at.word] |= ((block.words[in_block.word][r] >> in_block.shift) & mask) << at.shift;
        });
  }

 private:
  template <int Bits, class Body>
  static void for_each_field(const layout::extent& e, index_t n, index_t k, const Body& body) {
    for (int p = 0; p < bit_planes<Bits>::count; ++p) {
      const std::uint32_t mask = (1U << static_cast<unsigned>(bit_planes<Bits>::width(p))) - 1U;
      for (index_t r = 0; r < 32 && n + r < e.out_channels; ++r) {
        for (index_t c = 0; c < 32 && k + c < e.dense; ++c) {
          body(layout::locate<Layout, Bits>(e, p, n + r, k + c), r,
               packed_array<Bits>::locate(p, c, 32), mask);
        }
      }
    }
  }
};

/// A row of row_packed holds each plane of a block as it is.
template <>
struct block_access<layout::row_packed> {
  template <int Bits>
  static void read(const std::uint32_t* words, const layout::extent& e, index_t n, index_t k,
                   code_block<Bits>& block) noexcept {
    for_each_word<Bits>(words, e, n, k,
                        [&](index_t at, int w, index_t r) { block.words[w][r] = words[at]; });
  }
  template <int Bits>
  static void write(std::uint32_t* words, const layout::extent& e, index_t n, index_t k,
                    const code_block<Bits>& block) noexcept {
    for_each_word<Bits>(words, e, n, k,
                        [&](index_t at, int w, index_t r) { words[at] = block.words[w][r]; });
  }

 private:
  /// body(word, its place in a row of the block, row of the block). Asks for the next line of every
  /// row, as there are more rows than a core has prefetchers.
  template <int Bits, class Body>
  static void for_each_word(const std::uint32_t* words, const layout::extent& e, index_t n,
                            index_t k, const Body& body) {
    const index_t rows = e.out_channels - n < 32 ? e.out_channels - n : 32;
    const index_t columns = e.dense - k < 32 ? e.dense - k : 32;
    for (int p = 0; p < bit_planes<Bits>::count; ++p) {
      const index_t first = layout::row_packed::tile_word<Bits>(e, p, n, k / 32);
      const auto stored = static_cast<int>(packed_array<Bits>::plane_words(p, columns));
      for (index_t r = 0; r < rows; ++r) {
        const index_t at = first + r * layout::row_packed::row_words<Bits>(e);
        QEFT_PREFETCH(reinterpret_cast<std::uintptr_t>(words + at) + 64);
        for (int w = 0; w < stored; ++w) body(at + w, bit_planes<Bits>::shift(p) + w, r);
      }
    }
  }
};

/// A tile of simd_tile is a block, but that the fields of a second plane have another order.
template <>
struct block_access<layout::simd_tile> {
  using layout_type = layout::simd_tile;
  static_assert(layout_type::rows == 32);

  template <int Bits>
  static void read(const std::uint32_t* words, const layout::extent& e, index_t n, index_t k,
                   code_block<Bits>& block) noexcept {
    const std::uint32_t* tile = words + layout_type::tile_word<Bits>(e, 0, n / 32, k / 32);
    for (int w = 0; w < first_plane<Bits>; ++w) {
      for (int r = 0; r < 32; ++r) block.words[w][r] = tile[w * 32 + r];
    }
    if constexpr (is_shuffled<Bits>) {
      for (int r = 0; r < 32; ++r) block.words[2][r] = unshuffled(tile[2 * 32 + r]);
    } else {
      for_each_narrow_field<Bits>([&](tile_address at, code_address in_block, std::uint32_t mask) {
        for (int r = 0; r < 32; ++r) {
          block.words[in_block.word][r] |= ((tile[at.word + r] >> at.shift) & mask)
                                           << in_block.shift;
        }
      });
    }
  }
  template <int Bits>
  static void write(std::uint32_t* words, const layout::extent& e, index_t n, index_t k,
                    const code_block<Bits>& block) noexcept {
    std::uint32_t* tile = words + layout_type::tile_word<Bits>(e, 0, n / 32, k / 32);
    for (int w = 0; w < first_plane<Bits>; ++w) {
      for (int r = 0; r < 32; ++r) tile[w * 32 + r] = block.words[w][r];
    }
    if constexpr (is_shuffled<Bits>) {
      for (int r = 0; r < 32; ++r) tile[2 * 32 + r] = shuffled(block.words[2][r]);
    } else {
      for_each_narrow_field<Bits>([&](tile_address at, code_address in_block, std::uint32_t mask) {
        for (int r = 0; r < 32; ++r) {
          tile[at.word + r] |= ((block.words[in_block.word][r] >> in_block.shift) & mask)
                               << at.shift;
        }
      });
    }
  }

 private:
  using tile_address = layout::tile_address;

  /// Words of the first plane in a row of a block.
  template <int Bits>
  static constexpr int first_plane = bit_planes<Bits>::width(0);
  /// Planes <2, 1>: the two halves of the second plane's word are interleaved.
  template <int Bits>
  static constexpr bool is_shuffled = bit_planes<Bits>::count == 2 && first_plane<Bits> == 2;

  /// body(field of row 0 in the tile, in a row of the block, mask) for the 32 fields of a second
  /// plane, if there is one.
  template <int Bits, class Body>
  static void for_each_narrow_field(const Body& body) {
    if constexpr (bit_planes<Bits>::count == 2) {
      const std::uint32_t mask = (1U << static_cast<unsigned>(bit_planes<Bits>::width(1))) - 1U;
      for (int c = 0; c < 32; ++c) {
        tile_address at = layout_type::locate_in_tile<Bits>(1, 0, c);
        at.word += first_plane<Bits> * 32;
        body(at, packed_array<Bits>::locate(1, c, 32), mask);
      }
    }
  }
  /// The lower 16 bits of x at the even places and the upper 16 at the odd ones, in their order.
  static std::uint32_t shuffled(std::uint32_t x) noexcept {
    return exchange_middle<1>(exchange_middle<2>(exchange_middle<4>(exchange_middle<8>(x))));
  }
  static std::uint32_t unshuffled(std::uint32_t x) noexcept {
    return exchange_middle<8>(exchange_middle<4>(exchange_middle<2>(exchange_middle<1>(x))));
  }
  /// Of every four runs of `Run` bits, the middle two exchanged.
  template <int Run>
  static std::uint32_t exchange_middle(std::uint32_t x) noexcept {
    constexpr std::uint32_t lower = Run == 8   ? 0x0000ff00U
                                    : Run == 4 ? 0x00f000f0U
                                    : Run == 2 ? 0x0c0c0c0cU
                                               : 0x22222222U;
    const std::uint32_t differing = (x ^ x >> Run) & lower;
    return x ^ differing ^ differing << Run;
  }
};

/// Rows that one thread writes, block by block: whole tiles, so that no two threads write to one
/// word.
template <class Layout>
inline constexpr index_t rows_apart = std::lcm(index_t{32}, Layout::rows);

template <int Bits, class To, class From, class Memory>
void repack_codes(const on_host& exec, const quantized_matrix<From, Memory>& from,
                  quantized_matrix<To, Memory>& to) {
  const layout::extent e = from.descriptor().extent();
  exec.parallel_for(e.out_channels, rows_apart<To>, [&](index_t begin, index_t end) {
    for (index_t n = begin; n < end; n += 32) {
      for (index_t k = 0; k < e.dense; k += 32) {
        code_block<Bits> block;
        block_access<From>::template read<Bits>(from.code_words(), e, n, k, block);
        block_access<To>::template write<Bits>(to.code_words(), e, n, k, block);
      }
    }
  });
}

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
  visit_bits(d.bits, [&](auto bits) { detail::repack_codes<bits>(exec, from, to); });
  const auto same_row = [](index_t n) { return n; };
  exec.parallel_for(d.out_channels, 32, [&](index_t begin, index_t end) {
    detail::copy_scalars(from, to, begin, end, same_row);
  });
  detail::copy_integer_zeros(from, to, same_row);
  return to;
}

}  // namespace QEFT_TARGET
}  // namespace qeft
