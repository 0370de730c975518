// SPDX-License-Identifier: Apache-2.0
#include "gradient.hpp"

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <utility>

#include "elementwise.hpp"
#include "llama.hpp"

namespace qeft_llm {

using qeft::errc;
using qeft::fail;
using qeft::index_t;

namespace {

using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

// Products are cut into this many rows. A row's sums depend on the shape of its product, so that
// the shape must not depend on the number of threads.
constexpr index_t piece = 64;
constexpr index_t elementwise_grain = 16384;

/// body(first, size) for every piece of [0, count).
template <class Body>
void for_pieces(const qeft::on_host& exec, index_t count, const Body& body) {
  exec.parallel_for(count, piece, [&](index_t begin, index_t end) {
    for (index_t i = begin; i < end; i += piece) body(i, std::min(piece, end - i));
  });
}

/// The model with all its weights, and the sensitivities found so far. Activations and their
/// gradients (d_...) are (tokens, channels).
class gradient_pass {
 public:
  /// @param positions longest sample
  gradient_pass(const qeft::on_host& exec, const model_config& config, const hf_weights& weights,
                index_t positions)
      : exec_(exec), config_(config), rope_(config, positions) {
    for (const tensor_spec& spec : expected_tensors(config)) {
      const std::vector<float> values = weights.read(spec.name, spec.shape);
      const index_t rows = spec.shape.size() == 2 ? spec.shape.front() : 1;
      tensors_[spec.name] = Eigen::Map<const matrix>(values.data(), rows, spec.shape.back());
    }
    for (index_t l = 0; l < config.num_hidden_layers; ++l) {
      for (const linear_kind kind : all_linears) {
        const auto columns = static_cast<std::size_t>(shape_of(config, kind).in_channels);
        sensitivities_[linear_name(l, kind)].assign(columns, 0.0);
      }
    }
  }

  /// Adds a sample's squared gradients. @return its loss
  double add(const std::vector<int>& tokens) {
    std::vector<matrix> inputs;  // of each block: all that is kept of the forward pass
    matrix stream = embed(tokens);
    for (index_t l = 0; l < config_.num_hidden_layers; ++l) {
      inputs.push_back(stream);
      const activations a = run_block(l, inputs.back());
      stream = a.middle + apply(linear_name(l, linear_kind::down), a.inner);
      if (!stream.allFinite()) {
        fail(errc::not_finite,
             "model.layers." + std::to_string(l) +
                 ": the activations of the model are not finite behind this block");
      }
    }
    matrix d_stream = matrix::Zero(stream.rows(), stream.cols());
    const double loss = head_backward(tokens, stream, d_stream);
    for (index_t l = config_.num_hidden_layers; l-- > 0;) {
      block_backward(l, inputs.back(), d_stream);
      inputs.pop_back();
    }
    return loss;
  }

  column_sensitivities take() { return std::move(sensitivities_); }

 private:
  /// What the backward pass of a block reads.
  struct activations {
    matrix attention_in;  // after the first norm
    matrix q, k, v;       // q and k rotated
    matrix mixed;         // o_proj's input
    matrix middle;        // the stream between attention and MLP
    matrix mlp_in;        // after the second norm
    matrix gate, up;
    matrix inner;        // silu(gate) * up: down_proj's input
    index_t window = 0;  // of attention, 0 for none
  };

  const matrix& tensor(const std::string& name) const { return tensors_.at(name); }

  std::string norm_name(index_t block, const char* norm) const {
    return "model.layers." + std::to_string(block) + "." + norm + ".weight";
  }

  matrix embed(const std::vector<int>& tokens) const {
    const matrix& embedding = tensor("model.embed_tokens.weight");
    matrix stream(static_cast<index_t>(tokens.size()), config_.hidden_size);
    for (std::size_t t = 0; t < tokens.size(); ++t) {
      stream.row(static_cast<index_t>(t)) = embedding.row(tokens[t]);
    }
    return stream;
  }

  matrix norm(const std::string& name, const matrix& x) const {
    matrix y(x.rows(), x.cols());
    rms_norm(exec_, x.data(), tensor(name).data(), epsilon(), x.rows(), x.cols(), y.data());
    return y;
  }

