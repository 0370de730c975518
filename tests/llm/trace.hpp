// SPDX-License-Identifier: Apache-2.0
// What a model computes on the way, by the phases of its blocks.
#pragma once

#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "llama.hpp"

namespace qeft_test {

using namespace qeft_llm;

/// What a model computes of a window: the inputs of its linears, and the streams that o_proj and
/// down_proj add to.
struct trace {
  std::map<std::string, std::vector<float>> input;
  std::map<std::string, std::vector<float>> stream;
};
inline trace trace_of(const std::filesystem::path& directory, const std::vector<int>& window) {
  const qeft::on_host exec(1);
  const model_source source(directory);
  const model_config& c = source.config();
  const auto tokens = static_cast<qeft::index_t>(window.size());
  const rope_table rope(c, tokens);
  block_cache cache(c.num_key_value_heads, c.head_dim, tokens);
  const linear embedding(exec, source.matrix("model.embed_tokens", c.vocab_size, c.hidden_size));
  std::vector<float> h(static_cast<std::size_t>(tokens * c.hidden_size));
  for (qeft::index_t t = 0; t < tokens; ++t) {
    embedding.read_row(window[static_cast<std::size_t>(t)], h.data() + t * c.hidden_size);
  }
  trace t;
  for (qeft::index_t l = 0; l < c.num_hidden_layers; ++l) {
    const block b = load_block(exec, source, l);
    t.stream[linear_name(l, linear_kind::o)] = h;
    std::vector<float> middle = h;
    block_forward(exec, c, rope, b, tokens, 0, cache, h.data(),
                  [&](linear_kind kind, const float* x, qeft::index_t n) {
                    t.input[linear_name(l, kind)].assign(x, x + n * shape_of(c, kind).in_channels);
                    if (kind != linear_kind::o) return;
                    std::vector<float> y(middle.size());
                    b.o.forward(exec, x, n, y.data());
                    for (std::size_t i = 0; i < y.size(); ++i) middle[i] += y[i];
                  });
    t.stream[linear_name(l, linear_kind::down)] = middle;
  }
  return t;
}

}  // namespace qeft_test
