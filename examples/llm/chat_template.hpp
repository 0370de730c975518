// SPDX-License-Identifier: Apache-2.0
// Chat templates: how the turns of a conversation become the text that a chat model was trained on.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "template_value.hpp"

namespace qeft_llm {

struct chat_message {
  std::string role;  // "system", "user", "assistant"
  std::string content;
};

struct template_node;  // chat_template.cpp

/// A template in the part of Jinja that published chat templates use: if, for, set, namespaces,
/// slices, the usual filters, tests and methods of strings, with the white space rules of
/// `transformers` (trim_blocks, lstrip_blocks). It is executed, not guessed at: the text is what
/// `apply_chat_template(messages, add_generation_prompt=...)` gives. Anything else is refused by
/// name and line. Immutable; copies share the parsed template.
class chat_template {
 public:
  /// Throws qeft::error errc::unsupported, beginning with `where`.
  chat_template(const std::string& source, std::string where);

  /// @param tokens bos_token, eos_token and so on, as the template names them
  /// @param answer whether the text goes on to where an assistant begins to speak
  /// @return the text, with what messages say marked
  /// Throws qeft::error errc::invalid_argument for what the template itself refuses (turns that do
  /// not alternate, roles it does not know).
  marked_text render(const std::vector<chat_message>& messages,
                     const std::map<std::string, std::string>& tokens, bool answer = true) const;

 private:
  std::string where_;
  std::shared_ptr<const template_node> root_;
};

/// The chat template of a model directory and the tokens that it may name.
struct model_chat_template {
  std::string source;  // empty when the directory has none
  std::string where;   // for errors
  std::map<std::string, std::string> tokens;
};

/// Where `transformers` looks: chat_template.jinja, additional_chat_templates/NAME.jinja, then
/// chat_template in tokenizer_config.json, one text or a list of {name, template}.
/// @param name of one of several templates, or empty for the one named "default"
/// Throws qeft::error when there is no template of that name, listing those that there are.
model_chat_template find_chat_template(const std::filesystem::path& directory,
                                       const std::string& name);

/// A JSON list of {"role": ..., "content": ...}, both strings. Throws qeft::error naming what is
/// wrong.
std::vector<chat_message> read_messages(const std::string& file);

}  // namespace qeft_llm
