// SPDX-License-Identifier: Apache-2.0
// Small random models to train, and samples to train them with.
#pragma once

#include <algorithm>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "checkpoint_model.hpp"
#include "tuned_model.hpp"

namespace qeft_test {

/// Weights of usual size, so that no softmax has a single large term.
inline plain_layer usual_layer(const qeft::matrix_descriptor& d, random_source& random) {
  plain_layer layer = random_layer(d, random);
  const auto scale = [&](std::uint16_t bits, float by) {
    return d.scalar == qeft::scalar_kind::half
               ? qeft::from_float<qeft::half_bits>(by * qeft::to_float(qeft::half_bits{bits})).bits
               : qeft::from_float<qeft::bf16_bits>(by * qeft::to_float(qeft::bf16_bits{bits})).bits;
  };
  const float by = std::ldexp(1.0F, 4 - d.bits);
  for (auto& s : layer.scales) s = scale(s, by);
  if (d.zero == qeft::zero_kind::scaled) {
    for (auto& z : layer.zeros) z = scale(static_cast<std::uint16_t>(z), 0.25F);
  }
  for (auto& w : layer.weak) w = scale(w, 0.0625F);
  return layer;
}

/// Two blocks of which all linears are quantised alike; k of a linear is at most its IC.
struct tuned_case {
  const char* name;
  nlohmann::json changes;
  qeft::matrix_descriptor d;
  std::size_t tokens = 20;

  checkpoint_model write(std::uint64_t seed) const {
    nlohmann::json source = {{"hidden_size", 64},      {"intermediate_size", 96},
                             {"num_hidden_layers", 2}, {"num_attention_heads", 4},
                             {"head_dim", 16},         {"vocab_size", 37}};
    source.update(changes);
    source = tiny_config(source);
    const qeft_llm::model_config config = qeft_llm::parse_config(source, name);
    std::map<std::string, qeft::matrix_descriptor> layers;
    for (qeft::index_t l = 0; l < config.num_hidden_layers; ++l) {
      for (const qeft_llm::linear_kind kind : qeft_llm::all_linears) {
        qeft::matrix_descriptor& of = layers[qeft_llm::linear_name(l, kind)] = d;
        of.weak_columns = std::min(d.weak_columns, qeft_llm::shape_of(config, kind).in_channels);
      }
    }
    return checkpoint_model(source, seed, layers, usual_layer);
  }
};

inline qeft::matrix_descriptor format(int bits, qeft::weak_kind weak, qeft::index_t k,
                                      qeft::index_t heads = 1) {
  qeft::matrix_descriptor d;
  d.bits = bits;
  d.group_size = 32;
  d.zero = qeft::zero_kind::integer;
  d.weak = weak;
  d.weak_columns = k;
  d.heads = heads;
  return d;
}

inline qeft_llm::training_sample sample_of(std::vector<int> tokens) {
  std::vector<char> counted(tokens.size(), 1);
  counted[0] = 0;
  return {std::move(tokens), std::move(counted)};
}

/// Every third token counts, and the last.
inline qeft_llm::training_sample masked_sample(std::vector<int> tokens) {
  qeft_llm::training_sample s{std::move(tokens), {}};
  s.counted.resize(s.tokens.size());
  for (std::size_t t = 2; t < s.counted.size(); t += 3) s.counted[t] = 1;
  s.counted.back() = 1;
  return s;
}

}  // namespace qeft_test
