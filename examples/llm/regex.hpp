// SPDX-License-Identifier: Apache-2.0
// The regular expressions of tokenizer.json: written for Oniguruma, matched by PCRE2.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>

namespace qeft_llm {

/// A pattern over Unicode text. The two engines differ in places, so a pattern is translated (white
/// space) and refused where it would mean something else; all published patterns of GPT-2, Llama 3
/// and Qwen2 kind pass. Immutable; copies share the compiled pattern.
class regex {
 public:
  /// Throws qeft::error, beginning with `where`.
  regex(std::string_view pattern, const std::string& where);

  /// A pattern that matches exactly `text`.
  static std::string literal(std::string_view text);

  struct range {
    std::size_t begin;
    std::size_t end;
  };

  /// Working memory for searching; one per thread.
  class matcher {
   public:
    explicit matcher(const regex& r);
    /// The leftmost match at or after `from` that is not empty. @pre s is well-formed UTF-8
    bool find(std::string_view s, std::size_t from, range& found);

   private:
    std::shared_ptr<const void> code_;  // pcre2_code
    std::shared_ptr<void> match_data_;  // pcre2_match_data
  };

 private:
  std::shared_ptr<const void> code_;
};

}  // namespace qeft_llm
