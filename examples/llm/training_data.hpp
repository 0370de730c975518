// SPDX-License-Identifier: Apache-2.0
// Files of text, or of prompts and responses, as samples to train on.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "chat_template.hpp"
#include "config.hpp"
#include "tokenizer.hpp"
#include "tuned_model.hpp"

namespace qeft_llm {

/// The number of tokens of a sample whose prediction counts.
qeft::index_t count_of(const training_sample& sample);

/// What becomes of records of more than seq_len tokens.
enum class long_records {
  refuse,
  cut,  // they lose their end; those of which nothing counted is left are left out
};

struct training_data {
  std::vector<training_sample> samples;  // each has a counted token
  qeft::index_t counted = 0;             // tokens, of all samples
  qeft::index_t cut = 0;                 // samples that lost their end
  qeft::index_t left_out = 0;            // records that lost all that counts
};

/// Reads data for one model. Of two kinds of file:
/// - NAME.txt: the text is tiled into windows of seq_len tokens, each the tokenizer's prefix and
///   then the next part of the text; the last one may be shorter. Every token counts that has one
///   before it in its window. Special tokens written in the text are plain text. Documents are not
///   told apart: blank lines are text.
/// - NAME.jsonl: one object a line, blank lines aside, with these keys and any others:
///   - instruction, output and perhaps input: put into the prompt of Alpaca;
///   - prompt, response: the one behind the other as they are;
///   - messages: a list of {"role", "content"}, put into the model's chat template.
///   The response counts, or each turn of an assistant, with the token that ends it. What a record
///   says is plain text: it cannot forge a special token.
class training_data_reader {
 public:
  /// @param model         directory of the model, for its chat template
  /// @param template_name of several templates; only looked for when there are messages
  training_data_reader(std::filesystem::path model, const model_config& config,
                       const tokenizer& tok, std::string template_name = "");

  /// @throws qeft::error naming file, line and key for anything but the above: what is no JSON, a
  ///         key that is missing, of another type or of another kind of record, an empty response,
  ///         messages without an assistant's, a file without any sample, records that are too long,
  ///         a token that the model's vocabulary does not have
  training_data read(const std::string& file, qeft::index_t seq_len,
                     long_records too_long = long_records::refuse);

  /// Whether some record that was read needed the model's chat template.
  bool used_template() const noexcept { return template_.has_value(); }

 private:
  training_data read_text(const std::string& file, std::string_view text,
                          qeft::index_t seq_len) const;
  void check_tokens(const std::vector<int>& tokens, const std::string& where) const;
  training_sample read_record(std::string_view line, const std::string& where);
  training_sample respond(const marked_text& prompt, const std::string& response,
                          const std::string& where) const;
  training_sample converse(const std::vector<chat_message>& messages, const std::string& where);
  void find_template(const std::string& where);

  std::filesystem::path model_;
  std::vector<int> ends_;
  qeft::index_t vocab_size_;
  tokenizer tokenizer_;
  std::string template_name_;
  std::optional<chat_template> template_;
  model_chat_template found_;
};

/// What random numbers are for: the first of their counters (see qeft::counter_bits).
enum random_purpose : std::uint64_t { for_split, for_order, for_dropout };

/// 0 to count - 1 in random order; the same everywhere for the same seed.
std::vector<qeft::index_t> random_order(qeft::index_t count, std::uint64_t seed);

/// Takes a random share of the samples, rounded and at least one, out of `samples`; both keep their
/// order. @throws qeft::error when one of the two would be empty
std::vector<training_sample> split_off(std::vector<training_sample>& samples, double share,
                                       std::uint64_t seed);

}  // namespace qeft_llm
