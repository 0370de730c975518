// SPDX-License-Identifier: Apache-2.0
#include "config.hpp"

#include <algorithm>

#include "qeft/io/json.hpp"
#include "qeft/io/json_fields.hpp"

namespace qeft_llm {

using qeft::errc;
using qeft::fail;
using qeft::index_t;
using qeft::io::json_fields;

namespace {

constexpr index_t max_size = index_t{1} << 30;

[[noreturn]] void refuse_unsupported(const json_fields& fields, const char* key,
                                     const std::string& rule) {
  const nlohmann::json* value = fields.find(key);
  fail(errc::unsupported, fields.where() + ": " + key + " is " +
                              (value ? value->dump() : "missing") + ", but only " + rule +
                              " is supported");
}

std::string read_model_type(const json_fields& fields) {
  const std::string type = fields.text("model_type");
  if (type != "llama" && type != "mistral" && type != "qwen2") {
    refuse_unsupported(fields, "model_type", "\"llama\", \"mistral\" or \"qwen2\"");
  }
  return type;
}

void read_sizes(const json_fields& fields, model_config& c) {
  c.hidden_size = fields.integer("hidden_size", 1, max_size);
  c.intermediate_size = fields.integer("intermediate_size", 1, max_size);
  c.num_hidden_layers = fields.integer("num_hidden_layers", 1, 100000);
  c.num_attention_heads = fields.integer("num_attention_heads", 1, 100000);
  c.vocab_size = fields.integer("vocab_size", 1, max_size);
  c.max_position_embeddings = fields.integer_or("max_position_embeddings", 2048, 1, max_size);

  // Only Llama 1 and 2 leave it out; Hugging Face's defaults for the others are those of one model.
  c.num_key_value_heads =
      c.model_type == "llama"
          ? fields.integer_or("num_key_value_heads", c.num_attention_heads, 1, 100000)
          : fields.integer("num_key_value_heads", 1, 100000);
  if (c.num_attention_heads % c.num_key_value_heads != 0) {
    fields.refuse("num_key_value_heads",
                  "a divisor of num_attention_heads = " + std::to_string(c.num_attention_heads));
  }
  if (!fields.has("head_dim") && c.hidden_size % c.num_attention_heads != 0) {
    fields.refuse("num_attention_heads",
                  "a divisor of hidden_size = " + std::to_string(c.hidden_size) +
                      " where head_dim is not given");
  }
  c.head_dim =
      fields.integer_or("head_dim", c.hidden_size / c.num_attention_heads, 1, index_t{1} << 16);
  if (c.head_dim % 2 != 0) {
    fail(errc::corrupt_file, fields.where() + ": head_dim is " + std::to_string(c.head_dim) +
                                 ", but must be even for rotary embeddings");
  }
}

/// Any of the spellings: rope_theta beside rope_scaling {"type" or "rope_type"}, or all of it
/// inside rope_parameters.
rope_config read_rope(const json_fields& fields) {
  rope_config rope;
  rope.theta = fields.positive_or("rope_theta", rope.theta);
  const char* key = fields.has("rope_parameters") ? "rope_parameters" : "rope_scaling";
  if (!fields.has(key)) return rope;

  const json_fields scaling(*fields.find(key), fields.where() + ": " + key);
  rope.theta = scaling.positive_or("rope_theta", rope.theta);
  if (scaling.positive_or("partial_rotary_factor", 1) != 1) {
    refuse_unsupported(scaling, "partial_rotary_factor", "1");
  }
  const char* type_key = scaling.has("rope_type") ? "rope_type" : "type";
  const std::string type = scaling.text(type_key);
  if (type == "default") return rope;
  if (type != "linear" && type != "llama3") {
    refuse_unsupported(scaling, type_key, "\"default\", \"linear\" or \"llama3\"");
  }
  rope.factor = scaling.positive("factor");
  if (rope.factor < 1) scaling.refuse("factor", "at least 1");
  rope.scaling = rope_scaling::linear;
  if (type == "linear") return rope;

  rope.scaling = rope_scaling::llama3;
  rope.low_freq_factor = scaling.positive("low_freq_factor");
  rope.high_freq_factor = scaling.positive("high_freq_factor");
  if (rope.high_freq_factor <= rope.low_freq_factor) {
    scaling.refuse("high_freq_factor",
                   "above low_freq_factor = " + std::to_string(rope.low_freq_factor));
  }
  rope.original_max_position_embeddings =
      scaling.integer("original_max_position_embeddings", 1, max_size);
  return rope;
}

void read_biases(const json_fields& fields, model_config& c) {
  if (c.model_type == "qwen2") {
    c.qkv_bias = true;  // Qwen2 always has these three, and no key for them
  } else if (c.model_type == "llama") {
    c.qkv_bias = c.o_bias = fields.boolean_or("attention_bias", false);
    c.mlp_bias = fields.boolean_or("mlp_bias", false);
  }
}

index_t read_sliding_window(const json_fields& fields, const model_config& c) {
  if (c.model_type == "llama") return 0;
  const bool on = c.model_type == "mistral" || fields.boolean_or("use_sliding_window", false);
  // For Mistral null means none, and a missing key 4096.
  const bool missing = fields.object().find("sliding_window") == fields.object().end();
  const index_t window = fields.integer_or("sliding_window", missing ? 4096 : 0, 1, max_size);
  if (!on || window >= c.max_position_embeddings) return 0;
  if (c.model_type == "qwen2") {  // it would apply to some layers only
    refuse_unsupported(fields, "use_sliding_window", "false");
  }
  return window;
}

/// A token id, a list of them, or nothing.
std::vector<int> read_token_ids(const json_fields& fields, const char* key, index_t vocab_size) {
  const nlohmann::json* value = fields.find(key);
  if (value == nullptr) return {};
  const nlohmann::json list = value->is_array() ? *value : nlohmann::json::array({*value});
  std::vector<int> ids;
  for (const nlohmann::json& id : list) {
    const index_t n = id.is_number_integer() ? id.get<index_t>() : -1;
    if (n < 0 || n >= vocab_size) {
      fields.refuse(key, "a token id below vocab_size = " + std::to_string(vocab_size) +
                             ", or a list of them");
    }
    ids.push_back(static_cast<int>(n));
  }
  return ids;
}

void read_special_tokens(const json_fields& fields, model_config& c) {
  const auto bos = read_token_ids(fields, "bos_token_id", c.vocab_size);
  if (bos.size() > 1) fields.refuse("bos_token_id", "one token id");
  if (!bos.empty()) c.bos_token_id = bos.front();
  auto& eos = c.eos_token_ids;
  for (const int id : read_token_ids(fields, "eos_token_id", c.vocab_size)) eos.push_back(id);
  std::sort(eos.begin(), eos.end());
  eos.erase(std::unique(eos.begin(), eos.end()), eos.end());
}

}  // namespace

model_config parse_config(const nlohmann::json& json, const std::string& where) {
  const json_fields fields(json, where);
  model_config c;
  c.source = json;
  c.model_type = read_model_type(fields);
  read_sizes(fields, c);
  c.rms_norm_eps = fields.positive_or("rms_norm_eps", c.rms_norm_eps);
  c.rope = read_rope(fields);
  c.tie_word_embeddings = fields.boolean_or("tie_word_embeddings", false);
  read_biases(fields, c);
  c.sliding_window = read_sliding_window(fields, c);
  read_special_tokens(fields, c);
  if (fields.text_or("hidden_act", "silu") != "silu") {
    refuse_unsupported(fields, "hidden_act", "\"silu\"");
  }
  if (fields.has("quantization_config")) {
    c.quantization =
        qeft::io::quantization_config_from_json(*fields.find("quantization_config"), where);
  }
  return c;
}

model_config read_config(const std::filesystem::path& directory) {
  const auto path = directory / "config.json";
  model_config c = parse_config(qeft::io::load_json(path), path.string());
  // Chat models end a turn with tokens that only this file lists.
  const auto generation = directory / "generation_config.json";
  if (std::filesystem::exists(generation)) {
    const nlohmann::json json = qeft::io::load_json(generation);
    read_special_tokens(json_fields(json, generation.string()), c);
  }
  return c;
}

}  // namespace qeft_llm
