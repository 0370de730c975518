// SPDX-License-Identifier: Apache-2.0
#include "tuned_linear.hpp"

#include <algorithm>
#include <utility>

namespace qeft_llm {

using qeft::index_t;

weak_tuning::weak_tuning(const qeft::on_host& exec, const packed_matrix& weight,
                         std::vector<float> bias)
    : base_(exec, weight, std::move(bias)), value_(base_.read_weak()), gradient_(value_.size()) {}

void weak_tuning::forward(const qeft::on_host& exec, const float* x, index_t tokens, float* y,
                          float* saved) const {
  if (saved != nullptr) base_.gather_weak(exec, x, tokens, saved);
  if (y != nullptr) base_.forward(exec, x, tokens, y);
}

void weak_tuning::backward(const qeft::on_host& exec, const float* dy, const float* saved,
                           index_t tokens, float* dx) {
  base_.add_input_gradient(exec, dy, tokens, dx);
  add_weight_gradient(exec, dy, out_channels(), saved, saved_channels(), tokens, gradient_.data());
}

void weak_tuning::add_parameters(const std::string& name, std::vector<parameter>& to) {
  if (value_.empty()) return;
  to.push_back({name + ".weak", out_channels(), saved_channels(), value_.data(), gradient_.data()});
}

void weak_tuning::update(const qeft::on_host& exec) { base_.write_weak(exec, value_.data()); }

scale_tuning::scale_tuning(const qeft::on_host& exec, const packed_matrix& weight,
                           std::vector<float> bias, const trained_parts& parts)
    : base_(exec, weight, std::move(bias)), initial_(base_.read_groups()) {
  if (parts.weak) weak_ = base_.read_weak();
  if (parts.scales) factor_.assign(initial_.scales.size(), 1.0F);
  weak_gradient_.resize(weak_.size());
  factor_gradient_.resize(factor_.size());
}

void scale_tuning::forward(const qeft::on_host& exec, const float* x, index_t tokens, float* y,
                           float* saved) const {
  if (saved != nullptr) std::copy_n(x, tokens * in_channels(), saved);
  if (y != nullptr) base_.forward(exec, x, tokens, y);
}

void scale_tuning::backward(const qeft::on_host& exec, const float* dy, const float* saved,
                            index_t tokens, float* dx) {
  base_.add_input_gradient(exec, dy, tokens, dx);
  if (!weak_.empty()) add_weak_gradient(exec, dy, saved, tokens);
  if (!factor_.empty()) add_factor_gradient(exec, dy, saved, tokens);
}

void scale_tuning::add_weak_gradient(const qeft::on_host& exec, const float* dy, const float* x,
                                     index_t tokens) {
  const index_t k = base_.descriptor().weak_columns;
  std::vector<float> x_weak(static_cast<std::size_t>(tokens * k));
  base_.gather_weak(exec, x, tokens, x_weak.data());
  add_weight_gradient(exec, dy, out_channels(), x_weak.data(), k, tokens, weak_gradient_.data());
}

/// By the chain rule: a scale is initial * factor, and so is a scaled zero point.
void scale_tuning::add_factor_gradient(const qeft::on_host& exec, const float* dy, const float* x,
                                       index_t tokens) {
  std::vector<float> gradient(factor_.size());
  const auto add_through = [&](const std::vector<float>& initial) {
    for (std::size_t i = 0; i < gradient.size(); ++i) {
      factor_gradient_[i] += gradient[i] * initial[i];
    }
  };
  base_.add_scale_gradient(exec, dy, x, tokens, gradient.data());
  add_through(initial_.scales);
  if (initial_.zeros.empty()) return;
  const index_t groups = base_.descriptor().groups();
  std::vector<float> sums(static_cast<std::size_t>(tokens * groups));
  base_.sum_groups(exec, x, tokens, sums.data());
  std::fill(gradient.begin(), gradient.end(), 0.0F);
  add_weight_gradient(exec, dy, out_channels(), sums.data(), groups, tokens, gradient.data());
  add_through(initial_.zeros);
}

void scale_tuning::add_parameters(const std::string& name, std::vector<parameter>& to) {
  const qeft::matrix_descriptor& d = base_.descriptor();
  if (!weak_.empty()) {
    to.push_back(
        {name + ".weak", out_channels(), d.weak_columns, weak_.data(), weak_gradient_.data()});
  }
  if (!factor_.empty()) {
    to.push_back(
        {name + ".scales", out_channels(), d.groups(), factor_.data(), factor_gradient_.data()});
  }
}

void scale_tuning::update(const qeft::on_host& exec) {
  if (!weak_.empty()) base_.write_weak(exec, weak_.data());
  if (factor_.empty()) return;
  group_values values = initial_;
  for (std::vector<float>* all : {&values.scales, &values.zeros}) {
    for (std::size_t i = 0; i < all->size(); ++i) (*all)[i] *= factor_[i];
  }
  base_.write_groups(exec, values);
}

void frozen::forward(const qeft::on_host& exec, const float* x, index_t tokens, float* y,
                     float*) const {
  if (y != nullptr) base_.forward(exec, x, tokens, y);
}

void frozen::backward(const qeft::on_host& exec, const float* dy, const float*, index_t tokens,
                      float* dx) {
  base_.add_input_gradient(exec, dy, tokens, dx);
}

}  // namespace qeft_llm
