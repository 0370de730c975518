// SPDX-License-Identifier: Apache-2.0
// Byte-pair encoding as Hugging Face `tokenizers` computes it, from a tokenizer.json.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace qeft_llm {

struct tokenizer_tables;  // tokenizer_tables.hpp

/// Reads what GPT-2, SmolLM2, Llama 3 and Qwen2 use, BPE over bytes, and what Llama 1 and 2,
/// TinyLlama and Mistral use, BPE over characters in the style of SentencePiece, which writes
/// spaces as U+2581 and spells characters without a token in byte tokens (<0x0A>):
/// - model BPE, with byte_fallback where there is no ByteLevel;
/// - normalizers NFC, NFD, NFKC, NFKD, Prepend, and Replace of a string;
/// - pre-tokenizers Digits, Split, Metaspace and, last, ByteLevel; or none: the text is one word;
/// - added tokens with all their options, numbered as `tokenizers` does it: those of the vocabulary
///   by their id there, others behind it, whatever the file says (a notice on stderr tells);
/// - post-processors ByteLevel and a template that puts tokens in front;
/// - decoder ByteLevel, or in this order, each optional: Replace and Metaspace, ByteFallback, Fuse,
///   and Strip at the start.
/// Anything else is refused by name; truncation and padding are ignored. Immutable; copies share
/// their tables and may be used by several threads.
class tokenizer {
 public:
  /// Throws qeft::error: io_error, corrupt_file (malformed or inconsistent) or unsupported (uses
  /// another component or option).
  static tokenizer from_file(const std::string& path);
  /// @param where what errors begin with
  static tokenizer from_json(const std::string& text, const std::string& where);

  /// Every maximal ill-formed part of the text counts as U+FFFD. A byte or character for which the
  /// vocabulary has no token, nor tokens for its bytes, gives the unknown token if there is one,
  /// else nothing (SmolLM2 lacks 21 bytes, all of them control characters or not used in assigned
  /// characters).
  /// @param utf8          fewer than 2^31 bytes
  /// @param parse_special whether special tokens written in the text are recognised; added tokens
  ///                      that are not special always are
  /// @return ids, without the prefix
  std::vector<int> encode(std::string_view utf8, bool parse_special = true) const;

  /// As above, but special tokens are recognised only where no byte of theirs is marked: what a
  /// message says cannot forge a turn. @param marks as long as the text, 1 where it is marked
  std::vector<int> encode_marked(std::string_view utf8, std::string_view marks) const;

  /// Text of the tokens. Ill-formed UTF-8 is replaced as in encode, but every byte of a run of byte
  /// tokens that is ill-formed anywhere becomes U+FFFD. The space that Llama 2 puts in front of a
  /// text is taken away again. An id without a token gives nothing: the embedding of a model may
  /// have more rows than there are tokens.
  /// @param skip_special leaves out all special tokens (`tokenizers` keeps those that its
  /// normalizer
  ///                     changes)
  std::string decode(const std::vector<int>& ids, bool skip_special = false) const;

  /// What one token adds to the text, unless it is the first: not always whole characters.
  std::string_view bytes_of(int id) const noexcept;

  /// Tokens the model wants in front of every text, such as <|begin_of_text|>; often none.
  const std::vector<int>& prefix() const noexcept;
  std::optional<int> id_of(const std::string& token) const;
  bool is_special(int id) const noexcept;
  /// One more than the largest id.
  int vocab_size() const noexcept;

 private:
  explicit tokenizer(std::shared_ptr<const tokenizer_tables> t) : tables_(std::move(t)) {}
  std::shared_ptr<const tokenizer_tables> tables_;
  friend class streaming_decoder;
};

/// Decodes token by token and holds back bytes until they are whole characters, byte tokens until
/// another token follows: all it returns, joined, is what tokenizer::decode gives.
class streaming_decoder {
 public:
  explicit streaming_decoder(tokenizer tok) : tokenizer_(std::move(tok)) {}
  std::string next(int id);
  /// What was held back, repaired; then as new.
  std::string finish();

 private:
  /// What is held back, repaired.
  std::string release();
  /// Takes off what the decoder strips from the start of the text.
  std::string strip(std::string part);

  tokenizer tokenizer_;
  std::string held_;
  bool first_ = true;         // no token yet
  std::size_t stripped_ = 0;  // how often; the largest count when there is no more to strip
};

}  // namespace qeft_llm
