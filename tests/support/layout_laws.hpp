// SPDX-License-Identifier: Apache-2.0
// The laws of layout/extent.hpp, for any layout: every place lies inside the storage that the
// layout declares, and no two things share one.
#pragma once

#include <vector>

#include "qeft/container/quantized_matrix.hpp"
#include "support/catch.hpp"
#include "support/sweep.hpp"

namespace qeft_test {

/// Bits of an array that are taken already.
class claims {
 public:
  explicit claims(qeft::index_t bits) : taken_(static_cast<std::size_t>(bits), false) {}
  void take(qeft::index_t first, int count) {
    for (qeft::index_t b = first; b < first + count; ++b) {
      good_ = good_ && b >= 0 && b < static_cast<qeft::index_t>(taken_.size()) &&
              !taken_[static_cast<std::size_t>(b)];
      if (!good_) return;
      taken_[static_cast<std::size_t>(b)] = true;
    }
  }
  void take(qeft::code_address at, int width) {
    good_ = good_ && at.shift >= 0 && at.shift + width <= 32;
    take(32 * at.word + at.shift, width);
  }
  bool good() const { return good_; }

 private:
  std::vector<bool> taken_;
  bool good_ = true;
};

/// Bits of the array of zero points, where a layout has one.
template <class Layout, int Bits>
qeft::index_t zero_bits(const qeft::layout::extent& e) {
  if constexpr (!Layout::zeros_in_scales) {
    if (e.zero == qeft::zero_kind::integer) return 32 * Layout::template zero_words<Bits>(e);
    if (e.zero == qeft::zero_kind::scaled) return 16 * Layout::zero_count(e);
  }
  return 0;
}

template <class Layout, int Bits>
void check_layout_laws(const qeft::layout::extent& e) {
  using qeft::index_t;
  using planes = qeft::bit_planes<Bits>;
  claims codes(32 * Layout::template code_words<Bits>(e));
  std::vector<index_t> row_tile(static_cast<std::size_t>(Layout::template code_words<Bits>(e)), -1);
  bool apart = true;  // no word holds codes of two row tiles
  claims scales(16 * Layout::scale_count(e));
  claims separate_zeros(zero_bits<Layout, Bits>(e));
  claims& zeros = Layout::zeros_in_scales ? scales : separate_zeros;
  claims weak(16 * Layout::weak_count(e));
  for (index_t n = 0; n < e.out_channels; ++n) {
    for (index_t k = 0; k < e.dense; ++k) {
      for (int p = 0; p < planes::count; ++p) {
        const qeft::code_address at = qeft::layout::locate<Layout, Bits>(e, p, n, k);
        codes.take(at, planes::width(p));
        if (!codes.good()) continue;
        index_t& tile = row_tile[static_cast<std::size_t>(at.word)];
        apart = apart && (tile < 0 || tile == n / Layout::rows);
        tile = n / Layout::rows;
      }
    }
    for (index_t g = 0; g < e.groups; ++g) {
      scales.take(16 * Layout::scale_index(e, n, g), 16);
      if (e.zero == qeft::zero_kind::scaled) zeros.take(16 * Layout::zero_index(e, n, g), 16);
      for (int p = 0; p < planes::count && e.zero == qeft::zero_kind::integer; ++p) {
        zeros.take(Layout::template locate_zero<Bits>(e, p, n, g), planes::width(p));
      }
    }
    for (index_t j = 0; j < e.weak; ++j) weak.take(16 * Layout::weak_index(e, n, j), 16);
  }
  CHECK(codes.good());
  CHECK(apart);
  CHECK(scales.good());
  CHECK(zeros.good());
  CHECK(weak.good());
}

template <class Layout>
void check_layout_laws() {
  sweep counted(Layout::name);
  for (const qeft::index_t oc : {1, 2, 31, 32, 33, 97}) {
    for (const qeft::index_t dense : {0, 1, 15, 17, 32, 33, 64, 129, 560}) {
      for (const qeft::index_t weak : {0, 1, 16, 20, 33}) {
        for (const auto zero :
             {qeft::zero_kind::symmetric, qeft::zero_kind::integer, qeft::zero_kind::scaled}) {
          const qeft::layout::extent e{oc, dense, qeft::ceil_div(dense, 32), weak, zero};
          check_layout_laws<Layout, 2>(e);
          check_layout_laws<Layout, 3>(e);
          check_layout_laws<Layout, 4>(e);
          check_layout_laws<Layout, 8>(e);
          counted.ran();
        }
      }
    }
  }
}

}  // namespace qeft_test
