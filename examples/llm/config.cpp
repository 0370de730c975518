// SPDX-License-Identifier: Apache-2.0
#include "config.hpp"

#include <algorithm>
#include <cstdio>

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

/// What `transformers` assumes for a missing key; those of the sizes are of one model each, so that
/// a missing size is an error here.
struct class_defaults {
  index_t max_position_embeddings;
  index_t num_key_value_heads;  // 0: as many as query heads
  std::optional<int> eos_token_id;
};

class_defaults defaults_of(const std::string& model_type) {
  if (model_type == "mistral") return {131072, 8, 2};
  if (model_type == "qwen2") return {32768, 32, std::nullopt};
  return {2048, 0, 2};
}

bool is_missing(const json_fields& fields, const char* key) {
  return fields.object().find(key) == fields.object().end();
}

index_t read_key_value_heads(const json_fields& fields, const model_config& c) {
  // Null means as many as query heads for every type.
  const index_t absent =
      is_missing(fields, "num_key_value_heads") ? defaults_of(c.model_type).num_key_value_heads : 0;
  const index_t heads = fields.integer_or("num_key_value_heads",
                                          absent == 0 ? c.num_attention_heads : absent, 1, 100000);
  if (c.num_attention_heads % heads == 0) return heads;
  const std::string rule =
      "a divisor of num_attention_heads = " + std::to_string(c.num_attention_heads);
  if (fields.has("num_key_value_heads")) fields.refuse("num_key_value_heads", rule);
  fail(errc::corrupt_file, fields.where() + ": num_key_value_heads is missing, which means " +
                               std::to_string(heads) + " for " + c.model_type + ", but must be " +
                               rule);
}

void read_sizes(const json_fields& fields, model_config& c) {
  c.hidden_size = fields.integer("hidden_size", 1, max_size);
  c.intermediate_size = fields.integer("intermediate_size", 1, max_size);
  c.num_hidden_layers = fields.integer("num_hidden_layers", 1, 100000);
  c.num_attention_heads = fields.integer("num_attention_heads", 1, 100000);
  c.vocab_size = fields.integer("vocab_size", 1, max_size);
  c.max_position_embeddings = fields.integer_or(
      "max_position_embeddings", defaults_of(c.model_type).max_position_embeddings, 1, max_size);
  c.num_key_value_heads = read_key_value_heads(fields, c);
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

/// Rotation of a part of each head is not supported, wherever it is asked for.
void refuse_partial_rotation(const json_fields& fields) {
  if (fields.positive_or("partial_rotary_factor", 1) != 1) {
    refuse_unsupported(fields, "partial_rotary_factor", "1");
  }
}

/// A null would be a value that `transformers` does not replace by its default.
double read_theta(const json_fields& fields, double absent) {
  return is_missing(fields, "rope_theta") ? absent : fields.positive("rope_theta");
}

/// The object that says how positions rotate, as `transformers` 5 chooses it: rope_scaling, the old
/// spelling, where it is not empty, and then nothing of rope_parameters counts.
const char* rope_key(const json_fields& fields) {
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    const nlohmann::json* value = fields.find(key);
    if (value != nullptr && !(value->is_object() && value->empty())) return key;
  }
  return nullptr;
}

