// SPDX-License-Identifier: Apache-2.0
// Reading tokenizer.json.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "tokenizer_tables.hpp"

namespace qeft_llm {

/// Throws qeft::error: corrupt_file for what is malformed or inconsistent, unsupported for another
/// component or option. Errors name key, value and rule.
/// @param where what errors begin with
std::shared_ptr<const tokenizer_tables> read_tokenizer_json(std::string_view text,
                                                            const std::string& where);

}  // namespace qeft_llm
