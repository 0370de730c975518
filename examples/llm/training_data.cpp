// SPDX-License-Identifier: Apache-2.0
#include "training_data.hpp"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <numeric>

#include "qeft/io/json_fields.hpp"
#include "qeft/io/mapped_file.hpp"
#include "qeft/training/counter_random.hpp"

namespace qeft_llm {

using qeft::errc;
using qeft::fail;
using qeft::index_t;
using qeft::text;
using qeft::io::fail_corrupt;
using qeft::io::json_fields;

namespace {

bool has_extension(const std::string& file, const char* extension) {
  return std::filesystem::path(file).extension() == extension;
}

bool is_blank(std::string_view line) {
  return line.find_first_not_of(" \t\r") == std::string_view::npos;
}

std::size_t common_prefix(const std::vector<int>& a, const std::vector<int>& b) {
  const auto first = std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first;
  return static_cast<std::size_t>(first - a.begin());
}

/// The prompt that Alpaca's models were trained with.
marked_text alpaca_prompt(const std::string& instruction, const std::string& input) {
  marked_text prompt = marked_text::plain(
      input.empty() ? "Below is an instruction that describes a task. Write a response that "
                      "appropriately completes the request.\n\n### Instruction:\n"
                    : "Below is an instruction that describes a task, paired with an input that "
                      "provides further context. Write a response that appropriately completes the "
                      "request.\n\n### Instruction:\n");
  prompt += marked_text::message(instruction);
  if (!input.empty()) {
    prompt += marked_text::plain("\n\n### Input:\n");
    prompt += marked_text::message(input);
  }
  prompt += marked_text::plain("\n\n### Response:\n");
  return prompt;
}

enum class record_kind { instruction, prompt, messages };

record_kind kind_of(const json_fields& record) {
  std::vector<record_kind> kinds;
  std::string keys;
  const auto look_for = [&](record_kind kind, std::initializer_list<const char*> names) {
    bool any = false;
    for (const char* name : names) {
      if (!record.has(name)) continue;
      any = true;
      keys += (keys.empty() ? "" : ", ") + std::string(name);
    }
    if (any) kinds.push_back(kind);
  };
  look_for(record_kind::instruction, {"instruction", "input", "output"});
  look_for(record_kind::prompt, {"prompt", "response"});
  look_for(record_kind::messages, {"messages"});
  if (kinds.size() == 1) return kinds.front();
  fail_corrupt(record.where(),
               "has " + (keys.empty() ? std::string("none of its keys") : "the keys " + keys) +
                   ", but must have instruction and output (and perhaps input), or prompt and "
                   "response, or messages");
}

std::string response_of(const json_fields& record, const char* key) {
  std::string response = record.text(key);
  if (response.empty()) record.refuse(key, "text that is not empty: it is what is trained");
  return response;
}

std::vector<chat_message> messages_of(const json_fields& record) {
  const nlohmann::json& list = *record.find("messages");
  if (!list.is_array() || list.empty()) {
    record.refuse("messages", "a list of objects with role and content");
  }
  std::vector<chat_message> messages;
  bool answered = false;
  for (std::size_t i = 0; i < list.size(); ++i) {
    const json_fields fields(list[i], text(record.where(), ": messages[", i, "]"));
    messages.push_back({fields.text("role"), fields.text("content")});
    if (messages.back().role != "assistant") continue;
    answered = true;
    response_of(fields, "content");
  }
  if (!answered) {
    fail_corrupt(record.where(), "messages has no turn of role assistant, and so nothing to train");
  }
  return messages;
}

/// What is known of the records that do not fit.
struct too_long_records {
  index_t count = 0;
  index_t line = 0;    // of the longest
  index_t tokens = 0;  // of the longest

