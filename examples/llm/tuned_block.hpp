// SPDX-License-Identifier: Apache-2.0
// A decoder block in training: forward with a tape, and backward.
#pragma once

#include <array>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "llama.hpp"
#include "qeft/core/host_buffer.hpp"
#include "tuned_linear.hpp"

namespace qeft_llm {

/// Where a model's numbers come from.
struct tensor_reader {
  /// By name without ".weight".
  std::function<packed_matrix(const std::string& name, qeft::index_t out_channels,
                              qeft::index_t in_channels)>
      matrix;
  /// A norm's weight or a bias.
  std::function<std::vector<float>(const std::string& name, qeft::index_t size)> vector;
};

/// The linear layers of a training method. @param name without ".weight" @param bias (OC), or empty
using linear_maker = std::function<std::unique_ptr<tuned_linear>(
    const std::string& name, const packed_matrix& weight, std::vector<float> bias)>;

/// Aligned, so that vectorised sums over it have the same order in every run.
using floats = qeft::host_buffer<float>;

/// The weight of a norm, and its gradient, which is empty unless it is trained.
struct tuned_norm {
  std::vector<float> value;
  std::vector<float> gradient;

  /// Makes it a parameter.
  void train(const std::string& name, std::vector<parameter>& to);
};

/// What backward reads of a block's forward pass, besides the block's input. (tokens, channels)
struct block_tape {
  floats q, k, v;  // q and k rotated
  floats middle;   // the stream between attention and MLP
  floats gate, up;
  std::array<floats, 7> saved;  // by linear_kind: what the linears keep
};

struct tuned_block {
  qeft::index_t window = 0;  // of attention, as in model_config::window_of
  tuned_norm attention_norm;
  tuned_norm mlp_norm;
  std::array<std::unique_ptr<tuned_linear>, 7> linears;  // by linear_kind

  /// Appends its parameters. @param index of the block
  void add_parameters(qeft::index_t index, bool norms, std::vector<parameter>& to);

  tuned_linear& operator[](linear_kind kind) const {
    return *linears[static_cast<std::size_t>(kind)];
  }
};

tuned_block load_tuned_block(const model_config& config, const tensor_reader& read,
                             const linear_maker& make, qeft::index_t index);

/// A block, and all that its passes need to know of the model. Sequences begin at position 0.
class block_pass {
 public:
  block_pass(const qeft::on_host& exec, const model_config& config, const rope_table& rope,
             tuned_block& block, qeft::index_t tokens)
      : exec_(exec), config_(config), rope_(rope), block_(block), tokens_(tokens) {}

  /// block_forward, bit for bit. @param stream (tokens, hidden_size), updated in place
  /// @param tape filled, unless null
  void forward(float* stream, block_tape* tape) const;
  /// Only what backward needs. @param input the stream before the block
  block_tape record(const float* input) const;
  /// Turns d_stream, the gradient of the block's output, into that of its input, and adds to the
  /// gradients of its parameters. @param tape spent
  void backward(const float* input, block_tape& tape, float* d_stream) const;

 private:
  floats zeros(qeft::index_t channels) const {
    return floats(static_cast<std::size_t>(tokens_ * channels));
  }
  float epsilon() const { return static_cast<float>(config_.rms_norm_eps); }
  floats normed(const float* stream, const tuned_norm& norm) const;
  floats apply(linear_kind kind, const floats& x, floats* saved) const;
  floats find_inner(const float* input, block_tape& tape, bool saves) const;
  void apply_back(linear_kind kind, const float* dy, const block_tape& tape, floats& dx) const;
  void norm_back(const float* stream, tuned_norm& norm, const floats& dy, float* d_stream) const;
  void mlp_back(block_tape& tape, float* d_stream) const;
  void attention_back(const float* input, block_tape& tape, float* d_stream) const;

  const qeft::on_host& exec_;
  const model_config& config_;
  const rope_table& rope_;
  tuned_block& block_;
  qeft::index_t tokens_;
};

}  // namespace qeft_llm
