// SPDX-License-Identifier: Apache-2.0
// UTF-8: repair, classes of characters, normalisation forms.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace qeft_llm {

/// Length of the well-formed character at the start of s, or minus the length of the maximal
/// ill-formed part there (Unicode, table 3-7). @pre s is not empty
int character_length(std::string_view s);

/// Every maximal ill-formed part replaced by U+FFFD, as Python and Rust do.
std::string well_formed(std::string_view s);

/// Code point of the character that starts at s[at]. @pre s is well-formed
std::uint32_t code_point_at(std::string_view s, std::size_t at);

/// Where the character that ends before s[at] starts. @pre s is well-formed, at > 0
std::size_t previous_character(std::string_view s, std::size_t at);

/// White_Space of Unicode.
bool is_space(std::uint32_t code_point);

/// \w of Unicode regular expressions (UTS #18): letters, marks, digits, connectors, joiners.
bool is_word(std::uint32_t code_point);

enum class normal_form { nfc, nfd, nfkc, nfkd };

/// @pre s is well-formed. Throws qeft::error when the result would be too large.
std::string normalized(std::string_view s, normal_form form);

}  // namespace qeft_llm
