// SPDX-License-Identifier: Apache-2.0
// The ids of Hugging Face `tokenizers` for 200 KB of varied text; tokenizer_corpus.py writes them.
#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/skip.hpp"
#include "support/sweep.hpp"
#include "tokenizer.hpp"

using namespace qeft_llm;
using namespace qeft_test;

namespace {

std::string from_hexadecimal(const std::string& digits) {
  std::string bytes;
  for (std::size_t i = 0; i + 1 < digits.size(); i += 2) {
    bytes += static_cast<char>(std::stoi(digits.substr(i, 2), nullptr, 16));
  }
  return bytes;
}

std::string streamed(const tokenizer& tok, const std::vector<int>& ids) {
  streaming_decoder decoder(tok);
  std::string text;
  for (const int id : ids) text += decoder.next(id);
  return text + decoder.finish();
}

}  // namespace

TEST_CASE("ids and text are those of Hugging Face tokenizers") {
  const char* data = std::getenv("QEFT_TEST_DATA");
  const std::string folder = std::string(data == nullptr ? "" : data) + "/tokenizer/";
  if (data == nullptr || !std::ifstream(folder + "normalized.cases.json")) {
    skip("no results of `tokenizers` in QEFT_TEST_DATA/tokenizer (see tokenizer_corpus.py)");
    return;
  }
  const std::vector<std::string> byte_level = {"smollm2", "gpt2", "llama3", "qwen2", "options"};
  const std::vector<std::string> sentencepiece = {"llama2", "mistral", "first",
                                                  "always", "never",   "normalized"};
  const auto compare = [&](const std::string& name, const std::vector<int>& prefix) {
    const tokenizer tok = tokenizer::from_file(folder + name + ".tokenizer.json");
    CHECK(tok.prefix() == prefix);
    std::ifstream in(folder + name + ".cases.json");
    const nlohmann::json cases = nlohmann::json::parse(in);
    std::size_t bytes = 0;
    for (std::size_t i = 0; i < cases.size(); ++i) {
      const auto text = from_hexadecimal(cases[i]["text"].get<std::string>());
      const auto ids = cases[i]["ids"].get<std::vector<int>>();
      const auto decoded = from_hexadecimal(cases[i]["decoded"].get<std::string>());
      INFO(name << ", case " << i << ", " << text.size() << " bytes");
      CHECK(tok.encode(text) == ids);
      CHECK(tok.encode(text, false) == cases[i]["plain_ids"].get<std::vector<int>>());
      CHECK(tok.decode(ids) == decoded);
      CHECK(streamed(tok, ids) == decoded);
      const std::vector<int> reversed(ids.rbegin(), ids.rend());
      const auto text_of_reversed =
          from_hexadecimal(cases[i]["decoded_reversed"].get<std::string>());
      CHECK(tok.decode(reversed) == text_of_reversed);
      CHECK(streamed(tok, reversed) == text_of_reversed);
      bytes += text.size();
    }
    INFO(name);
    CHECK(bytes >= 200000);
  };
  for (const std::string& name : byte_level) {
    compare(name, name == "llama3" ? std::vector<int>{1} : std::vector<int>{});
  }
  for (const std::string& name : sentencepiece) compare(name, {1});
}
