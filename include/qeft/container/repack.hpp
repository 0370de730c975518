// SPDX-License-Identifier: Apache-2.0
// Moves a layer from one layout to another. Files hold row_packed; kernel layouts are made at load
// time.
#pragma once

#include "qeft/container/quantized_matrix.hpp"
#include "qeft/core/on_host.hpp"

namespace qeft {

inline namespace QEFT_TARGET {
namespace detail {

/// The planes of 32 consecutive dense codes of row n starting at column `first` (a multiple of 32),
/// as if they were a packed_array of their own: `Bits` words. Codes at and beyond IC - k are zero.
template <int Bits, class Layout>
void read_block(const std::uint32_t* words, const layout::extent& e, index_t n, index_t first,
                std::uint32_t* block) noexcept {
  using planes = bit_planes<Bits>;
  const index_t count = e.dense - first < 32 ? e.dense - first : 32;
  for (int p = 0; p < planes::count; ++p) {
    const int width = planes::width(p);
    const std::uint32_t mask = (1U << static_cast<unsigned>(width)) - 1U;
    std::uint32_t* out = block + planes::shift(p);
    for (int w = 0; w < width; ++w) out[w] = 0;
    for (index_t c = 0; c < count; ++c) {
      const code_address at = Layout::template locate<Bits>(e, p, n, first + c);
      const std::uint32_t field = (words[at.word] >> static_cast<unsigned>(at.shift)) & mask;
      const index_t bit = c * width;
      out[bit / 32] |= field << static_cast<unsigned>(bit % 32);
    }
  }
}

/// The counterpart of read_block: writes into words that hold zeros.
template <int Bits, class Layout>
void write_block(std::uint32_t* words, const layout::extent& e, index_t n, index_t first,
                 const std::uint32_t* block) noexcept {
  using planes = bit_planes<Bits>;
  const index_t count = e.dense - first < 32 ? e.dense - first : 32;
  for (int p = 0; p < planes::count; ++p) {
    const int width = planes::width(p);
    const std::uint32_t mask = (1U << static_cast<unsigned>(width)) - 1U;
    const std::uint32_t* in = block + planes::shift(p);
    for (index_t c = 0; c < count; ++c) {
      const index_t bit = c * width;
      const std::uint32_t field = (in[bit / 32] >> static_cast<unsigned>(bit % 32)) & mask;
      const code_address at = Layout::template locate<Bits>(e, p, n, first + c);
      words[at.word] |= field << static_cast<unsigned>(at.shift);
    }
  }
}

}  // namespace detail
}  // namespace QEFT_TARGET

/// The same layer in layout `To`: every read_code, read_params and weak_weight is unchanged.
/// Rows are spread over the executor's threads in multiples of 32, so that no two threads write to
/// one word.
template <class To, class From>
quantized_matrix<To> repack(const on_host& exec, const quantized_matrix<From>& from) {
  const matrix_descriptor& d = from.descriptor();
  quantized_matrix<To> to(d, from.weak_index());
  const layout::extent e = d.extent();
  const auto* from_words = reinterpret_cast<const std::uint32_t*>(from.codes().data());
  auto* to_words = reinterpret_cast<std::uint32_t*>(to.codes().data());
  const auto* from_weak = reinterpret_cast<const std::uint16_t*>(from.weak().data());
  auto* to_weak = reinterpret_cast<std::uint16_t*>(to.weak().data());

  visit_bits(d.bits, [&](auto bits) {
    exec.parallel_for(e.out_channels, 32, [&](index_t begin, index_t end) {
      std::uint32_t block[bits];
      for (index_t n = begin; n < end; ++n) {
        for (index_t k = 0; k < e.dense; k += 32) {
          detail::read_block<bits, From>(from_words, e, n, k, block);
          detail::write_block<bits, To>(to_words, e, n, k, block);
        }
        for (index_t j = 0; j < e.weak; ++j) {
          to_weak[To::weak_index(e, n, j)] = from_weak[From::weak_index(e, n, j)];
        }
      }
    });
    // Packed zero points of neighbouring rows share words: one thread.
    for (index_t n = 0; n < e.out_channels; ++n) {
      for (index_t g = 0; g < e.groups; ++g) {
        const auto [scale, zero] = from.read_params_bits(n, g);
        to.write_params(n, g, scale, zero);
      }
    }
  });
  return to;
}

}  // namespace qeft
