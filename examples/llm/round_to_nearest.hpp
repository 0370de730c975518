// SPDX-License-Identifier: Apache-2.0
// A full-precision weight as a quantised one, without data.
#pragma once

#include "linear.hpp"

namespace qeft_llm {

/// Quantised by rounding to nearest, groups from their smallest to their largest number, no weak
/// columns. @param weight in full precision: all columns are weak
/// @throws qeft::error as qeft::solver::quantize_layer
packed_matrix round_to_nearest(const qeft::on_host& exec, const packed_matrix& weight, int bits,
                               qeft::index_t group_size);

}  // namespace qeft_llm
