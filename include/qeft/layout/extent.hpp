// SPDX-License-Identifier: Apache-2.0
// The sizes a layout needs to place codes, group parameters and weak columns.
//
// A layout is a stateless type with these static members; all indices are in range, (n, k) is
// output channel n and dense column k, g a group, j a weak column:
//   padded_rows(oc)              rows for which parameters and weak columns are stored
//   code_words<Bits>(e)          32-bit words of codes
//   locate<Bits>(e, p, n, k)     where bit plane p of a code lies
//   param_index(e, n, g)         index of a group's parameters, in [0, padded_rows * groups)
//   weak_index(e, n, j)          index of a weak value, in [0, padded_rows * weak)
// Maps are injective and closed-form on host and device. Padding holds zeros.
#pragma once

#include "qeft/core/math.hpp"
#include "qeft/format/bit_planes.hpp"

namespace qeft::layout {

struct extent {
  index_t out_channels;  // OC
  index_t dense;         // IC - k, columns that have codes
  index_t groups;        // groups per row
  index_t weak;          // k, full-precision columns
};

/// Layout::locate for one code, as gather_code and scatter_code want it.
template <class Layout, int Bits>
struct code_place {
  extent e;
  index_t n;  // output channel
  index_t k;  // dense column
  QEFT_HOST_DEVICE constexpr code_address operator()(int p) const noexcept {
    return Layout::template locate<Bits>(e, p, n, k);
  }
};

}  // namespace qeft::layout