/// Any of the spellings: rope_theta beside rope_scaling {"type" or "rope_type"}, or all of it
/// inside rope_parameters.
rope_config read_rope(const json_fields& fields, const model_config& c) {
  rope_config rope;
  refuse_partial_rotation(fields);
  const char* key = rope_key(fields);
  if (key == nullptr) {
    rope.theta = read_theta(fields, rope.theta);
    return rope;
  }
  const json_fields scaling(*fields.find(key), fields.where() + ": " + key);
  rope.theta = is_missing(scaling, "rope_theta") ? read_theta(fields, rope.theta)
                                                 : read_theta(scaling, rope.theta);
  refuse_partial_rotation(scaling);
  for (const auto& [name, value] : scaling.object().items()) {
    // {"full_attention": {...}, ...}: another rotation for each type of layer
    if (value.is_object()) refuse_unsupported(scaling, name.c_str(), "one rotation for all layers");
  }
  const char* type_key = is_missing(scaling, "rope_type") ? "type" : "rope_type";
  const std::string type = is_missing(scaling, type_key) ? "default" : scaling.text(type_key);
  // "dynamic" scales positions behind max_position_embeddings, which are refused.
  if (type == "default" || type == "dynamic") return rope;
  if (type != "linear" && type != "llama3") {
    refuse_unsupported(scaling, type_key, "\"default\", \"linear\" or \"llama3\"");
  }
  rope.factor = scaling.positive("factor");
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
      is_missing(scaling, "original_max_position_embeddings")
          ? c.max_position_embeddings
          : scaling.integer("original_max_position_embeddings", 1, max_size);
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

/// Which layers of a Qwen2 attend to a window: those that layer_types names, or without it those
/// from max_window_layers on.
std::vector<bool> read_windowed_layers(const json_fields& fields, const model_config& c,
                                       bool has_window) {
  const auto layers = static_cast<std::size_t>(c.num_hidden_layers);
  std::vector<bool> windowed(layers);
  const nlohmann::json* types = fields.find("layer_types");
  if (types == nullptr) {
    const index_t first = fields.integer_or("max_window_layers", 28, 0, max_size);
    for (std::size_t l = 0; l < layers; ++l) {
      windowed[l] = has_window && static_cast<index_t>(l) >= first;
    }
    return windowed;
  }
  if (!types->is_array() || types->size() != layers) {
    fields.refuse("layer_types",
                  "a list of num_hidden_layers = " + std::to_string(layers) + " types");
  }
  for (std::size_t l = 0; l < layers; ++l) {
    windowed[l] = (*types)[l] == "sliding_attention";
    if (!windowed[l] && (*types)[l] != "full_attention") {
      refuse_unsupported(fields, "layer_types", "\"full_attention\" and \"sliding_attention\"");
    }
    if (windowed[l] && !has_window) {
      fields.refuse("layer_types",
                    "without \"sliding_attention\" where use_sliding_window is false or "
                    "sliding_window is null");
    }
  }
  return windowed;
}

void read_sliding_window(const json_fields& fields, model_config& c) {
  if (c.model_type == "llama") return;
  const bool is_mistral = c.model_type == "mistral";
  // Null means none, and a missing key 4096.
  const index_t absent = is_missing(fields, "sliding_window") ? 4096 : 0;
  index_t window = 0;
  if (is_mistral || fields.boolean_or("use_sliding_window", false)) {
    window = fields.integer_or("sliding_window", absent, 1, max_size);
  }
  if (!is_mistral) {
    c.windowed_layers = read_windowed_layers(fields, c, window > 0);
    const auto& all = c.windowed_layers;
    if (std::find(all.begin(), all.end(), true) == all.end()) window = 0;
    if (std::find(all.begin(), all.end(), false) == all.end()) c.windowed_layers.clear();
  }
  c.sliding_window = window < c.max_position_embeddings ? window : 0;
  if (c.sliding_window == 0) c.windowed_layers.clear();
}

/// A token id, a list of them, or nothing. An id outside of the vocabulary can never be drawn.
std::vector<int> read_eos_token_ids(const json_fields& fields, index_t vocab_size) {
  constexpr const char* key = "eos_token_id";
  const nlohmann::json* value = fields.find(key);
  if (value == nullptr) return {};
  const nlohmann::json list = value->is_array() ? *value : nlohmann::json::array({*value});
  std::vector<int> ids;
  for (const nlohmann::json& id : list) {
    if (!id.is_number_integer()) fields.refuse(key, "a token id, or a list of them");
    const bool in_range = id.is_number_unsigned()
                              ? id.get<std::uint64_t>() < static_cast<std::uint64_t>(vocab_size)
                              : id.get<index_t>() >= 0 && id.get<index_t>() < vocab_size;
    if (!in_range) continue;
    const int token = id.get<int>();
    if (std::find(ids.begin(), ids.end(), token) == ids.end()) ids.push_back(token);
  }
  return ids;
}

}  // namespace

model_config parse_config(const nlohmann::json& json, const std::string& where) {
  const json_fields fields(json, where);
  model_config c;
  c.source = json;
  c.model_type = read_model_type(fields);
  read_sizes(fields, c);
  c.rms_norm_eps = fields.positive_or("rms_norm_eps", c.rms_norm_eps);
  c.rope = read_rope(fields, c);
  c.tie_word_embeddings = fields.boolean_or("tie_word_embeddings", false);
  read_biases(fields, c);
  read_sliding_window(fields, c);
  c.eos_token_ids = read_eos_token_ids(fields, c.vocab_size);
  const auto eos = defaults_of(c.model_type).eos_token_id;
  if (eos && is_missing(fields, "eos_token_id") && *eos < c.vocab_size) c.eos_token_ids = {*eos};
  const std::string activation = fields.text_or("hidden_act", "silu");
  if (activation != "silu" && activation != "swish") {
    refuse_unsupported(fields, "hidden_act", "\"silu\" (or its other name \"swish\")");
  }
  if (fields.has("per_layer_config")) {
    refuse_unsupported(fields, "per_layer_config", "one shape for all layers");
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
  if (!std::filesystem::exists(generation)) return c;
  nlohmann::json json;
  try {
    json = qeft::io::load_json(generation);
  } catch (const qeft::error& e) {
    std::fprintf(stderr, "notice: going on without generation_config.json: %s\n", e.what());
    return c;
  }
  const json_fields fields(json, generation.string());
  if (fields.has("eos_token_id")) c.eos_token_ids = read_eos_token_ids(fields, c.vocab_size);
  return c;
}

}  // namespace qeft_llm
