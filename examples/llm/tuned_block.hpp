// SPDX-License-Identifier: Apache-2.0
// A decoder block in training.
#pragma once

#include <array>
#include <memory>

#include "llama.hpp"
#include "tuned_linear.hpp"

namespace qeft_llm {}  // namespace qeft_llm
