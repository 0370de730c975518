// SPDX-License-Identifier: Apache-2.0
// What `qeft-llm quantize` does where no option says otherwise.
#pragma once

#include <functional>
#include <string>

#include "quantize.hpp"

namespace qeft_llm {

enum class preset {
  paper,     // the paper's algorithm: the initial values of quantize_options
  standard,  // the best that is known at the same storage (METHOD section 9)
  small,     // the same with groups of 64 columns, for small models
};

/// Sets what the preset decides. It leaves alone what was asked for by name, and what makes no
/// sense beside it: all but the group size serves the OPTQ solver, act-order is an order of its
/// own, and columns that are not reordered cannot be sorted.
/// @param given whether the user gave an option, by its name ("--order")
void apply(preset chosen, const std::function<bool(const std::string& option)>& given,
           quantize_options& o);

}  // namespace qeft_llm
