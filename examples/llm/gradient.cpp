// SPDX-License-Identifier: Apache-2.0
#include "gradient.hpp"

#include <algorithm>
#include <memory>
#include <utility>

#include "llama.hpp"
#include "tuned_model.hpp"

namespace qeft_llm {

using qeft::fail;
using qeft::index_t;

namespace {

// Columns whose gradient exists at a time.
constexpr index_t column_piece = 64;

/// A frozen layer in full precision that measures its weight's gradient dW.
class measured_linear final : public tuned_linear {
 public:
  /// @param sums the squared norms of the columns of dW are added to it, (IC)
  measured_linear(const qeft::on_host& exec, const packed_matrix& weight, std::vector<float> bias,
                  std::vector<double>& sums)
      : base_(exec, weight, std::move(bias)), sums_(sums) {
    sums_.assign(static_cast<std::size_t>(in_channels()), 0.0);
  }

  index_t out_channels() const override { return base_.out_channels(); }
  index_t in_channels() const override { return base_.in_channels(); }
  index_t saved_channels() const override { return in_channels(); }

  void forward(const qeft::on_host& exec, const float* x, index_t tokens, float* y,
               float* saved) const override {
    if (saved != nullptr) std::copy_n(x, tokens * in_channels(), saved);
    if (y != nullptr) base_.forward(exec, x, tokens, y);
  }

  void backward(const qeft::on_host& exec, const float* dy, const float* saved, index_t tokens,
                float* dx) override {
    base_.add_input_gradient(exec, dy, tokens, dx);
    std::vector<float> x(static_cast<std::size_t>(tokens * column_piece));
    std::vector<float> dw(static_cast<std::size_t>(out_channels() * column_piece));
    for (index_t first = 0; first < in_channels(); first += column_piece) {
      const index_t columns = std::min(column_piece, in_channels() - first);
      for (index_t t = 0; t < tokens; ++t) {
        std::copy_n(saved + t * in_channels() + first, columns, x.data() + t * columns);
      }
      std::fill(dw.begin(), dw.end(), 0.0F);
      add_weight_gradient(exec, dy, out_channels(), x.data(), columns, tokens, dw.data());
      exec.parallel_for(columns, 8, [&](index_t begin, index_t end) {
        for (index_t n = 0; n < out_channels(); ++n) {
          for (index_t c = begin; c < end; ++c) {
            const auto d = static_cast<double>(dw[static_cast<std::size_t>(n * columns + c)]);
            sums_[static_cast<std::size_t>(first + c)] += d * d;
          }
        }
      });
    }
  }

  void add_parameters(const std::string&, std::vector<parameter>&) override {}
  void update(const qeft::on_host&) override {}

 private:
  linear base_;
  std::vector<double>& sums_;
};

}  // namespace

column_sensitivities gradient_sensitivity(const qeft::on_host& exec, const model_config& config,
                                          const hf_weights& weights,
                                          const std::vector<std::vector<int>>& windows,
                                          const gradient_progress& progress) {
  column_sensitivities sums;
  const tensor_reader read{
      [&](const std::string& name, index_t out_channels, index_t in_channels) {
        const std::string tensor = name + ".weight";
        return full_precision(tensor, weights.view(tensor, {out_channels, in_channels}),
                              out_channels, in_channels);
      },
      [&](const std::string& name, index_t size) { return weights.read(name, {size}); }};
  tuned_model model(exec, config, read,
                    [&](const std::string& name, const packed_matrix& weight,
                        std::vector<float> bias) -> std::unique_ptr<tuned_linear> {
                      return std::make_unique<measured_linear>(exec, weight, std::move(bias),
                                                               sums[name]);
                    });
  index_t number = 0;
  for (const std::vector<int>& window : windows) {
    training_sample sample{window, std::vector<char>(window.size(), 1)};
    if (!window.empty()) sample.counted[0] = 0;
    const double predictions = static_cast<double>(window.size()) - 1;
    try {
      const double loss = model.backward(sample, 1 / predictions) / predictions;
      if (progress) progress(number, loss);
      ++number;
    } catch (const qeft::error& e) {
      fail(e.code(), "gradient_sensitivity: sample " + std::to_string(number) + ": " + e.what());
    }
  }
  return sums;
}

}  // namespace qeft_llm