  /// d_x += the gradient through y = norm(x).
  void norm_backward(const std::string& name, const matrix& x, const matrix& d_y,
                     matrix& d_x) const {
    const matrix& weight = tensor(name);
    for_pieces(exec_, x.rows(), [&](index_t first, index_t size) {
      for (index_t t = first; t < first + size; ++t) {
        const auto row = x.row(t);
        const auto channels = static_cast<float>(x.cols());
        const float factor = 1.0F / std::sqrt(row.squaredNorm() / channels + epsilon());
        const Eigen::RowVectorXf d_scaled = d_y.row(t).cwiseProduct(weight.row(0));
        const float along = d_scaled.dot(row) * factor * factor / channels;
        d_x.row(t) += factor * (d_scaled - along * row);
      }
    });
  }

  /// y = x W^T + bias.
  matrix apply(const std::string& name, const matrix& x) const {
    const matrix& weight = tensor(name + ".weight");
    const auto bias = tensors_.find(name + ".bias");
    matrix y(x.rows(), weight.rows());
    for_pieces(exec_, x.rows(), [&](index_t first, index_t size) {
      y.middleRows(first, size).noalias() = x.middleRows(first, size) * weight.transpose();
      if (bias != tensors_.end()) y.middleRows(first, size).rowwise() += bias->second.row(0);
    });
    return y;
  }

  /// The gradient of y = x W^T + bias: d_x += d_y W, and the squared norms of the columns of
  /// dW = d_y^T x, of which only a piece exists at a time.
  void apply_backward(const std::string& name, const matrix& x, const matrix& d_y, matrix& d_x) {
    const matrix& weight = tensor(name + ".weight");
    std::vector<double>& sensitivity = sensitivities_.at(name);
    for_pieces(exec_, x.rows(), [&](index_t first, index_t size) {
      d_x.middleRows(first, size).noalias() += d_y.middleRows(first, size) * weight;
    });
    for_pieces(exec_, x.cols(), [&](index_t first, index_t size) {
      const matrix d_weight = x.middleCols(first, size).transpose() * d_y;  // (columns, OC)
      for (index_t j = 0; j < size; ++j) {
        sensitivity[static_cast<std::size_t>(first + j)] +=
            d_weight.row(j).cast<double>().squaredNorm();
      }
    });
  }

  activations run_block(index_t l, const matrix& stream) const {
    activations a;
    a.window = config_.window_of(l);
    a.attention_in = norm(norm_name(l, "input_layernorm"), stream);
    a.q = apply(linear_name(l, linear_kind::q), a.attention_in);
    a.k = apply(linear_name(l, linear_kind::k), a.attention_in);
    a.v = apply(linear_name(l, linear_kind::v), a.attention_in);
    for_each_head(a.q, [&](float* head, index_t t) { rope_.rotate(head, t); });
    for_each_head(a.k, [&](float* head, index_t t) { rope_.rotate(head, t); });
    a.mixed = attention(a);
    a.middle = stream + apply(linear_name(l, linear_kind::o), a.mixed);
    a.mlp_in = norm(norm_name(l, "post_attention_layernorm"), a.middle);
    a.gate = apply(linear_name(l, linear_kind::gate), a.mlp_in);
    a.up = apply(linear_name(l, linear_kind::up), a.mlp_in);
    a.inner = a.gate;
    swiglu(exec_, a.inner.data(), a.up.data(), a.inner.size());
    return a;
  }

