// SPDX-License-Identifier: Apache-2.0
// Decoder of the Llama family in FP32 activations, cut into the phases that calibration needs.
#pragma once

#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "attention.hpp"
#include "config.hpp"
#include "hf_model.hpp"
#include "linear.hpp"
#include "qeft/core/on_host.hpp"

namespace qeft_llm {

/// Reads the tensors of a model directory, full-precision or a QEFT checkpoint. What config.json
/// and the tensors disagree about is settled as `transformers` 5 does, with a notice on stderr:
/// - tied in config.json, but another lm_head in the files: that head counts, and config() says so;
/// - tied, and lm_head is the only one of the two in the files: it is the embedding too.
class model_source {
 public:
  explicit model_source(const std::filesystem::path& directory);

  const model_config& config() const noexcept { return config_; }
  const hf_weights& weights() const noexcept { return weights_; }

  /// @param name without ".weight"; quantised where the checkpoint says so, else all columns weak.
  /// What 16 bits do not hold is counted for report_rounding.
  packed_matrix matrix(const std::string& name, qeft::index_t out_channels,
                       qeft::index_t in_channels) const;
  /// A norm's weight or a bias.
  std::vector<float> vector(const std::string& name, qeft::index_t size) const;

  /// Says on stderr, once, how many of the tensors read so far were rounded to 16 bits, and the
  /// largest error.
  void report_rounding() const;

 private:
  void settle_head();
  void check_quantised_layers() const;

  model_config config_;
  hf_weights weights_;
  mutable rounding_summary rounding_;
};

/// cos and sin of (position, pair) for the first positions; pairs are (i, i + head_dim / 2).
class rope_table {
 public:
  rope_table() = default;
  rope_table(const model_config& config, qeft::index_t positions);
  /// Rotates one head, (head_dim), in place. @pre 0 <= position < positions
  void rotate(float* head, qeft::index_t position) const noexcept;
  /// The other way round, which is also the gradient of rotate.
  void rotate_back(float* head, qeft::index_t position) const noexcept;

 private:
  qeft::index_t half_ = 0;
  std::vector<float> cos_;  // (positions, head_dim / 2)
  std::vector<float> sin_;
};

/// One decoder block.
struct block {
  qeft::index_t window = 0;  // of attention, as in model_config::window_of
  std::vector<float> attention_norm;
  linear q, k, v, o;
  std::vector<float> mlp_norm;
  linear gate, up, down;
};

/// The linears of a block in the order of the computation, and their names without ".weight".
enum class linear_kind { q, k, v, o, gate, up, down };
inline constexpr linear_kind all_linears[] = {linear_kind::q,   linear_kind::k,    linear_kind::v,
                                              linear_kind::o,   linear_kind::gate, linear_kind::up,
                                              linear_kind::down};
std::string linear_name(qeft::index_t block, linear_kind kind);
linear& linear_of(block& b, linear_kind kind);

/// Rows and columns of a linear.
struct linear_shape {
  qeft::index_t out_channels;
  qeft::index_t in_channels;
};
linear_shape shape_of(const model_config& config, linear_kind kind);
bool has_bias(const model_config& config, linear_kind kind);

/// Sees the input of every linear: x is (tokens, IC).
using activation_tap = std::function<void(linear_kind kind, const float* x, qeft::index_t tokens)>;

block load_block(const qeft::on_host& exec, const model_source& source, qeft::index_t index);

/// The phases of a block. x and out are (tokens, channels).
///
/// q, k, v and attention over the tokens at positions [first, first + tokens) and all before them
/// in the cache: x is the normed stream, out (tokens, heads * head_dim) is o_proj's input.
void attend(const qeft::on_host& exec, const model_config& config, const rope_table& rope,
            const block& b, const float* x, qeft::index_t tokens, qeft::index_t first,
            block_cache& cache, float* out);
/// The part of attend behind the products: rotates q, (tokens, heads * head_dim), and k,
/// (tokens, key/value heads * head_dim), in place, stores k and v in the cache, and attends.
void rotate_and_attend(const qeft::on_host& exec, const model_config& config,
                       const rope_table& rope, qeft::index_t window, float* q, float* k,
                       const float* v, qeft::index_t tokens, qeft::index_t first,
                       block_cache& cache, float* out);
/// silu(gate x) * up x: down_proj's input, (tokens, intermediate_size).
void mlp_inner(const qeft::on_host& exec, const block& b, const float* x, qeft::index_t tokens,
               float* out);
/// The whole block: stream is (tokens, hidden_size), updated in place.
void block_forward(const qeft::on_host& exec, const model_config& config, const rope_table& rope,
                   const block& b, qeft::index_t tokens, qeft::index_t first, block_cache& cache,
                   float* stream, const activation_tap& tap = {});

/// A model and its state for one sequence.
class llama_model {
 public:
  llama_model(const qeft::on_host& exec, const model_source& source,
              activation_type activations = activation_type::exact);

  const model_config& config() const noexcept { return config_; }
  const std::vector<block>& blocks() const noexcept { return blocks_; }
  const linear& head() const noexcept { return head_ ? *head_ : embedding_; }

  /// Forgets the sequence and makes room for `capacity` tokens.
  void reset(qeft::index_t capacity);
  /// Tokens seen since reset.
  qeft::index_t position() const noexcept { return position_; }

  /// Appends tokens to the sequence. @return the stream after the final norm, (tokens, hidden_size)
  /// @throws qeft::error for ids outside of the vocabulary or more tokens than there is room for
  const std::vector<float>& forward(const std::vector<int>& tokens, const activation_tap& tap = {});
  /// Logits of rows of what forward returned. @param logits (rows, vocab_size)
  /// @throws qeft::error errc::not_finite for a logit that is NaN or infinite, naming the block
  /// behind which the activations were so for the first time since reset
  void logits(const float* normed, qeft::index_t rows, float* logits) const;

 private:
  qeft::on_host exec_;
  model_config config_;
  rope_table rope_;
  linear embedding_;
  std::vector<block> blocks_;
  std::vector<float> norm_;
  std::optional<linear> head_;  // none when tied
  std::vector<block_cache> caches_;
  std::vector<float> stream_;
  qeft::index_t capacity_ = 0;
  qeft::index_t position_ = 0;
  qeft::index_t damaged_by_ = -1;  // the first block that made the stream not finite since reset
};

}  // namespace qeft_llm
