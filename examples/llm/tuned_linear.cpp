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

void frozen::forward(const qeft::on_host& exec, const float* x, index_t tokens, float* y,
                     float*) const {
  if (y != nullptr) base_.forward(exec, x, tokens, y);
}

void frozen::backward(const qeft::on_host& exec, const float* dy, const float*, index_t tokens,
                      float* dx) {
  base_.add_input_gradient(exec, dy, tokens, dx);
}

}  // namespace qeft_llm
