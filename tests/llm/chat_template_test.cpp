// SPDX-License-Identifier: Apache-2.0
// Chat templates against jinja2 (chat_templates.py), the templates of published models word for
// word, and what must be refused.
#include "chat_template.hpp"

#include <array>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "support/catch.hpp"
#include "support/skip.hpp"
#include "support/sweep.hpp"
#include "support/throws.hpp"
#include "unit/io/temporary_directory.hpp"

using namespace qeft_llm;
using namespace qeft_test;
using nlohmann::json;
using qeft::errc;

namespace {

const std::map<std::string, std::string> tokens = {{"bos_token", "<s>"}, {"eos_token", "</s>"}};
const std::vector<chat_message> hello = {{"user", "hi"}};
const std::vector<chat_message> talk = {
    {"system", " Be brief. "}, {"user", "a"}, {"assistant", "b "}, {"user", " c"}};

std::string published(const std::string& name) {
  return read_all(std::filesystem::path(QEFT_CHAT_TEMPLATES) / (name + ".jinja"));
}
std::string rendered(const std::string& source, const std::vector<chat_message>& messages) {
  return chat_template(source, "test").render(messages, tokens).text;
}

/// The output of a command, or nothing when it fails.
std::string output_of(const std::string& command) {
  std::FILE* pipe = ::popen(command.c_str(), "r");
  REQUIRE(pipe != nullptr);
  std::string text;
  std::array<char, 4096> buffer{};
  while (const std::size_t n = std::fread(buffer.data(), 1, buffer.size(), pipe)) {
    text.append(buffer.data(), n);
  }
  return ::pclose(pipe) == 0 ? text : std::string();
}

}  // namespace

