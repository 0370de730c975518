// SPDX-License-Identifier: Apache-2.0
// What moves between two matrices of one descriptor besides codes: scales, zero points and weak
// columns of every row.
#pragma once

#include "qeft/container/quantized_matrix.hpp"

namespace qeft {
inline namespace QEFT_TARGET {
namespace detail {

/// Row n of `to` gets the scales and zero points of row source(n) of `from`.
template <class From, class To, class Memory, class Source>
void copy_params(const quantized_matrix<From, Memory>& from, quantized_matrix<To, Memory>& to,
                 const Source& source) {
  const matrix_descriptor& d = from.descriptor();
  const layout::extent e = d.extent();
  const auto for_each_group = [&](const auto& body) {
    for (index_t n = 0; n < e.out_channels; ++n) {
      for (index_t g = 0; g < e.groups; ++g) body(source(n), n, g);
    }
  };
  const std::uint16_t* scales = from.scale_scalars();
  std::uint16_t* to_scales = to.scale_scalars();
  for_each_group([&e, scales, to_scales](index_t s, index_t n, index_t g) {
    to_scales[To::scale_index(e, n, g)] = scales[From::scale_index(e, s, g)];
  });
  if (d.zero == zero_kind::scaled) {
    const auto* zeros = reinterpret_cast<const std::uint16_t*>(from.zeros().data());
    auto* to_zeros = reinterpret_cast<std::uint16_t*>(to.zeros().data());
    for_each_group([&e, zeros, to_zeros](index_t s, index_t n, index_t g) {
      to_zeros[To::zero_index(e, n, g)] = zeros[From::zero_index(e, s, g)];
    });
  } else if (d.zero == zero_kind::integer) {
    const auto* zeros = reinterpret_cast<const std::uint32_t*>(from.zeros().data());
    auto* to_zeros = reinterpret_cast<std::uint32_t*>(to.zeros().data());
    visit_bits(d.bits, [&](auto bits) {
      for_each_group([&e, zeros, to_zeros](index_t s, index_t n, index_t g) {
        constexpr int b = decltype(bits)::value;
        const unsigned zero = gather_code<b>(zeros, layout::zero_place<From, b>{e, s, g});
        scatter_code<b>(to_zeros, zero, layout::zero_place<To, b>{e, n, g});
      });
    });
  }
}

/// Row n of `to` gets the weak columns of row source(n) of `from`, for n in [begin, end): 32 x 256
/// at a time, as one layout may have rows side by side and the other columns.
template <class From, class To, class Memory, class Source>
void copy_weak(const quantized_matrix<From, Memory>& from, quantized_matrix<To, Memory>& to,
               index_t begin, index_t end, const Source& source) {
  const layout::extent e = from.descriptor().extent();
  const std::uint16_t* values = from.weak_scalars();
  std::uint16_t* to_values = to.weak_scalars();
  for (index_t first = begin; first < end; first += 32) {
    const index_t last = first + 32 < end ? first + 32 : end;
    for (index_t left = 0; left < e.weak; left += 256) {
      const index_t right = left + 256 < e.weak ? left + 256 : e.weak;
      for (index_t n = first; n < last; ++n) {
        for (index_t j = left; j < right; ++j) {
          to_values[To::weak_index(e, n, j)] = values[From::weak_index(e, source(n), j)];
        }
      }
    }
  }
}

}  // namespace detail
}  // namespace QEFT_TARGET
}  // namespace qeft
