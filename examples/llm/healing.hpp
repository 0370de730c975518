// SPDX-License-Identifier: Apache-2.0
// A quantised model in training towards the model that it was made from.
#pragma once

#include <cstddef>
#include <list>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "llama.hpp"
#include "trainer.hpp"
#include "tuned_linear.hpp"
#include "tuned_model.hpp"

namespace qeft_llm {

/// KL(p || q) in nats of p = softmax(reference) and q = softmax(logits), with exponentials in FP32
/// and sums in double: exactly 0, with a gradient of 0, for equal logits.
/// @param reference (vocabulary), spent
/// @param logits    (vocabulary), replaced by the gradient by them, q - p
double divergence_gradient(float* reference, float* logits, qeft::index_t vocabulary);

/// The numbers of a checkpoint that healing trains, and how fast.
struct healed_parts {
  trained_parts linears;
  bool norms = true;
  // What the trainer's rate is multiplied with.
  double scale_rate = 1;
  double norm_rate = 1;
};

/// Weak columns, group scales and norms of a QEFT checkpoint, with the loss
/// KL(reference || model) of what follows each token, summed over the counted ones. The checkpoint
/// is taken as it is stored, rows and columns permuted.
///
/// Parameters are those of scale_tuning, but weak columns and norms as steps from their initial
/// values: w0 + unit * parameter, the unit of a norm's element being that element, so that its rate
/// is relative, and that of weak columns what calibrate() finds. Channels with large activations
/// have norms a hundred times smaller than others, and weak columns that are as much more
/// sensitive: no common rate suits all.
class healed_model final : public trainable {
 public:
  /// @param source    the checkpoint; must live as long as this object
  /// @param reference a model with the same vocabulary
  /// @throws qeft::error for norms that are trained and not stored in F32
  healed_model(const qeft::on_host& exec, const model_source& source, const model_source& reference,
               const healed_parts& parts = {});

  /// Chooses the units of weak columns, one for each, and the rates of all parameters by the root
  /// mean square of their gradients over single samples: where gradients are large, so is the
  /// curvature, and as much smaller are the steps. In these units a step of rate r in the direction
  /// of every element's gradient lowers the loss by r of its mean, to first order.
  /// @pre the parameters are the initial ones
  void calibrate(const std::vector<training_sample>& samples);

  const std::vector<parameter>& parameters() const override { return parameters_; }
  void clear_gradients() override;
  double backward(const training_sample& sample, double factor) override;
  double loss(const training_sample& sample) override;
  void update() override;

  /// The bytes of a tensor of the checkpoint as it is to be stored after the last update; nothing
  /// for one that is not trained. @throws qeft::error errc::not_finite, naming it, for a norm that
  /// is NaN or infinite
  std::optional<std::vector<std::byte>> stored(const qeft::io::tensor_view& tensor) const;

 private:
  /// A parameter of model_ in units: w0 + unit * step.
  struct stepped {
    parameter inner;
    std::vector<float> initial;
    std::vector<float> unit;  // by column
    std::vector<float> step;
    std::vector<float> gradient;
  };

  linear_maker maker();
  void add_stepped(const parameter& inner, double rate_factor);
  void check_norm(const parameter& norm) const;
  void find_gradients_of_steps();
  logits_loss loss_to_reference(const training_sample& sample);

  qeft::on_host exec_;
  const model_source& source_;
  healed_parts parts_;
  llama_model reference_;
  std::map<std::string, const scale_tuning*> linears_;  // of model_, by name
  std::optional<tuned_model> model_;
  std::list<stepped> stepped_;
  std::vector<parameter> parameters_;
  std::vector<float> rows_;              // of the reference's stream
  std::vector<float> reference_logits_;  // of these
};

}  // namespace qeft_llm
