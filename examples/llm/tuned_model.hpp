// SPDX-License-Identifier: Apache-2.0
// A whole decoder in training: its loss on a sample, and the gradients of its parameters.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "llama.hpp"
#include "parameter.hpp"
#include "qeft/core/memory.hpp"
#include "tuned_block.hpp"

namespace qeft_llm {

/// One sequence. counted[i] says whether the prediction of tokens[i] from those before it counts;
/// counted[0] is false.
struct training_sample {
  std::vector<int> tokens;
  std::vector<char> counted;
};

/// The losses of some predictions, from their logits, which it replaces by their gradients.
/// @param positions of the tokens that are predicted, ascending
/// @param logits    (positions, vocabulary)
/// @param losses    (positions)
using logits_loss =
    std::function<void(qeft::span<const qeft::index_t> positions, float* logits, double* losses)>;

/// @param source must live as long as the result
tensor_reader reader_of(const model_source& source);
/// Weak-column tuning of the quantised linears; those without weak columns and those in full
/// precision are frozen. @param config must live as long as the result
linear_maker weak_column_tuning(const qeft::on_host& exec, const model_config& config);

struct tuning_options {
  bool norms = false;       // the weights of the norms are parameters too
  bool keep_tapes = false;  // of all blocks at a time, instead of computing each block twice
};

class tuned_model {
 public:
  /// Weak-column tuning of a QEFT checkpoint. Embedding and head are frozen, as in every method.
  tuned_model(const qeft::on_host& exec, const model_source& source,
              const tuning_options& options = {});
  /// Any other method.
  tuned_model(const qeft::on_host& exec, const model_config& config, const tensor_reader& read,
              const linear_maker& make, const tuning_options& options = {});

  const model_config& config() const noexcept { return config_; }
  /// In a fixed order. Valid while the model lives.
  const std::vector<parameter>& parameters() const noexcept { return parameters_; }
  void clear_gradients();
  /// Floats per token that all linears keep for backward; those of one block at a time, unless
  /// tuning_options::keep_tapes is set.
  qeft::index_t saved_channels() const;

  /// Sum over the counted tokens of -log p. The gradients of factor * that sum are added to those
  /// of the parameters. The same bits for any number of threads.
  /// @throws qeft::error for a sample that this model cannot read, and errc::not_finite where
  ///         activations or the loss are not finite; then gradients are as they were, or damaged
  double backward(const training_sample& sample, double factor);
  /// The same with another loss than -log p.
  double backward(const training_sample& sample, double factor, const logits_loss& loss);
  /// Forward only: the same number, bit for bit.
  double loss(const training_sample& sample);
  double loss(const training_sample& sample, const logits_loss& loss);

  /// After the parameters' values changed.
  /// @throws qeft::error naming the linear whose values its type cannot hold
  void update();

 private:
  floats embed(const std::vector<int>& tokens) const;
  block_pass pass(std::size_t block, qeft::index_t tokens);
  void prepare(const training_sample& sample);
  void run_block(std::size_t block, floats& stream, const training_sample& sample,
                 block_tape* tape);
  double head_pass(const training_sample& sample, const floats& stream, const logits_loss& loss,
                   double factor, floats* d_stream);
  double head_piece(qeft::span<const qeft::index_t> positions, const floats& stream,
                    const logits_loss& loss, double factor, floats* d_stream);
  const linear& head() const noexcept { return head_ ? *head_ : embedding_; }

  qeft::on_host exec_;
  model_config config_;
  tuning_options options_;
  linear embedding_;
  std::vector<tuned_block> blocks_;
  tuned_norm norm_;
  std::optional<linear> head_;  // none when tied
  std::vector<parameter> parameters_;
  rope_table rope_;
  qeft::index_t positions_ = 0;  // of rope_
};

/// -log p of each token in a row's softmax: the loss of tuned_model::backward.
/// @param tokens of the sample, must live as long as the result
logits_loss cross_entropy(const qeft::on_host& exec, const std::vector<int>& tokens,
                          qeft::index_t vocabulary);

}  // namespace qeft_llm
