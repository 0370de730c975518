// SPDX-License-Identifier: Apache-2.0
// Whether the numbers of one model mean the same in another.
#pragma once

#include <string>

#include "config.hpp"
#include "tokenizer.hpp"

namespace qeft_llm {

/// What must agree, beside shapes, for deltas of one model to mean anything in another.
std::string architecture_of(const model_config& config);

/// Throws unless a token id means the same to both models.
/// @param command   that the error begins with
/// @param reference directory of the other model, and its config
/// @param tok       tokenizer of the model with the config `ours`
void check_same_vocabulary(const std::string& command, const std::string& reference,
                           const model_config& theirs, const model_config& ours,
                           const tokenizer& tok);

}  // namespace qeft_llm