  /// Turns d_stream, the gradient of block l's output, into that of its input.
  void block_backward(index_t l, const matrix& stream, matrix& d_stream) {
    const auto name = [l](linear_kind kind) { return linear_name(l, kind); };
    activations a = run_block(l, stream);

    matrix d_inner = matrix::Zero(a.inner.rows(), a.inner.cols());
    apply_backward(name(linear_kind::down), a.inner, d_stream, d_inner);
    swiglu_backward(d_inner, a.gate, a.up);
    matrix d_normed = matrix::Zero(stream.rows(), stream.cols());
    apply_backward(name(linear_kind::gate), a.mlp_in, a.gate, d_normed);
    apply_backward(name(linear_kind::up), a.mlp_in, a.up, d_normed);
    norm_backward(norm_name(l, "post_attention_layernorm"), a.middle, d_normed, d_stream);

    matrix d_mixed = matrix::Zero(a.mixed.rows(), a.mixed.cols());
    apply_backward(name(linear_kind::o), a.mixed, d_stream, d_mixed);
    matrix d_q = matrix::Zero(a.q.rows(), a.q.cols());
    matrix d_k = matrix::Zero(a.k.rows(), a.k.cols());
    matrix d_v = matrix::Zero(a.v.rows(), a.v.cols());
    attention_backward(a, d_mixed, d_q, d_k, d_v);
    for_each_head(d_q, [&](float* head, index_t t) { rotate_back(head, t); });
    for_each_head(d_k, [&](float* head, index_t t) { rotate_back(head, t); });
    d_normed.setZero();
    apply_backward(name(linear_kind::q), a.attention_in, d_q, d_normed);
    apply_backward(name(linear_kind::k), a.attention_in, d_k, d_normed);
    apply_backward(name(linear_kind::v), a.attention_in, d_v, d_normed);
    norm_backward(norm_name(l, "input_layernorm"), stream, d_normed, d_stream);
  }

  /// Replaces gate and up by their gradients.
  void swiglu_backward(const matrix& d_inner, matrix& gate, matrix& up) const {
    exec_.parallel_for(gate.size(), elementwise_grain, [&](index_t begin, index_t end) {
      for (index_t i = begin; i < end; ++i) {
        float& g = gate.data()[i];
        float& u = up.data()[i];
        const float d = d_inner.data()[i];
        const float sigmoid = 1.0F / (1.0F + exp_clamped(-g));
        const float d_silu = sigmoid * (1.0F + g * (1.0F - sigmoid));
        const float silu = g * sigmoid;
        g = d * u * d_silu;
        u = d * silu;
      }
    });
  }

  /// body(head, position) for every head of every token of q, k or their gradients.
  template <class Body>
  void for_each_head(matrix& x, const Body& body) const {
    for_pieces(exec_, x.rows(), [&](index_t first, index_t size) {
      for (index_t t = first; t < first + size; ++t) {
        for (index_t c = 0; c < x.cols(); c += config_.head_dim) body(&x(t, c), t);
      }
    });
  }

  /// The transposed rotation. With the halves of the head exchanged, it is the rotation itself.
  void rotate_back(float* head, index_t position) const {
    const index_t half = config_.head_dim / 2;
    std::swap_ranges(head, head + half, head + half);
    rope_.rotate(head, position);
    std::swap_ranges(head, head + half, head + half);
  }

  index_t heads_per_group() const {
    return config_.num_attention_heads / config_.num_key_value_heads;
  }
  float attention_scale() const { return 1.0F / std::sqrt(static_cast<float>(config_.head_dim)); }
  float epsilon() const { return static_cast<float>(config_.rms_norm_eps); }

  /// Channels of one head of q, k, v or their gradients.
  template <class Matrix>
  auto head_of(Matrix& x, index_t head) const {
    return x.middleCols(head * config_.head_dim, config_.head_dim);
  }

  /// Attention weights of a query head: (tokens, tokens), lower triangular.
  matrix attention_weights(const activations& a, index_t head) const {
    matrix p = head_of(a.q, head) * head_of(a.k, head / heads_per_group()).transpose();
    p *= attention_scale();
    for (index_t t = 0; t < p.rows(); ++t) {
      const index_t hidden = a.window > 0 ? std::max<index_t>(0, t + 1 - a.window) : 0;
      p.row(t).head(hidden).setZero();
      softmax(&p(t, hidden), t + 1 - hidden);
      p.row(t).tail(p.cols() - t - 1).setZero();
    }
    return p;
  }

  matrix attention(const activations& a) const {
    matrix mixed(a.q.rows(), a.q.cols());
    exec_.parallel_for(config_.num_attention_heads, 1, [&](index_t begin, index_t end) {
      for (index_t h = begin; h < end; ++h) {
        head_of(mixed, h).noalias() = attention_weights(a, h) * head_of(a.v, h / heads_per_group());
      }
    });
    return mixed;
  }

