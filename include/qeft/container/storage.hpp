// SPDX-License-Identifier: Apache-2.0
// How much a layer takes in a layout.
#pragma once

#include "qeft/container/matrix_descriptor.hpp"
#include "qeft/container/visit.hpp"
#include "qeft/layout/row_packed.hpp"

namespace qeft {

/// Exact size of each part, in bytes.
struct storage_bytes {
  index_t codes = 0;
  index_t scales = 0;  // with the zero points, where the layout keeps them there
  index_t zeros = 0;
  index_t weak = 0;        // weak columns
  index_t weak_index = 0;  // 32-bit positions; `indexed` only

  QEFT_ALWAYS_INLINE index_t total() const noexcept {
    return codes + scales + zeros + weak + weak_index;
  }
};

inline namespace QEFT_TARGET {

/// Storage of a layer in `Layout`, padding included. @pre validate(d).ok()
template <class Layout = layout::row_packed>
storage_bytes storage_of(const matrix_descriptor& d) {
  const layout::extent e = d.extent();
  storage_bytes s;
  visit_bits(d.bits, [&](auto bits) {
    s.codes = 4 * Layout::template code_words<bits>(e);
    if constexpr (!Layout::zeros_in_scales) {
      if (d.zero == zero_kind::integer) s.zeros = 4 * Layout::template zero_words<bits>(e);
    }
  });
  s.scales = 2 * Layout::scale_count(e);
  if constexpr (!Layout::zeros_in_scales) {
    if (d.zero == zero_kind::scaled) s.zeros = 2 * Layout::zero_count(e);
  }
  s.weak = 2 * Layout::weak_count(e);
  if (d.weak == weak_kind::indexed) s.weak_index = 4 * e.weak;
  return s;
}

/// Stored bits per weight of the layer, everything included.
template <class Layout = layout::row_packed>
double bits_per_weight(const matrix_descriptor& d) {
  return 8.0 * static_cast<double>(storage_of<Layout>(d).total()) /
         (static_cast<double>(d.out_channels) * static_cast<double>(d.in_channels));
}

}  // namespace QEFT_TARGET

}  // namespace qeft
