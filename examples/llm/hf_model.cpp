// SPDX-License-Identifier: Apache-2.0
#include "hf_model.hpp"

#include <algorithm>

namespace qeft_llm {

using qeft::errc;
using qeft::fail;
using qeft::index_t;
using qeft::io::dtype;
using qeft::io::tensor_view;
using qeft::io::to_string;

namespace {

bool is_floating(dtype type) {
  return type == dtype::f16 || type == dtype::bf16 || type == dtype::f32 || type == dtype::f64;
}

/// What is wrong with a tensor, or nothing.
std::string complaint(const tensor_view& t, const std::vector<index_t>& shape) {
  if (t.shape != shape) {
    return "has shape " + to_string(t.shape) + ", but must have " + to_string(shape);
  }
  if (!is_floating(t.type)) {
    return std::string("is ") + to_string(t.type) + ", but must be F16, BF16, F32 or F64";
  }
  return {};
}

}  // namespace

std::vector<tensor_spec> expected_tensors(const model_config& c) {
  const index_t query = c.num_attention_heads * c.head_dim;
  const index_t key_value = c.num_key_value_heads * c.head_dim;
  std::vector<tensor_spec> all;
  const auto linear = [&](const std::string& name, index_t out, index_t in, bool bias) {
    const bool quantized = c.quantization && c.quantization->find(name) != nullptr;
    if (!quantized) all.push_back({name + ".weight", {out, in}});
    if (bias) all.push_back({name + ".bias", {out}});
  };
  all.push_back({"model.embed_tokens.weight", {c.vocab_size, c.hidden_size}});
  for (index_t l = 0; l < c.num_hidden_layers; ++l) {
    const std::string block = "model.layers." + std::to_string(l) + ".";
    all.push_back({block + "input_layernorm.weight", {c.hidden_size}});
    linear(block + "self_attn.q_proj", query, c.hidden_size, c.qkv_bias);
    linear(block + "self_attn.k_proj", key_value, c.hidden_size, c.qkv_bias);
    linear(block + "self_attn.v_proj", key_value, c.hidden_size, c.qkv_bias);
    linear(block + "self_attn.o_proj", c.hidden_size, query, c.o_bias);
    all.push_back({block + "post_attention_layernorm.weight", {c.hidden_size}});
    linear(block + "mlp.gate_proj", c.intermediate_size, c.hidden_size, c.mlp_bias);
    linear(block + "mlp.up_proj", c.intermediate_size, c.hidden_size, c.mlp_bias);
    linear(block + "mlp.down_proj", c.hidden_size, c.intermediate_size, c.mlp_bias);
  }
  all.push_back({"model.norm.weight", {c.hidden_size}});
  if (!c.tie_word_embeddings) all.push_back({"lm_head.weight", {c.vocab_size, c.hidden_size}});
  return all;
}

hf_weights::hf_weights(const std::filesystem::path& directory) : reader_(directory) {
  reader_.verify_checksum();
  // A model that was saved without its head has no "model." in its names.
  if (!reader_.contains("embed_tokens.weight")) return;
  for (const std::string& name : reader_.names()) {
    const std::string full = "model." + name;
    if (!reader_.contains(full)) read_instead(full, name);
  }
}

void hf_weights::require(const std::vector<tensor_spec>& expected) const {
  constexpr int listed = 20;
  int bad = 0;
  std::string list;
  for (const tensor_spec& spec : expected) {
    const std::string what = contains(spec.name)
                                 ? complaint(reader_.at(stored_name(spec.name)), spec.shape)
                                 : reader_.absence(stored_name(spec.name));
    if (what.empty()) continue;
    if (++bad <= listed) list += "\n  " + spec.name + " " + what;
  }
  if (bad == 0) return;
  if (bad > listed) list += "\n  and " + std::to_string(bad - listed) + " more";
  fail(errc::corrupt_file, reader_.where() + ": " + std::to_string(bad) +
                               " tensors are not as config.json says:" + list);
}

const tensor_view& hf_weights::view(const std::string& name,
                                    const std::vector<index_t>& shape) const {
  const tensor_view& t = reader_.at(stored_name(name));
  const std::string what = complaint(t, shape);
  if (!what.empty()) {
    fail(errc::corrupt_file, reader_.where() + ": tensor '" + name + "' " + what);
  }
  return t;
}

bool hf_weights::equal(const std::string& a, const std::string& b) const {
  const tensor_view& x = reader_.at(stored_name(a));
  const tensor_view& y = reader_.at(stored_name(b));
  if (x.shape != y.shape) return false;
  if (x.type == y.type) return std::equal(x.data.begin(), x.data.end(), y.data.begin());
  return is_floating(x.type) && is_floating(y.type) &&
         qeft::io::to_floats(x) == qeft::io::to_floats(y);
}

std::vector<float> hf_weights::read(const std::string& name,
                                    const std::vector<index_t>& shape) const {
  const tensor_view& t = view(name, shape);
  std::vector<float> values = qeft::io::to_floats(t);
  qeft::io::forget_pages(t.data);
  qeft::io::require_finite(values, name);
  return values;
}

}  // namespace qeft_llm
