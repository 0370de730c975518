// SPDX-License-Identifier: Apache-2.0
// `qeft-llm generate`.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "chat_template.hpp"
#include "commands.hpp"
#include "llama.hpp"
#include "qeft/io/errors.hpp"
#include "tokenizer.hpp"

namespace qeft_llm {

using qeft::errc;
using qeft::fail;
using qeft::index_t;

namespace {

std::string read_stream(std::FILE* file, const std::string& name) {
  std::string text;
  char buffer[4096];
  while (const std::size_t n = std::fread(buffer, 1, sizeof buffer, file)) text.append(buffer, n);
  if (std::ferror(file) != 0) fail(errc::io_error, "cannot read " + name);
  return text;
}

std::string read_prompt(const generate_options& o) {
  if (o.prompt_file.empty()) {
    return o.prompt == "-" ? read_stream(stdin, "the standard input") : o.prompt;
  }
  // Read as a stream, so that it may be a pipe.
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(
      std::fopen(o.prompt_file.c_str(), "rb"), &std::fclose);
  if (!file) qeft::io::fail_io("cannot open", o.prompt_file);
  return read_stream(file.get(), o.prompt_file);
}

std::vector<chat_message> read_conversation(const generate_options& o) {
  std::vector<chat_message> messages;
  if (!o.system.empty()) messages.push_back({"system", o.system});
  if (o.messages.empty()) {
    messages.push_back({"user", read_prompt(o)});
  } else {
    for (chat_message& m : read_messages(o.messages)) messages.push_back(std::move(m));
  }
  return messages;
}

// For models that have ChatML's tokens but no template.
constexpr const char* plain_chatml =
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n";

std::vector<int> encode_conversation(const tokenizer& tok, const generate_options& o) {
  model_chat_template found = find_chat_template(o.model, o.template_name);
  if (found.source.empty()) {
    if (!tok.id_of("<|im_start|>") || !tok.id_of("<|im_end|>")) {
      fail(errc::unsupported,
           "generate: --chat needs a chat template, but " + o.model +
               " has none (chat_template.jinja, or chat_template in "
               "tokenizer_config.json), nor the tokens of ChatML; without --chat, "
               "--prompt takes the text as it is");
    }
    std::fprintf(stderr,
                 "notice: %s has no chat template; ChatML is taken, without a system turn\n",
                 o.model.c_str());
    found.source = plain_chatml;
    found.where = "ChatML";
  }
  try {
    const marked_text text =
        chat_template(found.source, found.where).render(read_conversation(o), found.tokens);
    return tok.encode_marked(text.text, text.marks);
  } catch (const qeft::error& e) {
    if (e.code() != errc::unsupported) throw;
    fail(errc::unsupported,
         "generate: this chat template cannot be followed: " + std::string(e.what()) +
             "; --template takes another template of the model, and without "
             "--chat --prompt takes the text as it is");
  }
}

std::vector<int> encode_prompt(const tokenizer& tok, const generate_options& o) {
  if (o.chat || !o.messages.empty()) return encode_conversation(tok, o);
  if (!o.system.empty() || !o.template_name.empty()) {
    fail(errc::invalid_argument, "generate: --system and --template need --chat or --messages");
  }
  std::vector<int> ids = tok.encode(read_prompt(o), /*parse_special=*/true);
  // Unless it was written out.
  const std::vector<int>& prefix = tok.prefix();
  const bool has_prefix =
      ids.size() >= prefix.size() && std::equal(prefix.begin(), prefix.end(), ids.begin());
  if (!has_prefix) ids.insert(ids.begin(), prefix.begin(), prefix.end());
  return ids;
}

/// What a run gives, on its way to stdout.
class answer {
 public:
  answer(const tokenizer& tok, bool as_json) : decoder_(tok), json_(as_json) {}

  void add(int token) {
    tokens_.push_back(token);
    put(decoder_.next(token));
  }
  void finish(bool stopped, index_t prompt_tokens, double prefill_seconds, double decode_seconds) {
    put(decoder_.finish());
    if (!json_) {
      std::printf("\n");
      return;
    }
    const nlohmann::ordered_json all = {{"prompt_tokens", prompt_tokens},
                                        {"tokens", tokens_},
                                        {"text", text_},
                                        {"finish_reason", stopped ? "stop" : "length"},
                                        {"prefill_seconds", prefill_seconds},
                                        {"decode_seconds", decode_seconds}};
    std::printf("%s\n", all.dump().c_str());
  }

 private:
  void put(const std::string& part) {
    if (json_) {
      text_ += part;
      return;
    }
    std::fputs(part.c_str(), stdout);
    std::fflush(stdout);
  }

  streaming_decoder decoder_;
  bool json_;
  std::vector<int> tokens_;
  std::string text_;
};

}  // namespace

int run_generate(const generate_options& o) {
  if (o.max_tokens < 1) {
    fail(errc::invalid_argument,
         "generate: --max-tokens is " + std::to_string(o.max_tokens) + ", but must be positive");
  }
  sampler draw(o.sampling);
  const qeft::on_host exec(o.threads);
  const model_source source(o.model);
  llama_model model(exec, source, o.activations);
  const tokenizer tok = tokenizer::from_file(o.model + "/tokenizer.json");
  const std::vector<int> prompt = encode_prompt(tok, o);
  if (prompt.empty()) fail(errc::invalid_argument, "generate: the prompt is empty");

  const model_config& config = model.config();
  const auto prompt_tokens = static_cast<index_t>(prompt.size());
  const index_t room = config.max_position_embeddings - prompt_tokens;
  model.reset(prompt_tokens + std::clamp<index_t>(room, 0, o.max_tokens));
  for (const int token : prompt) draw.see(token);
  std::vector<float> logits(static_cast<std::size_t>(config.vocab_size));
  answer out(tok, o.json);

  using clock = std::chrono::steady_clock;
  const auto start = clock::now();
  const float* last = model.forward(prompt).data() + (prompt_tokens - 1) * config.hidden_size;
  const auto prefilled = clock::now();
  index_t generated = 0;
  index_t decoded = 0;  // forward steps of one token
  bool stopped = false;
  while (true) {
    model.logits(last, 1, logits.data());
    const int next = draw.next(logits);
    ++generated;
    const auto& ends = config.eos_token_ids;
    stopped = !o.ignore_eos && std::find(ends.begin(), ends.end(), next) != ends.end();
    if (stopped) break;
    out.add(next);
    draw.see(next);
    if (generated == o.max_tokens || model.position() == config.max_position_embeddings) break;
    last = model.forward({next}).data();
    ++decoded;
  }
  const auto seconds = [](auto duration) {
    return std::chrono::duration<double>(duration).count();
  };
  const double prefill = seconds(prefilled - start);
  const double decode = seconds(clock::now() - prefilled);
  out.finish(stopped, prompt_tokens, prefill, decode);
  std::fprintf(stderr, "prefill %.1f tokens/s (%lld tokens), decode %.1f tokens/s (%lld tokens)\n",
               static_cast<double>(prompt_tokens) / prefill, static_cast<long long>(prompt_tokens),
               static_cast<double>(decoded) / decode, static_cast<long long>(decoded));
  return 0;
}

}  // namespace qeft_llm
