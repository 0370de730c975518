// SPDX-License-Identifier: Apache-2.0
// Byte-level BPE as Hugging Face `tokenizers` computes it, from a tokenizer.json.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace qeft_llm {

/// Reads what GPT-2, SmolLM2, Llama 3 and Qwen2 use: model BPE over bytes; pre-tokenizers Digits, Split
/// by regular expression and ByteLevel; normalizer NFC or none; added tokens; a template that puts
/// tokens in front. Anything else is refused by name. Immutable; copies share their tables.
class tokenizer {
 public:
  /// Throws qeft::error for a file that cannot be read, is malformed, or uses another component.
  static tokenizer from_file(const std::string& path);
  static tokenizer from_json(const std::string& text, const std::string& where);

  /// @param utf8          bytes that are not UTF-8 count as U+FFFD, one per maximal ill-formed part
  /// @param parse_special whether added tokens inside the text are recognised
  /// @return ids, without the prefix
  std::vector<int> encode(std::string_view utf8, bool parse_special = true) const;
  /// The bytes of the tokens, which need not be whole UTF-8 characters. Ids out of range throw.
  std::string decode(const std::vector<int>& ids, bool skip_special = false) const;

  /// Tokens the model wants in front of every text, such as <|begin_of_text|>; often none.
  const std::vector<int>& prefix() const noexcept;
  std::optional<int> id_of(const std::string& token) const;
  int vocab_size() const noexcept;

 private:
  struct tables;
  explicit tokenizer(std::shared_ptr<const tables> t) : tables_(std::move(t)) {}
  std::shared_ptr<const tables> tables_;
};

/// Decodes token by token and holds back bytes until they are whole characters.
class streaming_decoder {
 public:
  explicit streaming_decoder(tokenizer tok) : tokenizer_(std::move(tok)) {}
  std::string next(int id);
  /// What was held back.
  std::string finish();

 private:
  tokenizer tokenizer_;
  std::string held_;
};

}  // namespace qeft_llm
