// SPDX-License-Identifier: Apache-2.0
// Everything that can make a quantisation fail and is known before it starts.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "column_choice.hpp"
#include "llama.hpp"
#include "quantize.hpp"

namespace qeft_llm {

/// Throws qeft::error naming an option that breaks its rule for this model, its value and the rule.
void check_options(const quantize_options& options, const model_config& config,
                   const column_choice& weak);

/// The files beside the tensors that a quantised copy of the model needs and `model` has:
/// tokenizer, chat template and so on. Throws qeft::error for one that cannot be read.
std::vector<std::filesystem::path> side_files(const std::filesystem::path& model);

/// Reads every tensor that the quantised model will hold, one after another, and throws qeft::error
/// naming the first that is missing, misshapen, of another type, not finite, or does not fit the
/// type it is to be stored in. Says on stderr when tensors are rounded.
void check_tensors(const model_source& source);

}  // namespace qeft_llm
