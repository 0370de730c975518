// SPDX-License-Identifier: Apache-2.0
// What moves between two matrices of one descriptor besides codes: scales, zero points and weak
// columns of every row.
#pragma once

#include "qeft/container/quantized_matrix.hpp"

namespace qeft {
inline namespace QEFT_TARGET {
namespace detail {

/// The scales, scaled zero points and weak columns of row n of `to` become those of row source(n)
/// of `from`, for n in [begin, end). No two rows share a scalar.
template <class From, class To, class Memory, class Source>
void copy_scalars(const quantized_matrix<From, Memory>& from, quantized_matrix<To, Memory>& to,
                  index_t begin, index_t end, const Source& source) {
  const layout::extent e = from.descriptor().extent();
  // 32 x 256 at a time, as one layout may have rows side by side and the other columns.
  const auto copy = [&](index_t columns, const std::uint16_t* read, const auto& from_index,
                        std::uint16_t* write, const auto& to_index) {
    for (index_t first = begin; first < end; first += 32) {
      const index_t last = first + 32 < end ? first + 32 : end;
      for (index_t left = 0; left < columns; left += 256) {
        const index_t right = left + 256 < columns ? left + 256 : columns;
        for (index_t n = first; n < last; ++n) {
          const index_t s = source(n);
          for (index_t c = left; c < right; ++c) write[to_index(n, c)] = read[from_index(s, c)];
        }
      }
    }
  };
  copy(
      e.weak, from.weak_scalars(), [&](index_t n, index_t j) { return From::weak_index(e, n, j); },
      to.weak_scalars(), [&](index_t n, index_t j) { return To::weak_index(e, n, j); });
  copy(
      e.groups, from.scale_scalars(),
      [&](index_t n, index_t g) { return From::scale_index(e, n, g); }, to.scale_scalars(),
      [&](index_t n, index_t g) { return To::scale_index(e, n, g); });
  if (e.zero != zero_kind::scaled) return;
  copy(
      e.groups, reinterpret_cast<const std::uint16_t*>(from.zeros().data()),
      [&](index_t n, index_t g) { return From::zero_index(e, n, g); },
      reinterpret_cast<std::uint16_t*>(to.zeros().data()),
      [&](index_t n, index_t g) { return To::zero_index(e, n, g); });
}

/// The same for integer zero points, if there are any, and all rows: any two may share a word.
template <class From, class To, class Memory, class Source>
void copy_integer_zeros(const quantized_matrix<From, Memory>& from,
                        quantized_matrix<To, Memory>& to, const Source& source) {
  const matrix_descriptor& d = from.descriptor();
  if (d.zero != zero_kind::integer) return;
  const layout::extent e = d.extent();
  const auto* read = reinterpret_cast<const std::uint32_t*>(from.zeros().data());
  std::byte* write = to.zeros().data();
  visit_bits(d.bits, [&](auto bits) {
    for (index_t n = 0; n < e.out_channels; ++n) {
      const index_t s = source(n);
      for (index_t g = 0; g < e.groups; ++g) {
        const unsigned zero = gather_code<bits>(read, layout::zero_place<From, bits>{e, s, g});
        scatter_zero<bits>(write, zero, layout::zero_place<To, bits>{e, n, g});
      }
    }
  });
}

}  // namespace detail
}  // namespace QEFT_TARGET
}  // namespace qeft
