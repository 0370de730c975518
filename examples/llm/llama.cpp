// SPDX-License-Identifier: Apache-2.0
#include "llama.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <set>
#include <string>
#include <utility>

#include "elementwise.hpp"
#include "qeft/io/checkpoint.hpp"
#include "qeft/io/convert.hpp"

namespace qeft_llm {

using qeft::errc;
using qeft::fail;
using qeft::index_t;

namespace {

// Tokens whose rotation is worth another thread.
constexpr index_t rotation_grain = 16;

/// Room for the activations of one call, not initialised.
std::unique_ptr<float[]> room(index_t count) {
  return std::unique_ptr<float[]>(new float[static_cast<std::size_t>(count)]);
}

const char* suffix_of(linear_kind kind) {
  switch (kind) {
    case linear_kind::q:
      return "self_attn.q_proj";
    case linear_kind::k:
      return "self_attn.k_proj";
    case linear_kind::v:
      return "self_attn.v_proj";
    case linear_kind::o:
      return "self_attn.o_proj";
    case linear_kind::gate:
      return "mlp.gate_proj";
    case linear_kind::up:
      return "mlp.up_proj";
    case linear_kind::down:
      break;
  }
  return "mlp.down_proj";
}

}  // namespace

bool has_bias(const model_config& config, linear_kind kind) {
  if (kind <= linear_kind::v) return config.qkv_bias;
  return kind == linear_kind::o ? config.o_bias : config.mlp_bias;
}

model_source::model_source(const std::filesystem::path& directory)
    : config_(read_config(directory)), weights_(directory) {
  settle_head();
  check_quantised_layers();
}

/// Layers that config.json describes and the model lacks would be left out without a word.
void model_source::check_quantised_layers() const {
  if (!config_.quantization) return;
  std::set<std::string> known;
  for (index_t l = 0; l < config_.num_hidden_layers; ++l) {
    for (const linear_kind kind : all_linears) known.insert(linear_name(l, kind));
  }
  for (const auto& [name, unused] : config_.quantization->layers) {
    if (known.count(name) != 0) continue;
    fail(errc::corrupt_file, weights_.reader().where() + ": quantization_config lists the layer " +
                                 name + ", which a model of num_hidden_layers = " +
                                 std::to_string(config_.num_hidden_layers) + " does not have");
  }
}

void model_source::settle_head() {
  const std::string embedding = "model.embed_tokens.weight";
  const std::string head = "lm_head.weight";
  if (!config_.tie_word_embeddings || !weights_.contains(head)) return;
  if (!weights_.contains(embedding)) {
    weights_.read_instead(embedding, head);
  } else if (!weights_.equal(embedding, head)) {
    std::fprintf(stderr,
                 "notice: config.json says tie_word_embeddings, but lm_head.weight and "
                 "model.embed_tokens.weight differ: the head is lm_head.weight, as if "
                 "tie_word_embeddings were false\n");
    config_.tie_word_embeddings = false;
    config_.source["tie_word_embeddings"] = false;  // so that a quantised copy keeps it
  }
}

packed_matrix model_source::matrix(const std::string& name, index_t out_channels,
                                   index_t in_channels) const {
  const qeft::matrix_descriptor* d =
      config_.quantization ? config_.quantization->find(name) : nullptr;
  if (d == nullptr) {
    const std::string tensor = name + ".weight";
    const qeft::io::tensor_view& t = weights_.view(tensor, {out_channels, in_channels});
    packed_matrix m = full_precision(tensor, t, out_channels, in_channels, &rounding_);
    qeft::io::forget_pages(t.data);
    return m;
  }
  if (d->out_channels != out_channels || d->in_channels != in_channels) {
    fail(errc::corrupt_file, "quantised layer " + name + " is " + std::to_string(d->out_channels) +
                                 " x " + std::to_string(d->in_channels) + ", but the model needs " +
                                 std::to_string(out_channels) + " x " +
                                 std::to_string(in_channels));
  }
  return qeft::io::read_linear(weights_.reader(), name, *d).matrix;
}

std::vector<float> model_source::vector(const std::string& name, index_t size) const {
  return weights_.read(name, {size});
}

void model_source::report_rounding() const {
  if (rounding_.tensors == 0 || rounding_.reported) return;
  rounding_.reported = true;
  std::fprintf(
      stderr,
      "notice: %lld tensors were rounded to 16 bits, FP16 or BF16 by which loses less; the "
      "worst, %s, by %.2g of the norm of a row or column\n",
      static_cast<long long>(rounding_.tensors), rounding_.worst.c_str(), rounding_.error);
}

rope_table::rope_table(const model_config& config, index_t positions) : half_(config.head_dim / 2) {
  const rope_config& rope = config.rope;
  const double pi = std::acos(-1.0);
  std::vector<double> frequency(static_cast<std::size_t>(half_));
  for (index_t i = 0; i < half_; ++i) {
    double f =
        std::pow(rope.theta, -2.0 * static_cast<double>(i) / static_cast<double>(config.head_dim));
    if (rope.scaling == rope_scaling::linear) f /= rope.factor;
    if (rope.scaling == rope_scaling::llama3) {
      // Llama 3.1: a ramp, in turns per original context, between scaled and unscaled frequencies.
      const double turns =
          static_cast<double>(rope.original_max_position_embeddings) * f / (2 * pi);
      const double ramp = std::clamp(
          (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0.0,
          1.0);
      f = (1 - ramp) * f / rope.factor + ramp * f;
    }
    frequency[static_cast<std::size_t>(i)] = f;
  }
  cos_.resize(static_cast<std::size_t>(positions * half_));
  sin_.resize(cos_.size());
  for (index_t p = 0; p < positions; ++p) {
    for (index_t i = 0; i < half_; ++i) {
      const double angle = static_cast<double>(p) * frequency[static_cast<std::size_t>(i)];
      cos_[static_cast<std::size_t>(p * half_ + i)] = static_cast<float>(std::cos(angle));
      sin_[static_cast<std::size_t>(p * half_ + i)] = static_cast<float>(std::sin(angle));
    }
  }
}

void rope_table::rotate(float* head, index_t position) const noexcept {
  const float* c = cos_.data() + position * half_;
  const float* s = sin_.data() + position * half_;
  for (index_t i = 0; i < half_; ++i) {
    const float a = head[i];
    const float b = head[i + half_];
    head[i] = a * c[i] - b * s[i];
    head[i + half_] = b * c[i] + a * s[i];
  }
}

void rope_table::rotate_back(float* head, index_t position) const noexcept {
  const float* c = cos_.data() + position * half_;
  const float* s = sin_.data() + position * half_;
  for (index_t i = 0; i < half_; ++i) {
    const float a = head[i];
    const float b = head[i + half_];
    head[i] = a * c[i] + b * s[i];
    head[i + half_] = b * c[i] - a * s[i];
  }
}

std::string linear_name(index_t block, linear_kind kind) {
  return "model.layers." + std::to_string(block) + "." + suffix_of(kind);
}

linear& linear_of(block& b, linear_kind kind) {
  switch (kind) {
    case linear_kind::q:
      return b.q;
    case linear_kind::k:
      return b.k;
    case linear_kind::v:
      return b.v;
    case linear_kind::o:
      return b.o;
    case linear_kind::gate:
      return b.gate;
    case linear_kind::up:
      return b.up;
    case linear_kind::down:
      break;
  }
  return b.down;
}

linear_shape shape_of(const model_config& config, linear_kind kind) {
  const index_t attention = config.num_attention_heads * config.head_dim;
  const index_t value = config.num_key_value_heads * config.head_dim;
  switch (kind) {
    case linear_kind::q:
      return {attention, config.hidden_size};
    case linear_kind::k:
    case linear_kind::v:
      return {value, config.hidden_size};
    case linear_kind::o:
      return {config.hidden_size, attention};
    case linear_kind::gate:
    case linear_kind::up:
      return {config.intermediate_size, config.hidden_size};
    case linear_kind::down:
      break;
  }
  return {config.hidden_size, config.intermediate_size};
}

block load_block(const qeft::on_host& exec, const model_source& source, index_t index) {
  const model_config& config = source.config();
  const std::string prefix = "model.layers." + std::to_string(index) + ".";
  block b;
  b.window = config.window_of(index);
  b.attention_norm = source.vector(prefix + "input_layernorm.weight", config.hidden_size);
  b.mlp_norm = source.vector(prefix + "post_attention_layernorm.weight", config.hidden_size);
  for (const linear_kind kind : all_linears) {
    const std::string name = linear_name(index, kind);
    const linear_shape s = shape_of(config, kind);
    linear_of(b, kind) =
        linear(exec, source.matrix(name, s.out_channels, s.in_channels),
               has_bias(config, kind) ? source.vector(name + ".bias", s.out_channels)
                                      : std::vector<float>{});
  }
  return b;
}

void attend(const qeft::on_host& exec, const model_config& config, const rope_table& rope,
            const block& b, const float* x, index_t tokens, index_t first, block_cache& cache,
            float* out) {
  const auto q = room(tokens * b.q.out_channels());
  const auto k = room(tokens * b.k.out_channels());
  const auto v = room(tokens * b.v.out_channels());
  b.q.forward(exec, x, tokens, q.get());
  b.k.forward(exec, x, tokens, k.get());
  b.v.forward(exec, x, tokens, v.get());
  rotate_and_attend(exec, config, rope, b.window, q.get(), k.get(), v.get(), tokens, first, cache,
                    out);
}

void rotate_and_attend(const qeft::on_host& exec, const model_config& config,
                       const rope_table& rope, index_t window, float* q, float* k, const float* v,
                       index_t tokens, index_t first, block_cache& cache, float* out) {
  const index_t heads = config.num_attention_heads;
  const index_t dim = config.head_dim;
  const index_t value_heads = config.num_key_value_heads;
  exec.parallel_for(tokens, rotation_grain, [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) {
      float* keys = k + t * value_heads * dim;
      for (index_t h = 0; h < heads; ++h) rope.rotate(q + (t * heads + h) * dim, first + t);
      for (index_t h = 0; h < value_heads; ++h) rope.rotate(keys + h * dim, first + t);
      cache.store(first + t, keys, v + t * value_heads * dim);
    }
  });
  causal_attention(exec, cache, heads, q, tokens, first, window, out);
}

void mlp_inner(const qeft::on_host& exec, const block& b, const float* x, index_t tokens,
               float* out) {
  const index_t size = tokens * b.up.out_channels();
  const auto up = room(size);
  b.gate.forward(exec, x, tokens, out);
  b.up.forward(exec, x, tokens, up.get());
  swiglu(exec, out, up.get(), size);
}

void block_forward(const qeft::on_host& exec, const model_config& config, const rope_table& rope,
                   const block& b, index_t tokens, index_t first, block_cache& cache, float* stream,
                   const activation_tap& tap) {
  const auto see = [&](linear_kind kind, const float* x) {
    if (tap) tap(kind, x, tokens);
  };
  const index_t size = tokens * config.hidden_size;
  const auto epsilon = static_cast<float>(config.rms_norm_eps);
  const auto x = room(size);
  const auto sum = room(size);

  rms_norm(exec, stream, b.attention_norm.data(), epsilon, tokens, config.hidden_size, x.get());
  see(linear_kind::q, x.get());
  see(linear_kind::k, x.get());
  see(linear_kind::v, x.get());
  {
    const auto mixed = room(tokens * config.num_attention_heads * config.head_dim);
    attend(exec, config, rope, b, x.get(), tokens, first, cache, mixed.get());
    see(linear_kind::o, mixed.get());
    b.o.forward(exec, mixed.get(), tokens, sum.get());
  }
  add(exec, sum.get(), size, stream);

  rms_norm(exec, stream, b.mlp_norm.data(), epsilon, tokens, config.hidden_size, x.get());
  see(linear_kind::gate, x.get());
  see(linear_kind::up, x.get());
  const auto inner = room(tokens * config.intermediate_size);
  mlp_inner(exec, b, x.get(), tokens, inner.get());
  see(linear_kind::down, inner.get());
  b.down.forward(exec, inner.get(), tokens, sum.get());
  add(exec, sum.get(), size, stream);
}

llama_model::llama_model(const qeft::on_host& exec, const model_source& source,
                         activation_type activations)
    : exec_(exec), config_(source.config()) {
  source.weights().require(expected_tensors(config_));
  embedding_ =
      linear(exec, source.matrix("model.embed_tokens", config_.vocab_size, config_.hidden_size));
  for (index_t l = 0; l < config_.num_hidden_layers; ++l) {
    blocks_.push_back(load_block(exec, source, l));
    for (const linear_kind kind : all_linears) {
      linear_of(blocks_.back(), kind).set_activations(activations);
    }
  }
  norm_ = source.vector("model.norm.weight", config_.hidden_size);
  if (!config_.tie_word_embeddings) {
    head_ = linear(exec, source.matrix("lm_head", config_.vocab_size, config_.hidden_size));
  }
  source.report_rounding();
}

void llama_model::reset(index_t capacity) {
  if (capacity < 1 || capacity > config_.max_position_embeddings) {
    fail(errc::invalid_argument, "llama_model: a sequence of " + std::to_string(capacity) +
                                     " tokens was asked for, but the model's "
                                     "max_position_embeddings is " +
                                     std::to_string(config_.max_position_embeddings));
  }
  position_ = 0;
  damaged_by_ = -1;
  if (capacity == capacity_) return;
  capacity_ = capacity;
  rope_ = rope_table(config_, capacity);
  caches_.clear();
  for (std::size_t l = 0; l < blocks_.size(); ++l) {
    caches_.emplace_back(config_.num_key_value_heads, config_.head_dim, capacity);
  }
}

const std::vector<float>& llama_model::forward(const std::vector<int>& tokens,
                                               const activation_tap& tap) {
  const auto count = static_cast<index_t>(tokens.size());
  if (position_ + count > capacity_) {
    fail(errc::invalid_argument, "llama_model: the sequence grows to " +
                                     std::to_string(position_ + count) +
                                     " tokens, but there is room for " + std::to_string(capacity_));
  }
  stream_.resize(static_cast<std::size_t>(count * config_.hidden_size));
  for (index_t t = 0; t < count; ++t) {
    embedding_.read_row(tokens[static_cast<std::size_t>(t)],
                        stream_.data() + t * config_.hidden_size);
  }
  for (std::size_t l = 0; l < blocks_.size(); ++l) {
    block_forward(exec_, config_, rope_, blocks_[l], count, position_, caches_[l], stream_.data(),
                  tap);
    const qeft::span<const float> stream(stream_.data(), static_cast<index_t>(stream_.size()));
    if (damaged_by_ < 0 && qeft::io::find_not_finite(stream) >= 0) {
      damaged_by_ = static_cast<index_t>(l);
    }
  }
  rms_norm(exec_, stream_.data(), norm_.data(), static_cast<float>(config_.rms_norm_eps), count,
           config_.hidden_size, stream_.data());
  position_ += count;
  return stream_;
}

void llama_model::logits(const float* normed, index_t rows, float* logits) const {
  head().forward(exec_, normed, rows, logits);
  if (qeft::io::find_not_finite({logits, rows * config_.vocab_size}) < 0) return;
  std::string message = "the model's logits are not finite";
  if (damaged_by_ >= 0) {
    message += ", nor are its activations behind model.layers." + std::to_string(damaged_by_);
  }
  fail(errc::not_finite, message);
}

}  // namespace qeft_llm
