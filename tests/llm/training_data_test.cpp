// SPDX-License-Identifier: Apache-2.0
// What training data become: tokens, and which of them count.
#include "training_data.hpp"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>

#include "support/catch.hpp"
#include "support/throws.hpp"
#include "unit/io/temporary_directory.hpp"

namespace {

using namespace qeft_llm;
using namespace qeft_test;
using nlohmann::json;
using qeft::errc;
using qeft::index_t;

constexpr int ab = 256;
constexpr int start = 261;
constexpr int end = 262;

/// Id b for byte b of ASCII, then ab 256; special <s> 261 and </s> 262.
json tokenizer_document(int prefix) {
  json vocab = {{"Ġ", 32}, {"Ċ", 10}, {"ab", ab}, {"<s>", start}, {"</s>", end}};
  for (char c = '!'; c <= '~'; ++c) vocab[std::string(1, c)] = c;
  json added = json::array();
  for (const auto& [content, id] : {std::pair{"<s>", start}, std::pair{"</s>", end}}) {
    added.push_back({{"id", id}, {"content", content}, {"special", true}});
  }
  const json byte_level = {{"type", "ByteLevel"}, {"add_prefix_space", false}};
  json document = {
      {"added_tokens", added},
      {"pre_tokenizer", byte_level},
      {"decoder", byte_level},
      {"model",
       {{"type", "BPE"}, {"vocab", vocab}, {"merges", json::array({json::array({"a", "b"})})}}}};
  if (prefix > 0) {
    const json ids = {{"<s>", {{"id", "<s>"}, {"ids", json::array({start})}, {"tokens", {"<s>"}}}}};
    json single = json::array();
    for (int i = 0; i < prefix; ++i) single.push_back({{"SpecialToken", {{"id", "<s>"}}}});
    single.push_back({{"Sequence", {{"id", "A"}}}});
    document["post_processor"] = {
        {"type", "TemplateProcessing"}, {"single", single}, {"special_tokens", ids}};
  }
  return document;
}

/// The tokens as text: special ones as [ and ], "ab" as @. Where counted ones begin or end, there
/// is a "|".
std::string shown(const training_sample& s) {
  REQUIRE(s.counted.size() == s.tokens.size());
  std::string out;
  bool counts = false;
  for (std::size_t i = 0; i < s.tokens.size(); ++i) {
    if ((s.counted[i] != 0) != counts) {
      counts = !counts;
      out += '|';
    }
    const int t = s.tokens[i];
    out += t == start ? '[' : t == end ? ']' : t == ab ? '@' : static_cast<char>(t);
  }
  return out;
}

struct workplace {
  temporary_directory dir;
  model_config config;
  int prefix = 0;  // tokens <s> in front of every text

  explicit workplace(const std::string& chat_template = "") {
    config.eos_token_ids = {end};
    config.vocab_size = 1000;
    if (chat_template.empty()) return;
    write_all(dir / "chat_template.jinja", chat_template);
    write_all(dir / "tokenizer_config.json", R"({"eos_token": "</s>"})");
  }

  training_data read(const std::string& name, const std::string& content, index_t seq_len = 1000,
                     long_records too_long = long_records::refuse) const {
    write_all(dir / name, content);
    const auto tok = tokenizer::from_json(tokenizer_document(prefix).dump(), "tokenizer");
    return training_data_reader(dir.path(), config, tok)
        .read((dir / name).string(), seq_len, too_long);
  }
  std::vector<std::string> samples(const std::string& name, const std::string& content,
                                   index_t seq_len = 1000,
                                   long_records too_long = long_records::refuse) const {
    const training_data data = read(name, content, seq_len, too_long);
    std::vector<std::string> all;
    index_t counted = 0;
    for (const training_sample& s : data.samples) {
      all.push_back(shown(s));
      counted += std::count(s.counted.begin(), s.counted.end(), '\1');
    }
    CHECK(data.counted == counted);
    return all;
  }
  std::string record(const std::string& line) const {
    const auto all = samples("data.jsonl", line + "\n");
    REQUIRE(all.size() == 1);
    return all.front();
  }
  bool refused(errc code, const std::string& content, std::initializer_list<const char*> why,
               index_t seq_len = 1000, const std::string& name = "data.jsonl") const {
    return throws_with(code, why, [&] { read(name, content, seq_len); });
  }
};

using texts = std::vector<std::string>;

constexpr const char* turns =
    "{% for m in messages %}{{ m.role[:1] }}:{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}";

}  // namespace