TEST_CASE("templates of published models") {
  CHECK(rendered(published("smollm2"), hello) ==
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging "
        "Face<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n");
  CHECK(rendered(published("qwen2"), talk) ==
        "<|im_start|>system\n Be brief. <|im_end|>\n<|im_start|>user\na<|im_end|>\n"
        "<|im_start|>assistant\nb <|im_end|>\n<|im_start|>user\n c<|im_end|>\n"
        "<|im_start|>assistant\n");
  CHECK(rendered(published("qwen2_5"), hello) ==
        "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant."
        "<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n");
  CHECK(rendered(published("llama2"), talk) ==
        "<s>[INST] <<SYS>>\n Be brief. \n<</SYS>>\n\na [/INST] b </s><s>[INST] c [/INST]");
  CHECK(rendered(published("llama3"), talk) ==
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\na<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nb<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nc<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n");
  CHECK(rendered(published("llama3_2"), hello) ==
        "<s><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
        "Today Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nhi"
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n");
  CHECK(rendered(published("mistral"), {{"user", "a"}, {"assistant", "b"}, {"user", "c"}}) ==
        "<s>[INST] a [/INST]b</s>[INST] c [/INST]");
  CHECK(rendered(published("mistral_v3"), talk) ==
        "<s>[INST] a[/INST] b</s>[INST]  Be brief. \n\n c[/INST]");
  CHECK(rendered(published("zephyr"), talk) ==
        "<|system|>\n Be brief. </s>\n<|user|>\na</s>\n<|assistant|>\nb </s>\n<|user|>\n c</s>\n"
        "<|assistant|>\n");
  CHECK(throws_with(errc::invalid_argument, {"refuses these messages", "Only user and assistant"},
                    [] {
                      rendered(published("mistral"), {{"tool", "a"}, {"tool", "b"}});
                    }) !=
        throws_with(errc::invalid_argument, {"refuses these messages", "must alternate"}, [] {
          rendered(published("mistral"), {{"tool", "a"}, {"tool", "b"}});
        }));
}

TEST_CASE("templates give what jinja2 gives", "[data]") {
  if (output_of("python3 -c 'import jinja2; print(1)' 2>/dev/null").empty()) {
    skip("python3-jinja2 is not installed");
    return;
  }
  const char* seed = std::getenv("QEFT_CHAT_SEED");
  const json cases =
      json::parse(output_of("python3 -B '" QEFT_CHAT_TEMPLATES "/../chat_templates.py' --cases 600 "
                            "--seed " +
                            std::string(seed == nullptr ? "1" : seed)));
  sweep all("cases of jinja2");
  for (const json& c : cases) {
    all.ran();
    std::vector<chat_message> messages;
    for (const json& m : c["messages"]) messages.push_back({m["role"], m["content"]});
    json text;
    std::string error;
    try {
      text = chat_template(c["template"], "test").render(messages, c["tokens"]).text;
    } catch (const qeft::error& e) {
      error = e.what();
    }
    INFO(c["template"].get<std::string>() << "\n---\n" << c["messages"].dump() << "\n" << error);
    REQUIRE(text == c["text"]);
  }
}

TEST_CASE("what a message says is marked, whatever the template does with it") {
  const marked_text t =
      chat_template(
          "<{{ messages[0].content | trim | upper }}>{{ messages[0].content | tojson }}"
          "{{ (messages[0].content ~ '<e>').replace('b', '<b>') }}",
          "test")
          .render({{"user", " ab "}}, {});
  CHECK(t.text == "<AB>\" ab \" a<b> <e>");
  std::string marks;
  for (const char m : t.marks) marks += m == '\1' ? 'm' : '-';
  CHECK(marks == "-mm-mmmmmmmm---m---");
}

TEST_CASE("what is not understood is refused by name and line") {
  const auto refused = [](const std::string& source, const char* name) {
    INFO(source);
    return throws_with(errc::unsupported, {"test: line ", name}, [&] { rendered(source, hello); });
  };
  CHECK(refused("\n{% macro f() %}{% endmacro %}", "line 2: the statement {% macro %}"));
  CHECK(refused("{% include 'x' %}", "{% include %}"));
  CHECK(refused("{{ messages | map('upper') }}", "the filter map"));
  CHECK(refused("{{ 1 is divisibleby 2 }}", "the test divisibleby"));
  CHECK(refused("{{ cycler(1) }}", "the function cycler()"));
  CHECK(refused("{{ 'a'.format(1) }}", "the method .format()"));
  CHECK(refused("{{ 1.5 }}", "a fraction"));
  CHECK(refused("{{ messages }}", "a list as text"));
  CHECK(refused("{% if true %}", "{% endif %} is missing"));
  CHECK(refused("{% for a in b %}{% endif %}", "{% endfor %} is missing"));
  CHECK(refused("{% endif %}", "without a start"));
  CHECK(refused("{{ 'a }}", "a tag is not closed"));
  CHECK(refused("{{ a", "a tag is not closed"));
  CHECK(refused("{{ (1 }}", "expected )"));
  CHECK(refused("{{ 1 2 }}", "unexpected 2"));
  CHECK(refused("{{ " + std::string(1000, '(') + "1" + std::string(1000, ')') + " }}",
                "such deep nesting"));
  std::string loops;
  for (int i = 0; i < 5; ++i) loops += "{% for i in range(1000) %}";
  for (int i = 0; i < 5; ++i) loops += "{% endfor %}";
  CHECK(refused(loops, "it does not come to an end"));
  const std::string space = "{% set ns = namespace(x='a', l=[]) %}";
  std::string doubled = space;
  for (int i = 0; i < 60; ++i) doubled += "{% set ns.x = ns.x + ns.x %}";
  CHECK(refused(doubled, "it does not come to an end"));
  std::string printed = space;
  for (int i = 0; i < 20; ++i) printed += "{% set ns.x = ns.x + ns.x %}";
  CHECK(refused(printed + "{% for i in range(1000) %}{{ ns.x }}{% endfor %}",
                "the text is too long"));
  CHECK(refused("{{ 4294967296 * 4294967296 * 4294967296 }}", "numbers as large"));
  CHECK(refused("{{ 1 - 4294967296 }}", "numbers as large"));
  CHECK(refused(space + "{% for i in range(100) %}{% set ns.l = [ns.l] %}{% endfor %}",
                "such deep nesting"));
  CHECK(refused(space + "{% set ns.x = [ns] %}{{ ns|tojson }}", "such deep nesting"));
  CHECK(throws_with(errc::invalid_argument, {"'x' is undefined, but .y of it"},
                    [] { rendered("{{ x.y }}", hello); }));
}

TEST_CASE("line ends and counted replacements are those of jinja2") {
  CHECK(rendered("a\r\nb\rc\n", hello) == "a\nb\nc");
  CHECK(rendered("{{ 'aXbXc'.replace('X', 'y', 1) }}{{ 'XX'|replace('X', 'z', 0) }}", hello) ==
        "aybXcXX");
}

TEST_CASE("where a model's template is found") {
  const temporary_directory dir;
  const auto source = [&](const std::string& name = "") {
    return find_chat_template(dir.path(), name).source;
  };
  CHECK(source().empty());
  json config = {{"chat_template", "one"}, {"eos_token", "</s>"}};
  config["bos_token"] = {{"content", "<s>"}, {"lstrip", false}};
  write_all(dir / "tokenizer_config.json", config.dump());
  CHECK(source() == "one");
  CHECK(source("default") == "one");
  CHECK(find_chat_template(dir.path(), "").tokens == tokens);
  CHECK(throws_with(errc::invalid_argument, {"no chat template named other", "default"},
                    [&] { source("other"); }));
  config["chat_template"] = {{{"name", "tool_use"}, {"template", "two"}},
                             {{"name", "rag"}, {"template", "three"}}};
  write_all(dir / "tokenizer_config.json", config.dump());
  CHECK(source("rag") == "three");
  CHECK(throws_with(errc::invalid_argument, {"named default", "rag, tool_use"}, [&] { source(); }));
  write_all(dir / "chat_template.jinja", "file");
  CHECK(source() == "file");
  CHECK(source("tool_use") == "two");
  config["chat_template"] = 5;
  write_all(dir / "tokenizer_config.json", config.dump());
  CHECK(throws_with(errc::corrupt_file, {"tokenizer_config.json", "chat_template must be"},
                    [&] { source(); }));
}

TEST_CASE("conversations in files") {
  const temporary_directory dir;
  const auto read = [&](const std::string& text) {
    write_all(dir / "m.json", text);
    return read_messages((dir / "m.json").string());
  };
  const auto messages = read(R"([{"role": "user", "content": "a"}, {"role": "x", "content": ""}])");
  REQUIRE(messages.size() == 2);
  CHECK(messages[0].content == "a");
  CHECK(messages[1].role == "x");
  CHECK(throws_with(errc::invalid_argument, {"must hold a list"}, [&] { read("{}"); }));
  CHECK(throws_with(errc::invalid_argument, {"at least one"}, [&] { read("[]"); }));
  CHECK(throws_with(errc::corrupt_file, {"message 0: content is missing, but must be a string"},
                    [&] { read(R"([{"role": "user"}])"); }));
}
