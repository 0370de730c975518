// SPDX-License-Identifier: Apache-2.0
// `qeft-llm generate`.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "commands.hpp"
#include "elementwise.hpp"
#include "llama.hpp"
#include "tokenizer.hpp"

namespace qeft_llm {

using qeft::errc;
using qeft::fail;
using qeft::index_t;

namespace {

/// Greedy at temperature 0, else a draw from softmax(logits / temperature).
int sample(std::vector<float>& logits, float temperature, std::mt19937_64& rng) {
  if (temperature == 0) {
    return static_cast<int>(std::max_element(logits.begin(), logits.end()) - logits.begin());
  }
  // Relative to the largest, so that no temperature overflows.
  const float largest = *std::max_element(logits.begin(), logits.end());
  for (float& x : logits) x = (x - largest) / temperature;
  softmax(logits.data(), static_cast<index_t>(logits.size()));
  // 53 random bits: the same draw with every standard library.
  double left = static_cast<double>(rng() >> 11U) * 0x1p-53;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    left -= static_cast<double>(logits[i]);
    if (left < 0) return static_cast<int>(i);
  }
  return static_cast<int>(logits.size()) - 1;
}

std::vector<int> encode_prompt(const tokenizer& tok, const generate_options& o) {
  if (!o.chat) {
    std::vector<int> ids = tok.encode(o.prompt, /*parse_special=*/true);
    // Unless it was written out.
    const std::vector<int>& prefix = tok.prefix();
    const bool has_prefix =
        ids.size() >= prefix.size() && std::equal(prefix.begin(), prefix.end(), ids.begin());
    if (!has_prefix) ids.insert(ids.begin(), prefix.begin(), prefix.end());
    return ids;
  }
  if (!tok.id_of("<|im_start|>") || !tok.id_of("<|im_end|>")) {
    fail(errc::unsupported,
         "generate: --chat needs a tokenizer with <|im_start|> and <|im_end|> (ChatML)");
  }
  std::vector<int> ids = tok.encode("<|im_start|>user\n", true);
  const auto append = [&](const std::vector<int>& more) {
    ids.insert(ids.end(), more.begin(), more.end());
  };
  append(tok.encode(o.prompt, false));  // a prompt cannot forge turns
  append(tok.encode("<|im_end|>\n<|im_start|>assistant\n", true));
  return ids;
}

}  // namespace

int run_generate(const generate_options& o) {
  if (o.max_tokens < 1) {
    fail(errc::invalid_argument,
         "generate: --max-tokens is " + std::to_string(o.max_tokens) + ", but must be positive");
  }
  if (!(o.temperature >= 0) || !std::isfinite(o.temperature)) {
    fail(errc::invalid_argument, "generate: --temperature is " + std::to_string(o.temperature) +
                                     ", but must be finite and not negative");
  }
  const qeft::on_host exec(o.threads);
  const model_source source(o.model);
  llama_model model(exec, source);
  const tokenizer tok = tokenizer::from_file(o.model + "/tokenizer.json");
  const std::vector<int> prompt = encode_prompt(tok, o);
  if (prompt.empty()) fail(errc::invalid_argument, "generate: the prompt is empty");

  const model_config& config = model.config();
  const auto prompt_tokens = static_cast<index_t>(prompt.size());
  const index_t room = config.max_position_embeddings - prompt_tokens;
  model.reset(prompt_tokens + std::clamp<index_t>(room, 0, o.max_tokens));
  std::mt19937_64 rng(o.seed);
  std::vector<float> logits(static_cast<std::size_t>(config.vocab_size));
  streaming_decoder decoder(tok);

  using clock = std::chrono::steady_clock;
  const auto start = clock::now();
  const float* last = model.forward(prompt).data() + (prompt_tokens - 1) * config.hidden_size;
  const auto prefilled = clock::now();
  index_t generated = 0;
  index_t decoded = 0;  // forward steps of one token
  for (;;) {
    model.logits(last, 1, logits.data());
    const int next = sample(logits, o.temperature, rng);
    ++generated;
    const auto& ends = config.eos_token_ids;
    if (!o.ignore_eos && std::find(ends.begin(), ends.end(), next) != ends.end()) break;
    std::fputs(decoder.next(next).c_str(), stdout);
    std::fflush(stdout);
    if (generated == o.max_tokens || model.position() == config.max_position_embeddings) break;
    last = model.forward({next}).data();
    ++decoded;
  }
  std::printf("%s\n", decoder.finish().c_str());

  const auto seconds = [](auto duration) {
    return std::chrono::duration<double>(duration).count();
  };
  std::fprintf(stderr, "prefill %.1f tokens/s (%lld tokens), decode %.1f tokens/s (%lld tokens)\n",
               static_cast<double>(prompt_tokens) / seconds(prefilled - start),
               static_cast<long long>(prompt_tokens),
               static_cast<double>(decoded) / seconds(clock::now() - prefilled),
               static_cast<long long>(decoded));
  return 0;
}

}  // namespace qeft_llm