TEST_CASE("a text is tiled, and every token with one before it counts") {
  workplace w;
  CHECK(w.samples("data.txt", "abcdefg xyz", 4) == texts{"@|cde", "f|g x", "y|z"});
  CHECK(w.samples("data.txt", "abcdefgh", 4) == texts{"@|cde", "f|gh"});
  CHECK(w.samples("data.txt", "12345", 4) == texts{"1|234"});  // one token has none before it
  CHECK(w.samples("data.txt", "x</s>\n\ny", 9) == texts{"x|</s>\n\ny"});
  CHECK(w.refused(errc::invalid_argument, "", {"data.txt", "holds 0 tokens"}, 4, "data.txt"));
  CHECK(w.refused(errc::invalid_argument, "x", {"data.txt", "holds 1 tokens"}, 4, "data.txt"));
  w.prefix = 1;
  CHECK(w.samples("data.txt", "abcdefg", 4) == texts{"[|@cd", "[|efg"});
  CHECK(w.samples("data.txt", "x", 4) == texts{"[|x"});
  w.prefix = 2;
  CHECK(w.samples("data.txt", "abcdefg", 4) == texts{"[[|@c", "[[|de", "[[|fg"});
  w.prefix = 1;
  CHECK(w.refused(errc::invalid_argument, "x", {"--seq-len is 1", "above the 1"}, 1, "data.txt"));
}

TEST_CASE("of a prompt and a response the response counts, and its end") {
  workplace w;
  CHECK(w.record(R"({"prompt": "ask:", "response": "yes"})") == "ask:|yes]");
  CHECK(w.record(R"({"prompt": "xa", "response": "bc", "id": 7})") == "x|@c]");
  CHECK(w.record(R"({"prompt": "", "response": "yes"})") == "y|es]");
  // What a record says forges no token.
  CHECK(w.record(R"({"prompt": "</s>", "response": "<s>"})") == "</s>|<s>]");
  w.prefix = 1;
  CHECK(w.record(R"({"prompt": "ask:", "response": "yes"})") == "[ask:|yes]");
  CHECK(w.record(R"({"prompt": "", "response": "yes"})") == "[|yes]");
  w.config.eos_token_ids = {end, '.'};
  CHECK(w.record(R"({"prompt": "ask:", "response": "yes"})") == "[ask:|yes]");
  w.config.eos_token_ids.clear();
  CHECK(w.record(R"({"prompt": "ask:", "response": "yes"})") == "[ask:|yes");
}

TEST_CASE("a token that the model has no embedding of is refused where it is read") {
  workplace w;
  w.config.vocab_size = end;
  w.config.eos_token_ids.clear();
  w.prefix = 1;
  CHECK(w.record(R"({"prompt": "ask:", "response": "yes"})") == "[ask:|yes");
  w.config.vocab_size = ab;
  const std::string records = R"({"prompt": "x", "response": "y"})"
                              "\n"
                              R"({"prompt": "xab", "response": "y"})";
  CHECK(w.refused(errc::invalid_argument, records, {"line 1", "token 261", "vocab_size = 256"}));
  CHECK(w.refused(errc::invalid_argument, "xy", {"data.txt", "token 261"}, 9, "data.txt"));
  w.prefix = 0;
  CHECK(w.refused(errc::invalid_argument, records, {"line 2", "token 256", "vocab_size = 256"}));
  CHECK(w.refused(errc::invalid_argument, "xaby", {"data.txt", "token 256"}, 9, "data.txt"));
}

TEST_CASE("instructions are put into the prompt of Alpaca") {
  const workplace w;
  CHECK(w.record(R"({"instruction": "Add.", "input": "1 2", "output": "3"})") ==
        "Below is an instruction that describes a task, paired with an input that provides further "
        "context. Write a response that appropriately completes the request.\n\n### "
        "Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n|3]");
  const std::string without =
      "Below is an instruction that describes a task. Write a response that appropriately "
      "completes the request.\n\n### Instruction:\nGreet.\n\n### Response:\n|Hi]";
  CHECK(w.record(R"({"instruction": "Greet.", "output": "Hi"})") == without);
  CHECK(w.record(R"({"instruction": "Greet.", "input": "", "output": "Hi"})") == without);
  CHECK(w.record(R"({"instruction": "Greet.", "input": null, "output": "Hi"})") == without);
}

