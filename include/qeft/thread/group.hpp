// SPDX-License-Identifier: Apache-2.0
// Who shares the work of one dot product: a group has rank(), size() and sum(partial). A warp is
// one; so is a single thread.
#pragma once

#include "qeft/core/config.hpp"

namespace qeft {

/// One thread that does everything.
struct serial_group {
  QEFT_HOST_DEVICE constexpr index_t rank() const noexcept { return 0; }
  QEFT_HOST_DEVICE constexpr index_t size() const noexcept { return 1; }
  QEFT_HOST_DEVICE constexpr float sum(float partial) const noexcept { return partial; }
};

/// One lane of a group of Size lanes without the means to combine: a host loop over ranks adds the
/// partial results itself. How per-lane code is tested where there is no GPU.
template <index_t Size>
struct lane_probe {
  index_t lane;

  QEFT_HOST_DEVICE constexpr index_t rank() const noexcept { return lane; }
  QEFT_HOST_DEVICE constexpr index_t size() const noexcept { return Size; }
};

}  // namespace qeft
