// SPDX-License-Identifier: Apache-2.0
#include "model_match.hpp"

#include <algorithm>

#include "qeft/core/text.hpp"

namespace qeft_llm {

using qeft::errc;
using qeft::fail;

std::string architecture_of(const model_config& c) {
  return qeft::text(c.model_type, ": ", c.num_hidden_layers, " layers of ", c.hidden_size, " and ",
                    c.intermediate_size, " channels, ", c.num_attention_heads, " heads on ",
                    c.num_key_value_heads, " of ", c.head_dim);
}

void check_same_vocabulary(const std::string& command, const std::string& reference,
                           const model_config& theirs, const model_config& ours,
                           const tokenizer& tok) {
  if (theirs.vocab_size != ours.vocab_size) {
    fail(errc::invalid_argument, command + ": --reference " + reference + " has a vocabulary of " +
                                     std::to_string(theirs.vocab_size) +
                                     " tokens, but must have the model's " +
                                     std::to_string(ours.vocab_size));
  }
  const tokenizer their_tok = tokenizer::from_file(reference + "/tokenizer.json");
  const int tokens = std::max(tok.vocab_size(), their_tok.vocab_size());
  for (int id = 0; id < tokens; ++id) {
    if (tok.bytes_of(id) != their_tok.bytes_of(id) ||
        tok.is_special(id) != their_tok.is_special(id)) {
      fail(errc::invalid_argument, command + ": --reference " + reference +
                                       " has another tokenizer than the model: token " +
                                       std::to_string(id) + " differs");
    }
  }
}

}  // namespace qeft_llm