TEST_CASE("of a conversation every turn of the assistant counts up to its end") {
  const workplace w(turns);
  const auto conversation = [&](const char* list) {
    return w.record(std::string(R"({"messages": )") + list + "}");
  };
  CHECK(conversation(
            R"([{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}])") ==
        "u:q]\na:|r]|\n");
  CHECK(conversation(R"([{"role": "user", "content": "</s>"},)"
                     R"( {"role": "assistant", "content": "r"}, {"role": "user", "content": "ab"},)"
                     R"( {"role": "assistant", "content": "ab</s>"},)"
                     R"( {"role": "user", "content": "last"}])") ==
        "u:</s>]\na:|r]|\nu:@]\na:|@</s>]|\nu:last]\n");
}

TEST_CASE("templates that cannot be trained with are refused") {
  const char* one =
      R"({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]})";
  const workplace none;
  CHECK(none.refused(errc::unsupported, one, {"data.jsonl, line 1", "chat template"}));
  const workplace other(
      "{% for m in messages %}{{ m.content }}{% endfor %}"
      "{% if add_generation_prompt %}Well, {% endif %}");
  CHECK(other.refused(errc::unsupported, one, {"line 1", "messages[1]", "cannot be told"}));
  const workplace changing(
      "{% for m in messages %}{% if loop.last and m.role == 'assistant' %}now {% endif %}"
      "{{ m.content }}{% endfor %}{% if add_generation_prompt %}now {% endif %}");
  const std::string followed =
      R"({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"},)"
      R"( {"role": "user", "content": "s"}]})";
  CHECK(changing.record(one) == "qnow |r");
  CHECK(changing.refused(errc::unsupported, followed, {"line 1", "messages[1]", "cannot be told"}));
  const workplace strict("{{ raise_exception('no roles') }}");
  CHECK(strict.refused(errc::invalid_argument, one, {"line 1", "refuses", "no roles"}));
  const workplace silent(
      "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}"
      "{% endfor %}");
  CHECK(silent.refused(errc::corrupt_file, one, {"line 1", "no token of an assistant"}));
}

TEST_CASE("records that are wrong are refused with line and key") {
  const workplace w(turns);
  const auto refused = [&](const char* line, std::initializer_list<const char*> why) {
    // The second record, behind a blank line, is line 3.
    const std::string good = R"({"prompt": "p", "response": "r"})";
    return throws_with(errc::corrupt_file, {"data.jsonl, line 3"},
                       [&] { w.read("data.jsonl", good + "\n\n" + line + "\n" + good); }) &&
           throws_with(errc::corrupt_file, why,
                       [&] { w.read("data.jsonl", good + "\n \r\n" + line + "\n" + good); });
  };
  CHECK(refused("{\"prompt\": ", {"line 3", "not valid JSON"}));
  CHECK(refused("[1]", {"must be an object"}));
  CHECK(refused("{}", {"none of its keys", "prompt and response"}));
  CHECK(refused(R"({"text": "x"})", {"none of its keys"}));
  CHECK(refused(R"({"prompt": "p"})", {"response is missing"}));
  CHECK(refused(R"({"response": "p"})", {"prompt is missing"}));
  CHECK(refused(R"({"prompt": "p", "response": null})", {"response is missing"}));
  CHECK(refused(R"({"prompt": "p", "response": ""})", {"response is \"\"", "not empty"}));
  CHECK(refused(R"({"prompt": "p", "response": 3})", {"response is 3", "a string"}));
  CHECK(refused(R"({"prompt": ["p"], "response": "r"})", {"prompt is [\"p\"]", "a string"}));
  CHECK(refused(R"({"prompt": "p", "response": "\ud800"})", {"response", "surrogate"}));
  CHECK(refused(R"({"prompt": "p", "prompt": "p", "response": "r"})", {"'prompt' appears twice"}));
  CHECK(refused(R"({"instruction": "p"})", {"output is missing"}));
  CHECK(refused(R"({"output": "p"})", {"instruction is missing"}));
  CHECK(refused(R"({"instruction": "p", "output": ""})", {"output is \"\""}));
  CHECK(refused(R"({"instruction": "p", "output": "r", "input": 1})", {"input is 1", "a string"}));
  CHECK(refused(R"({"prompt": "p", "output": "r"})", {"the keys output, prompt"}));
  CHECK(refused(R"({"prompt": "p", "response": "r", "input": "i"})", {"input, prompt, response"}));
  CHECK(refused(R"({"messages": [], "prompt": "p"})", {"the keys prompt, messages"}));
  CHECK(refused(R"({"messages": []})", {"messages is []", "a list"}));
  CHECK(refused(R"({"messages": "x"})", {"messages is \"x\""}));
  CHECK(refused(R"({"messages": ["x"]})", {"messages[0]", "an object"}));
  CHECK(refused(R"({"messages": [{"role": "assistant"}]})", {"messages[0]", "content is missing"}));
  CHECK(refused(R"({"messages": [{"content": "x"}]})", {"messages[0]", "role is missing"}));
  CHECK(refused(R"({"messages": [{"role": "user", "content": "x"}]})", {"no turn", "assistant"}));
  CHECK(refused(R"({"messages": [{"role": "assistant", "content": ""}]})",
                {"messages[0]", "content is \"\""}));
  CHECK(w.refused(errc::invalid_argument, "", {"data.jsonl", "no record"}));
  CHECK(w.refused(errc::invalid_argument, "\n \n", {"data.jsonl", "no record"}));
  CHECK(w.refused(errc::invalid_argument, "x", {"data.csv", ".txt", ".jsonl"}, 9, "data.csv"));
  CHECK(throws_with(errc::io_error, {"nowhere.txt"}, [&] {
    const auto tok = tokenizer::from_json(tokenizer_document(0).dump(), "tokenizer");
    training_data_reader(w.dir.path(), w.config, tok).read("nowhere.txt", 9);
  }));
}

