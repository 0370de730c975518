// SPDX-License-Identifier: Apache-2.0
// What training changes.
#pragma once

#include <string>
#include <vector>

#include "qeft/core/config.hpp"

namespace qeft_llm {

/// An array that is trained, in FP32, and its gradient. Both belong to the model.
struct parameter {
  std::string name;    // such as "model.layers.0.mlp.up_proj.weak"
  qeft::index_t rows;  // values are (rows, columns), row-major
  qeft::index_t columns;
  float* value;
  float* gradient;         // summed since it was last cleared
  double rate_factor = 1;  // what the learning rate is multiplied with here

  qeft::index_t size() const noexcept { return rows * columns; }
};

}  // namespace qeft_llm
