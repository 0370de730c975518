// SPDX-License-Identifier: Apache-2.0
#include "tuned_block.hpp"

#include <algorithm>
#include <utility>

#include "elementwise.hpp"

namespace qeft_llm {

using qeft::index_t;

namespace {

// Tokens whose rotation is worth another thread.
constexpr index_t rotation_grain = 16;

std::string attention_norm_name(index_t block) {
  return "model.layers." + std::to_string(block) + ".input_layernorm.weight";
}
std::string mlp_norm_name(index_t block) {
  return "model.layers." + std::to_string(block) + ".post_attention_layernorm.weight";
}

index_t size_of(const floats& x) { return static_cast<index_t>(x.size()); }

}  // namespace

void tuned_norm::train(const std::string& name, std::vector<parameter>& to) {
  gradient.resize(value.size());
  to.push_back({name, 1, static_cast<index_t>(value.size()), value.data(), gradient.data()});
}

void tuned_block::add_parameters(index_t index, bool norms, std::vector<parameter>& to) {
  for (const linear_kind kind : all_linears) {
    (*this)[kind].add_parameters(linear_name(index, kind), to);
  }
  if (!norms) return;
  attention_norm.train(attention_norm_name(index), to);
  mlp_norm.train(mlp_norm_name(index), to);
}

tuned_block load_tuned_block(const model_config& config, const tensor_reader& read,
                             const linear_maker& make, index_t index) {
  tuned_block b;
  b.window = config.window_of(index);
  b.attention_norm.value = read.vector(attention_norm_name(index), config.hidden_size);
  b.mlp_norm.value = read.vector(mlp_norm_name(index), config.hidden_size);
  for (const linear_kind kind : all_linears) {
    const std::string name = linear_name(index, kind);
    const linear_shape s = shape_of(config, kind);
    std::vector<float> bias;
    if (has_bias(config, kind)) bias = read.vector(name + ".bias", s.out_channels);
    b.linears[static_cast<std::size_t>(kind)] =
        make(name, read.matrix(name, s.out_channels, s.in_channels), std::move(bias));
  }
  return b;
}

void block_pass::forward(float* stream, block_tape* tape) const {
  block_tape own;
  block_tape& t = tape == nullptr ? own : *tape;
  const floats inner = find_inner(stream, t, tape != nullptr);
  const floats sum = apply(linear_kind::down, inner, tape == nullptr ? nullptr : &t.saved[6]);
  std::copy(t.middle.begin(), t.middle.end(), stream);
  add(exec_, sum.data(), size_of(sum), stream);
}

block_tape block_pass::record(const float* input) const {
  block_tape tape;
  const floats inner = find_inner(input, tape, true);
  const tuned_linear& down = block_[linear_kind::down];
  floats& saved = tape.saved[6];
  saved = zeros(down.saved_channels());
  down.forward(exec_, inner.data(), tokens_, nullptr, saved.data());
  return tape;
}

floats block_pass::normed(const float* stream, const tuned_norm& norm) const {
  floats out = zeros(config_.hidden_size);
  rms_norm(exec_, stream, norm.value.data(), epsilon(), tokens_, config_.hidden_size, out.data());
  return out;
}

floats block_pass::apply(linear_kind kind, const floats& x, floats* saved) const {
  const tuned_linear& linear = block_[kind];
  floats y = zeros(linear.out_channels());
  if (saved != nullptr) *saved = zeros(linear.saved_channels());
  linear.forward(exec_, x.data(), tokens_, y.data(), saved == nullptr ? nullptr : saved->data());
  return y;
}

/// All up to down_proj's input, which is returned.
floats block_pass::find_inner(const float* input, block_tape& tape, bool saves) const {
  const auto through = [&](linear_kind kind, const floats& x) {
    return apply(kind, x, saves ? &tape.saved[static_cast<std::size_t>(kind)] : nullptr);
  };
  floats x = normed(input, block_.attention_norm);
  tape.q = through(linear_kind::q, x);
  tape.k = through(linear_kind::k, x);
  tape.v = through(linear_kind::v, x);
  floats mixed = zeros(config_.num_attention_heads * config_.head_dim);
  block_cache cache(config_.num_key_value_heads, config_.head_dim, tokens_);
  rotate_and_attend(exec_, config_, rope_, block_.window, tape.q.data(), tape.k.data(),
                    tape.v.data(), tokens_, 0, cache, mixed.data());
  const floats sum = through(linear_kind::o, mixed);
  tape.middle.assign(input, input + size_of(sum));
  add(exec_, sum.data(), size_of(sum), tape.middle.data());

  x = normed(tape.middle.data(), block_.mlp_norm);
  tape.gate = through(linear_kind::gate, x);
  tape.up = through(linear_kind::up, x);
  floats inner = tape.gate;
  swiglu(exec_, inner.data(), tape.up.data(), size_of(inner));
  return inner;
}

void block_pass::backward(const float* input, block_tape& tape, float* d_stream) const {
  mlp_back(tape, d_stream);
  attention_back(input, tape, d_stream);
}

void block_pass::apply_back(linear_kind kind, const float* dy, const block_tape& tape,
                            floats& dx) const {
  const floats& saved = tape.saved[static_cast<std::size_t>(kind)];
  block_[kind].backward(exec_, dy, saved.data(), tokens_, dx.data());
}

void block_pass::norm_back(const float* stream, tuned_norm& norm, const floats& dy,
                           float* d_stream) const {
  rms_norm_gradient(exec_, stream, norm.value.data(), epsilon(), tokens_, config_.hidden_size,
                    dy.data(), d_stream, norm.gradient.empty() ? nullptr : norm.gradient.data());
}

void block_pass::mlp_back(block_tape& tape, float* d_stream) const {
  floats d_inner = zeros(config_.intermediate_size);
  apply_back(linear_kind::down, d_stream, tape, d_inner);
  swiglu_gradient(exec_, d_inner.data(), tape.gate.data(), tape.up.data(), size_of(d_inner));
  floats d_normed = zeros(config_.hidden_size);
  apply_back(linear_kind::gate, tape.gate.data(), tape, d_normed);
  apply_back(linear_kind::up, tape.up.data(), tape, d_normed);
  norm_back(tape.middle.data(), block_.mlp_norm, d_normed, d_stream);
}

void block_pass::attention_back(const float* input, block_tape& tape, float* d_stream) const {
  const index_t dim = config_.head_dim;
  const index_t heads = config_.num_attention_heads;
  const index_t value_heads = config_.num_key_value_heads;
  floats d_mixed = zeros(heads * dim);
  apply_back(linear_kind::o, d_stream, tape, d_mixed);
  floats dq = zeros(heads * dim);
  floats dk = zeros(value_heads * dim);
  floats dv = zeros(value_heads * dim);
  causal_attention_gradient(exec_, {tokens_, heads, value_heads, dim, block_.window}, tape.q.data(),
                            tape.k.data(), tape.v.data(), d_mixed.data(), dq.data(), dk.data(),
                            dv.data());
  exec_.parallel_for(tokens_, rotation_grain, [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) {
      for (index_t h = 0; h < heads; ++h) rope_.rotate_back(dq.data() + (t * heads + h) * dim, t);
      for (index_t h = 0; h < value_heads; ++h)
        rope_.rotate_back(dk.data() + (t * value_heads + h) * dim, t);
    }
  });
  floats d_normed = zeros(config_.hidden_size);
  apply_back(linear_kind::q, dq.data(), tape, d_normed);
  apply_back(linear_kind::k, dk.data(), tape, d_normed);
  apply_back(linear_kind::v, dv.data(), tape, d_normed);
  norm_back(input, block_.attention_norm, d_normed, d_stream);
}

}  // namespace qeft_llm