TEST_CASE("records that do not fit are refused or cut, and counted") {
  const workplace w;
  const std::string lines =
      "{\"prompt\": \"ask\", \"response\": \"yes\"}\n"   // 7 tokens with the end
      "{\"prompt\": \"ask\", \"response\": \"yes!\"}\n"  // 8
      "\n"
      "{\"prompt\": \"0123456\", \"response\": \"yes\"}\n"  // 11: nothing that counts fits
      "{\"prompt\": \"\", \"response\": \"012345678\"}\n";  // 10
  CHECK(w.samples("data.jsonl", lines, 11).size() == 4);
  CHECK(w.refused(
      errc::invalid_argument, lines,
      {"data.jsonl", "3 of 4 records", "--seq-len = 7", "line 4", "has 11", "--long-records cut"},
      7));
  const training_data data = w.read("data.jsonl", lines, 7, long_records::cut);
  CHECK(data.cut == 2);
  CHECK(data.left_out == 1);
  CHECK(w.samples("data.jsonl", lines, 7, long_records::cut) ==
        texts{"ask|yes]", "ask|yes!", "0|123456"});
  CHECK(throws_with(errc::invalid_argument, {"nothing that counts", "--seq-len = 3"}, [&] {
    w.read("data.jsonl", "{\"prompt\": \"ask\", \"response\": \"yes\"}", 3, long_records::cut);
  }));
}

TEST_CASE("a share of the samples validates, drawn by the seed") {
  const auto numbered = [](int count) {
    std::vector<training_sample> all;
    for (int i = 0; i < count; ++i) all.push_back({{0, i}, {0, 1}});
    return all;
  };
  const auto ids = [](const std::vector<training_sample>& samples) {
    std::vector<int> all;
    for (const training_sample& s : samples) all.push_back(s.tokens[1]);
    return all;
  };
  const auto drawn = [&](int count, double share, std::uint64_t seed) {
    auto rest = numbered(count);
    const auto taken = ids(split_off(rest, share, seed));
    auto all = ids(rest);
    CHECK(std::is_sorted(all.begin(), all.end()));
    CHECK(std::is_sorted(taken.begin(), taken.end()));
    all.insert(all.end(), taken.begin(), taken.end());
    CHECK(std::set<int>(all.begin(), all.end()).size() == static_cast<std::size_t>(count));
    return taken;
  };
  CHECK(drawn(40, 0.05, 1).size() == 2);
  CHECK(drawn(40, 0.001, 1).size() == 1);
  CHECK(drawn(40, 0.5, 1) == drawn(40, 0.5, 1));
  CHECK(drawn(40, 0.5, 1) != drawn(40, 0.5, 2));
  for (const auto& [count, share] : {std::pair{1, 0.05}, std::pair{4, 0.9}, std::pair{4, 0.0}}) {
    auto all = numbered(count);
    CHECK(throws_with(errc::invalid_argument, {"--validation-share is"},
                      [&, s = share] { split_off(all, s, 1); }));
  }
  const auto order = random_order(50, 3);
  CHECK(std::set<index_t>(order.begin(), order.end()).size() == 50);
  CHECK_FALSE(std::is_sorted(order.begin(), order.end()));
  CHECK(random_order(50, 3) == order);
  CHECK(random_order(50, 4) != order);
  CHECK(random_order(0, 4).empty());
}
