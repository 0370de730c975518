// SPDX-License-Identifier: Apache-2.0
// A linear layer of a model.
#pragma once

#include "qeft/core/config.hpp"

namespace qeft_bench {

using qeft::index_t;

struct shape {
  const char* name;
  index_t out_channels;
  index_t in_channels;
};

}  // namespace qeft_bench