  void add(index_t at, index_t size) {
    ++count;
    if (size > tokens) {
      line = at;
      tokens = size;
    }
  }
};

}  // namespace

index_t count_of(const training_sample& sample) {
  return std::count_if(sample.counted.begin(), sample.counted.end(),
                       [](char counts) { return counts != 0; });
}

training_data_reader::training_data_reader(std::filesystem::path model, const model_config& config,
                                           const tokenizer& tok, std::string template_name)
    : model_(std::move(model)),
      ends_(config.eos_token_ids),
      vocab_size_(config.vocab_size),
      tokenizer_(tok),
      template_name_(std::move(template_name)) {}

training_data training_data_reader::read(const std::string& file, index_t seq_len,
                                         long_records too_long) {
  const qeft::io::mapped_file mapped(file);
  std::string_view rest(reinterpret_cast<const char*>(mapped.bytes().data()),
                        static_cast<std::size_t>(mapped.bytes().size()));
  if (has_extension(file, ".txt")) return read_text(file, rest, seq_len);
  if (!has_extension(file, ".jsonl")) {
    fail(errc::invalid_argument, file + ": must end in .txt (a text) or .jsonl (records)");
  }
  training_data data;
  too_long_records excess;
  for (index_t line = 1; !rest.empty(); ++line) {
    const std::string_view record = rest.substr(0, rest.find('\n'));
    rest.remove_prefix(std::min(record.size() + 1, rest.size()));
    if (is_blank(record)) continue;
    const std::string where = text(file, ", line ", line);
    training_sample sample = read_record(record, where);
    check_tokens(sample.tokens, where);
    const auto size = static_cast<index_t>(sample.tokens.size());
    if (size > seq_len) {
      excess.add(line, size);
      sample.tokens.resize(static_cast<std::size_t>(seq_len));
      sample.counted.resize(static_cast<std::size_t>(seq_len));
    }
    const index_t counted = count_of(sample);
    if (counted == 0) {
      ++data.left_out;
      continue;
    }
    data.cut += size > seq_len ? 1 : 0;
    data.counted += counted;
    data.samples.push_back(std::move(sample));
  }
  if (excess.count > 0 && too_long == long_records::refuse) {
    fail(errc::invalid_argument,
         text(file, ": ", excess.count, " of ",
              static_cast<index_t>(data.samples.size()) + data.left_out,
              " records have more than --seq-len = ", seq_len, " tokens; the longest, line ",
              excess.line, ", has ", excess.tokens,
              "; --long-records cut takes their end off, a larger --seq-len needs more memory"));
  }
  if (data.samples.empty()) {
    fail(errc::invalid_argument,
         file +
             (data.left_out == 0
                  ? std::string(": holds no record")
                  : text(": nothing that counts is left within --seq-len = ", seq_len, " tokens")));
  }
  return data;
}

training_data training_data_reader::read_text(const std::string& file, std::string_view utf8,
                                              index_t seq_len) const {
  const std::vector<int>& prefix = tokenizer_.prefix();
  const index_t step = seq_len - static_cast<index_t>(prefix.size());
  if (step < 1) {
    fail(errc::invalid_argument, text(file, ": --seq-len is ", seq_len, ", but must be above the ",
                                      prefix.size(), " tokens that stand in front of every text"));
  }
  const std::vector<int> tokens = tokenizer_.encode(utf8, /*parse_special=*/false);
  check_tokens(prefix, file);
  check_tokens(tokens, file);
  training_data data;
  const auto total = static_cast<index_t>(tokens.size());
  for (index_t first = 0; first < total; first += step) {
    training_sample sample;
    sample.tokens = prefix;
    sample.tokens.insert(sample.tokens.end(), tokens.begin() + first,
                         tokens.begin() + std::min(first + step, total));
    sample.counted.assign(sample.tokens.size(), '\1');
    std::fill_n(sample.counted.begin(), std::max<std::size_t>(prefix.size(), 1), '\0');
    const index_t counted = count_of(sample);
    if (counted == 0) continue;
    data.counted += counted;
    data.samples.push_back(std::move(sample));
  }
  if (data.samples.empty()) {
    fail(errc::invalid_argument,
         text(file, ": holds ", total, " tokens, but must hold some that follow others"));
  }
  return data;
}

/// A tokenizer may know tokens, added ones above all, that its model has no embedding of.
void training_data_reader::check_tokens(const std::vector<int>& tokens,
                                        const std::string& where) const {
  for (const int token : tokens) {
    if (token < vocab_size_) continue;
    fail(errc::invalid_argument,
         text(where, ": becomes token ", token, " of tokenizer.json, but must be of tokens below ",
              "the model's vocab_size = ", vocab_size_));
  }
}

training_sample training_data_reader::read_record(std::string_view line, const std::string& where) {
  const nlohmann::json object = qeft::io::parse_json(line, where);
  const json_fields record(object, where);
  switch (kind_of(record)) {
    case record_kind::instruction: {
      const std::string instruction = record.text("instruction");
      return respond(alpaca_prompt(instruction, record.text_or("input", "")),
                     response_of(record, "output"), where);
    }
    case record_kind::prompt: {
      const marked_text prompt = marked_text::message(record.text("prompt"));
      return respond(prompt, response_of(record, "response"), where);
    }
    case record_kind::messages:
      break;
  }
  return converse(messages_of(record), where);
}

training_sample training_data_reader::respond(const marked_text& prompt,
                                              const std::string& response,
                                              const std::string& where) const {
  marked_text whole = prompt;
  whole += marked_text::message(response);
  // As a whole, so that the response is spelled as the model would go on; its first token may take
  // in the end of the prompt.
  const std::vector<int> ids = tokenizer_.encode_marked(whole.text, whole.marks);
  const std::vector<int> asked = tokenizer_.encode_marked(prompt.text, prompt.marks);
  training_sample sample;
  sample.tokens = tokenizer_.prefix();
  const std::size_t first = sample.tokens.size() + common_prefix(asked, ids);
  sample.tokens.insert(sample.tokens.end(), ids.begin(), ids.end());
  if (!ends_.empty()) sample.tokens.push_back(ends_.front());
  sample.counted.assign(sample.tokens.size(), '\1');
  const std::size_t uncounted =
      std::max<std::size_t>(first, 1);  // nothing is before the first token
  std::fill_n(sample.counted.begin(), std::min(uncounted, sample.counted.size()), '\0');
  if (count_of(sample) == 0) fail_corrupt(where, "the response has no token that follows another");
  return sample;
}

training_sample training_data_reader::converse(const std::vector<chat_message>& messages,
                                               const std::string& where) {
  find_template(where);
  const auto render = [&](std::size_t turns, bool answer) {
    try {
      return template_->render(
          {messages.begin(), messages.begin() + static_cast<std::ptrdiff_t>(turns)}, found_.tokens,
          answer);
    } catch (const qeft::error& e) {
      fail(e.code(), where + ": the chat template refuses these messages: " + e.what());
    }
  };
  const auto starts_with = [](const marked_text& whole, const marked_text& part) {
    return whole.text.compare(0, part.size(), part.text) == 0;
  };
  const marked_text whole = render(messages.size(), false);
  training_sample sample;
  sample.tokens = tokenizer_.encode_marked(whole.text, whole.marks);
  sample.counted.assign(sample.tokens.size(), '\0');
  for (std::size_t i = 0; i < messages.size(); ++i) {
    if (messages[i].role != "assistant") continue;
    const marked_text asked = render(i, true);
    const marked_text said = render(i + 1, false);
    if (!starts_with(said, asked) || !starts_with(whole, said)) {
      fail(errc::unsupported,
           text(where, ": the chat template writes messages[", i,
                "] in another way when it is to be "
                "said than when it was, so that what to train cannot be told; prompt and response "
                "can be given instead"));
    }
    const auto tokens_of = [&](const marked_text& part) {
      return common_prefix(tokenizer_.encode_marked(part.text, part.marks), sample.tokens);
    };
    const std::size_t end = tokens_of(said);
    for (std::size_t t = std::max<std::size_t>(tokens_of(asked), 1); t < end; ++t) {
      sample.counted[t] = '\1';
      // What the template writes behind the end is not the assistant's.
      if (std::find(ends_.begin(), ends_.end(), sample.tokens[t]) != ends_.end()) break;
    }
  }
  if (count_of(sample) == 0) fail_corrupt(where, "messages have no token of an assistant to train");
  return sample;
}

void training_data_reader::find_template(const std::string& where) {
  if (template_) return;
  found_ = find_chat_template(model_, template_name_);
  if (found_.source.empty()) {
    fail(errc::unsupported, where + ": messages need a chat template, but " + model_.string() +
                                " has none; prompt and response need none");
  }
  template_.emplace(found_.source, found_.where);
}

std::vector<index_t> random_order(index_t count, std::uint64_t seed) {
  std::vector<index_t> order(static_cast<std::size_t>(count));
  std::iota(order.begin(), order.end(), index_t{0});
  for (std::size_t i = 0; i < order.size(); ++i) {
    std::swap(order[i], order[i + qeft::counter_bits(seed, i) % (order.size() - i)]);
  }
  return order;
}

std::vector<training_sample> split_off(std::vector<training_sample>& samples, double share,
                                       std::uint64_t seed) {
  const auto count = static_cast<index_t>(samples.size());
  const auto wanted = std::max<index_t>(1, std::llround(share * static_cast<double>(count)));
  if (!(share > 0 && wanted < count)) {
    fail(errc::invalid_argument,
         text("--validation-share is ", share, ", which leaves no sample of ", count,
              " to train on or to validate with; --validation takes another file, and "
              "--validation-share 0 does without"));
  }
  std::vector<char> taken(samples.size());
  const auto order = random_order(count, qeft::counter_bits(seed, for_split));
  for (index_t i = 0; i < wanted; ++i) {
    taken[static_cast<std::size_t>(order[static_cast<std::size_t>(i)])] = 1;
  }
  std::vector<training_sample> rest;
  std::vector<training_sample> validation;
  for (std::size_t i = 0; i < samples.size(); ++i) {
    (taken[i] != 0 ? validation : rest).push_back(std::move(samples[i]));
  }
  samples = std::move(rest);
  return validation;
}

}  // namespace qeft_llm
