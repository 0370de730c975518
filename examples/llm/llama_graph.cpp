// SPDX-License-Identifier: Apache-2.0
#include "llama_graph.hpp"

#include <string>

namespace qeft_llm {

using qeft::no_space;

llama_graph describe(const model_config& config) {
  llama_graph g{{}, no_space, {}, {}};
  g.stream = g.graph.add_space("residual stream", config.hidden_size);
  g.graph.add_tensor("model.embed_tokens", no_space, g.stream);
  g.graph.add_tensor("lm_head", no_space, g.stream);
  g.graph.add_tensor("model.norm", no_space, g.stream);
  for (int l = 0; l < config.num_hidden_layers; ++l) {
    const std::string block = "model.layers." + std::to_string(l);
    const auto mlp = g.graph.add_space(block + ".mlp", config.intermediate_size);
    const auto value = g.graph.add_space(
        block + ".value", config.num_key_value_heads * config.head_dim, config.num_key_value_heads);
    const auto attention = g.graph.add_repeated_space(
        block + ".attention", value, config.num_attention_heads / config.num_key_value_heads);
    g.mlp.push_back(mlp);
    g.value.push_back(value);

    const auto linear = [&](const std::string& name, qeft::space_id rows, qeft::space_id columns) {
      g.graph.add_tensor(block + name, rows, columns);
      g.graph.add_tensor(block + name + ".bias", no_space, rows);
    };
    g.graph.add_tensor(block + ".input_layernorm", no_space, g.stream);
    g.graph.add_tensor(block + ".post_attention_layernorm", no_space, g.stream);
    linear(".self_attn.q_proj", no_space, g.stream);
    linear(".self_attn.k_proj", no_space, g.stream);
    linear(".self_attn.v_proj", value, g.stream);
    linear(".self_attn.o_proj", g.stream, attention);
    linear(".mlp.gate_proj", mlp, g.stream);
    linear(".mlp.up_proj", mlp, g.stream);
    linear(".mlp.down_proj", g.stream, mlp);
  }
  return g;
}

}  // namespace qeft_llm
