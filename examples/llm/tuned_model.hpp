// SPDX-License-Identifier: Apache-2.0
// A whole decoder in training: its loss on a sample, and the gradients of its parameters.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "llama.hpp"
#include "parameter.hpp"
#include "tuned_block.hpp"

namespace qeft_llm {

/// One sequence. counted[i] says whether the prediction of tokens[i] from those before it counts;
/// counted[0] is false.
struct training_sample {
  std::vector<int> tokens;
  std::vector<char> counted;
};

/// Losses of some tokens from their logits, which are replaced by their gradients.
/// positions[i] is the token that row i of the logits, (positions, vocabulary), predicts.
/// @param losses (positions)
using logits_loss =
    std::function<void(qeft::span<const qeft::index_t> positions, float* logits, double* losses)>;

struct tuning_options {
  bool norms = false;       // the weights of the norms are parameters too
  bool keep_tapes = false;  // of all blocks at a time, instead of computing each block twice
};

class tuned_model {
 public:
  /// Weak-column tuning of a QEFT checkpoint; linears without weak columns and those in full
  /// precision are frozen, as are embedding and head.
  tuned_model(const qeft::on_host& exec, const model_source& source,
              const tuning_options& options = {});

  const model_config& config() const noexcept;
  /// In a fixed order. Valid while the model lives.
  const std::vector<parameter>& parameters() const noexcept;
  void clear_gradients();

  /// Sum over the counted tokens of -log p. The gradients of factor * that sum are added to those
  /// of the parameters. The same for any number of threads.
  /// @throws qeft::error for a sample that is no sample of this model, and errc::not_finite where
  ///         activations or the loss are not finite
  double backward(const training_sample& sample, double factor);
  /// Forward only: the same number, bit for bit.
  double loss(const training_sample& sample);

  /// After the parameters' values changed.
  void update();
};

}  // namespace qeft_llm
