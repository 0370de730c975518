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

}  // namespace qeft
