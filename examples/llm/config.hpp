// SPDX-License-Identifier: Apache-2.0
// The config.json of a Llama-family model.
#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "qeft/core/config.hpp"
#include "qeft/io/quantization_config.hpp"

namespace qeft_llm {

/// How rotary frequencies depart from theta^(-2i / head_dim).
enum class rope_scaling {
  none,
  linear,  // divided by `factor`
  llama3,  // low frequencies divided by `factor`, high ones kept, a ramp between (Llama 3.1)
};

struct rope_config {
  double theta = 10000;
  rope_scaling scaling = rope_scaling::none;
  double factor = 1;            // >= 1
  double low_freq_factor = 1;   // llama3 only, as the three below
  double high_freq_factor = 4;  // > low_freq_factor
  qeft::index_t original_max_position_embeddings = 8192;
};

/// Sizes in elements; names as in config.json. What a missing key means is what `transformers` 5
/// assumes for the model type.
struct model_config {
  std::string model_type;  // "llama", "mistral" or "qwen2"
  qeft::index_t hidden_size = 0;
  qeft::index_t intermediate_size = 0;
  qeft::index_t num_hidden_layers = 0;
  qeft::index_t num_attention_heads = 0;
  qeft::index_t num_key_value_heads = 0;  // divides num_attention_heads
  qeft::index_t head_dim = 0;             // even
  qeft::index_t vocab_size = 0;
  qeft::index_t max_position_embeddings = 0;
  /// In the layers that have a window each token attends to the last `sliding_window` tokens,
  /// itself included; 0 where no layer has one. Attention over at most that many tokens does not
  /// depend on it.
  qeft::index_t sliding_window = 0;
  std::vector<bool> windowed_layers;  // by layer; empty when every layer has the window
  double rms_norm_eps = 1e-6;
  rope_config rope;
  bool tie_word_embeddings = false;  // the head is the embedding
  bool qkv_bias = false;             // q_proj, k_proj and v_proj have a bias
  bool o_bias = false;
  bool mlp_bias = false;  // gate_proj, up_proj and down_proj have a bias
  /// The tokens that end a text: those of generation_config.json, or else of config.json, each
  /// once, in the order of the file. The first is what a trained response ends with. Ids without a
  /// row in the embedding, which no model can say, are left out.
  std::vector<int> eos_token_ids;
  std::optional<qeft::io::quantization_config> quantization;  // of a QEFT checkpoint
  nlohmann::json source;  // the parsed config.json, from which a new one is made

  /// The window of a layer, 0 for none.
  qeft::index_t window_of(qeft::index_t layer) const {
    const bool has = windowed_layers.empty() || windowed_layers[static_cast<std::size_t>(layer)];
    return has ? sliding_window : 0;
  }
};

/// Checks a parsed config.json. Throws qeft::error, naming key, value and rule: corrupt_file for
/// what breaks a rule, unsupported for what is valid but would need other arithmetic.
/// @param where names the JSON in errors, for example its path
model_config parse_config(const nlohmann::json& json, const std::string& where);

/// Reads DIR/config.json and, where there is one, DIR/generation_config.json. As `transformers`, it
/// goes on without a generation_config.json that is no JSON, and says so on stderr.
model_config read_config(const std::filesystem::path& directory);

}  // namespace qeft_llm
