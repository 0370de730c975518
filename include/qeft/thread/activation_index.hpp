// SPDX-License-Identifier: Apache-2.0
// The order in which kernels read activations: the IC - k dense columns, then the k weak ones. With
// it every weak policy becomes weak_tail, whose stored bytes are the same.
#pragma once

#include "qeft/format/weak_columns.hpp"

namespace qeft {

/// Input column that stands at `slot` of the kernel's order, 0 <= slot < in_channels.
template <class Weak>
QEFT_HOST_DEVICE constexpr index_t activation_column(const Weak& weak, index_t slot,
                                                     index_t in_channels) noexcept {
  const index_t dense = in_channels - weak.count();
  return slot < dense ? weak.dense_column(slot, in_channels)
                      : weak.weak_column(slot - dense, in_channels);
}

}  // namespace qeft