  /// Adds to d_q, d_k and d_v; the weights of each head are computed again. All query heads that
  /// share keys and values are one task.
  void attention_backward(const activations& a, const matrix& d_mixed, matrix& d_q, matrix& d_k,
                          matrix& d_v) const {
    exec_.parallel_for(config_.num_key_value_heads, 1, [&](index_t begin, index_t end) {
      for (index_t h = begin * heads_per_group(); h < end * heads_per_group(); ++h) {
        const index_t group = h / heads_per_group();
        const matrix p = attention_weights(a, h);
        head_of(d_v, group).noalias() += p.transpose() * head_of(d_mixed, h);
        // Through the softmax: d_s = p * (d_p - sum over keys of p * d_p).
        matrix d_s = head_of(d_mixed, h) * head_of(a.v, group).transpose();
        const Eigen::VectorXf mean = p.cwiseProduct(d_s).rowwise().sum();
        d_s.colwise() -= mean;
        d_s = d_s.cwiseProduct(p) * attention_scale();
        head_of(d_q, h).noalias() += d_s * head_of(a.k, group);
        head_of(d_k, group).noalias() += d_s.transpose() * head_of(a.q, h);
      }
    });
  }

  /// Final norm, head and loss. Each thread holds the logits of one piece of the tokens at a time.
  /// @return the mean loss of predicting each token but the first; adds to d_stream
  double head_backward(const std::vector<int>& tokens, const matrix& stream,
                       matrix& d_stream) const {
    const matrix normed = norm("model.norm.weight", stream);
    const matrix& head =
        tensor(config_.tie_word_embeddings ? "model.embed_tokens.weight" : "lm_head.weight");
    const index_t predictions = normed.rows() - 1;
    Eigen::VectorXd losses(predictions);
    matrix d_normed = matrix::Zero(normed.rows(), normed.cols());
    for_pieces(exec_, predictions, [&](index_t first, index_t size) {
      matrix logits = normed.middleRows(first, size) * head.transpose();
      for (index_t i = 0; i < size; ++i) {
        softmax(&logits(i, 0), logits.cols());
        float& target = logits(i, tokens[static_cast<std::size_t>(first + i + 1)]);
        losses(first + i) = -std::log(static_cast<double>(target));
        target -= 1.0F;
      }
      logits /= static_cast<float>(predictions);
      d_normed.middleRows(first, size).noalias() = logits * head;
    });
    norm_backward("model.norm.weight", stream, d_normed, d_stream);
    return losses.mean();
  }

  qeft::on_host exec_;
  const model_config& config_;
  rope_table rope_;
  std::map<std::string, matrix> tensors_;
  column_sensitivities sensitivities_;
};

void check_window(const model_config& config, const std::vector<int>& window, index_t sample) {
  const std::string where = "gradient_sensitivity: sample " + std::to_string(sample);
  const auto size = static_cast<index_t>(window.size());
  if (size < 2 || size > config.max_position_embeddings) {
    fail(errc::invalid_argument, where + " has " + std::to_string(size) +
                                     " tokens, but must have between 2 and " +
                                     std::to_string(config.max_position_embeddings));
  }
  for (const int token : window) {
    if (token < 0 || token >= config.vocab_size) {
      fail(errc::invalid_argument, where + " holds token " + std::to_string(token) +
                                       ", but the vocabulary has " +
                                       std::to_string(config.vocab_size));
    }
  }
}

}  // namespace

column_sensitivities gradient_sensitivity(const qeft::on_host& exec, const model_config& config,
                                          const hf_weights& weights,
                                          const std::vector<std::vector<int>>& windows,
                                          const gradient_progress& progress) {
  index_t sample = 0;
  index_t longest = 0;
  for (const std::vector<int>& window : windows) {
    check_window(config, window, sample++);
    longest = std::max(longest, static_cast<index_t>(window.size()));
  }
  gradient_pass pass(exec, config, weights, longest);
  sample = 0;
  for (const std::vector<int>& window : windows) {
    const double loss = pass.add(window);
    if (!std::isfinite(loss)) {
      fail(errc::not_finite, "gradient_sensitivity: the loss of sample " + std::to_string(sample) +
                                 " is " + std::to_string(loss) +
                                 ", although no block's output is infinite or NaN");
    }
    if (progress) progress(sample, loss);
    ++sample;
  }
  return pass.take();
}

}  // namespace qeft_llm
