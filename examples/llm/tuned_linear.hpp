// SPDX-License-Identifier: Apache-2.0
// Linear layers in training: a frozen base, and what of it is trained.
#pragma once

#include <string>
#include <vector>

#include "linear.hpp"
#include "parameter.hpp"

namespace qeft_llm {

/// A linear layer in training; one class per method. Results do not depend on the number of
/// threads.
class tuned_linear {
 public:
  virtual ~tuned_linear() = default;

  virtual qeft::index_t out_channels() const = 0;
  virtual qeft::index_t in_channels() const = 0;
  /// Floats per token that forward keeps for backward.
  virtual qeft::index_t saved_channels() const = 0;

  /// y = W x + bias.
  /// @param x     (tokens, IC)
  /// @param y     (tokens, OC), or null: only what is saved is wanted
  /// @param saved (tokens, saved_channels()), or null: nothing is kept
  virtual void forward(const qeft::on_host& exec, const float* x, qeft::index_t tokens, float* y,
                       float* saved) const = 0;

  /// dx += dy W, and the gradients of the parameters += theirs.
  /// @param dy    (tokens, OC)
  /// @param saved what forward kept of these tokens
  /// @param dx    (tokens, IC)
  virtual void backward(const qeft::on_host& exec, const float* dy, const float* saved,
                        qeft::index_t tokens, float* dx) = 0;

  /// Appends the parameters, whose names begin with `name`; the pointers are valid while this
  /// object lives.
  virtual void add_parameters(const std::string& name, std::vector<parameter>& to) = 0;

  /// After the parameters' values changed: makes what forward reads of them again.
  virtual void update(const qeft::on_host& exec) = 0;
};

/// Weak-column tuning (METHOD section 6): the k weak columns are trained, wherever they sit, and
/// the k inputs that they multiply are all that is kept of x. Forward multiplies with the columns
/// as a checkpoint holds them, in 16 bits. The parameter is NAME.weak, (OC, k).
class weak_tuning final : public tuned_linear {
 public:
  /// @param bias (OC), or empty; not trained
  weak_tuning(const qeft::on_host& exec, const packed_matrix& weight, std::vector<float> bias);

  qeft::index_t out_channels() const override { return base_.out_channels(); }
  qeft::index_t in_channels() const override { return base_.in_channels(); }
  qeft::index_t saved_channels() const override { return base_.descriptor().weak_columns; }
  void forward(const qeft::on_host& exec, const float* x, qeft::index_t tokens, float* y,
               float* saved) const override;
  void backward(const qeft::on_host& exec, const float* dy, const float* saved,
                qeft::index_t tokens, float* dx) override;
  void add_parameters(const std::string& name, std::vector<parameter>& to) override;
  /// @throws qeft::error errc::not_finite for a value that is not, or that 16 bits do not hold
  void update(const qeft::on_host& exec) override;

 private:
  linear base_;
  std::vector<float> value_;     // (OC, k)
  std::vector<float> gradient_;  // (OC, k)
};

/// Which of a layer's numbers are trained.
struct trained_parts {
  bool weak = true;
  bool scales = true;
};

/// Trains the weak columns, the parameter NAME.weak of (OC, k), the scales, NAME.scales of
/// (OC, groups), or both; codes and integer zero points stay. NAME.scales holds what the stored
/// scales are multiplied with, 1 at first, so that its rate is relative and suits every layer.
/// Where zero points are scaled, they are multiplied with it too: then a group's weights s q + z
/// keep their ratios, as s (q - z) do. Forward multiplies with what a checkpoint would hold, in 16
/// bits; all of x is kept.
class scale_tuning final : public tuned_linear {
 public:
  /// @param bias (OC), or empty; not trained
  scale_tuning(const qeft::on_host& exec, const packed_matrix& weight, std::vector<float> bias,
               const trained_parts& parts = {});

  /// The layer as it is after the last update.
  const linear& base() const noexcept { return base_; }

  qeft::index_t out_channels() const override { return base_.out_channels(); }
  qeft::index_t in_channels() const override { return base_.in_channels(); }
  qeft::index_t saved_channels() const override { return base_.in_channels(); }
  void forward(const qeft::on_host& exec, const float* x, qeft::index_t tokens, float* y,
               float* saved) const override;
  void backward(const qeft::on_host& exec, const float* dy, const float* saved,
                qeft::index_t tokens, float* dx) override;
  void add_parameters(const std::string& name, std::vector<parameter>& to) override;
  /// @throws qeft::error errc::not_finite for a value that is not, or that 16 bits do not hold
  void update(const qeft::on_host& exec) override;

 private:
  void add_weak_gradient(const qeft::on_host& exec, const float* dy, const float* x,
                         qeft::index_t tokens);
  void add_factor_gradient(const qeft::on_host& exec, const float* dy, const float* x,
                           qeft::index_t tokens);

  linear base_;
  group_values initial_;
  std::vector<float> weak_;  // (OC, k); empty if it is not trained, and so below
  std::vector<float> weak_gradient_;
  std::vector<float> factor_;  // (OC, groups)
  std::vector<float> factor_gradient_;
};

/// A layer without parameters.
class frozen final : public tuned_linear {
 public:
  frozen(const qeft::on_host& exec, const packed_matrix& weight, std::vector<float> bias)
      : base_(exec, weight, std::move(bias)) {}

  qeft::index_t out_channels() const override { return base_.out_channels(); }
  qeft::index_t in_channels() const override { return base_.in_channels(); }
  qeft::index_t saved_channels() const override { return 0; }
  void forward(const qeft::on_host& exec, const float* x, qeft::index_t tokens, float* y,
               float* saved) const override;
  void backward(const qeft::on_host& exec, const float* dy, const float* saved,
                qeft::index_t tokens, float* dx) override;
  void add_parameters(const std::string&, std::vector<parameter>&) override {}
  void update(const qeft::on_host&) override {}

 private:
  linear base_;
};

}  // namespace qeft_llm
