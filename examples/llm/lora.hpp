// SPDX-License-Identifier: Apache-2.0
// Low-rank adaptation of a frozen linear: LoRA, and QA-LoRA, which adapts group by group.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "qeft/core/host_buffer.hpp"
#include "tuned_linear.hpp"

namespace qeft_llm {

struct lora_options {
  qeft::index_t rank = 16;  // r
  double alpha = 16;        // what B A is multiplied with is alpha / r
  std::uint64_t seed = 0;   // of A
};

/// The means of a layer's input that QA-LoRA reads: over the dense columns of each group. Weak
/// columns are in none.
struct column_groups {
  /// Adjacent columns of a group.
  struct run {
    qeft::index_t first;
    qeft::index_t count;
    qeft::index_t group;
  };
  std::vector<run> runs;     // ascending
  std::vector<float> share;  // (groups): 1 / columns in it

  qeft::index_t count() const noexcept { return static_cast<qeft::index_t>(share.size()); }
};

/// The quantisation groups of a layer. @param weak_index of its matrix, for weak_kind::indexed
column_groups groups_of(const qeft::matrix_descriptor& d,
                        qeft::span<const std::int32_t> weak_index);

/// y = base(x) + alpha / r * B (A z), z = x, or for QA-LoRA the means of the groups of x. A, (r,
/// size of z), begins as is usual, uniform in +-1 / sqrt(size of z); B, (OC, r), as zero, so that y
/// is base(x). Kept of a token: z, and A z. Parameters: NAME.lora_A.weight and NAME.lora_B.weight,
/// which forward reads as they are, in FP32.
class lora final : public tuned_linear {
 public:
  /// @param base   a frozen layer: without parameters, and it keeps nothing
  /// @param name   of the layer, decides A with the seed
  /// @param groups of QA-LoRA; without any it is LoRA
  /// @throws qeft::error errc::invalid_argument for a rank below 1 or an alpha that is no positive
  ///         number
  lora(std::unique_ptr<tuned_linear> base, const std::string& name, const lora_options& options,
       column_groups groups = {});

  qeft::index_t out_channels() const override { return base_->out_channels(); }
  qeft::index_t in_channels() const override { return base_->in_channels(); }
  qeft::index_t saved_channels() const override { return width_ + rank_; }
  void forward(const qeft::on_host& exec, const float* x, qeft::index_t tokens, float* y,
               float* saved) const override;
  void backward(const qeft::on_host& exec, const float* dy, const float* saved,
                qeft::index_t tokens, float* dx) override;
  void add_parameters(const std::string& name, std::vector<parameter>& to) override;
  void update(const qeft::on_host&) override {}

 private:
  using floats = qeft::host_buffer<float>;

  void pool(const qeft::on_host& exec, const float* x, qeft::index_t tokens, float* z) const;
  void pool_back(const qeft::on_host& exec, const float* dz, qeft::index_t tokens, float* dx) const;

  std::unique_ptr<tuned_linear> base_;
  column_groups groups_;
  qeft::index_t rank_;
  qeft::index_t width_;  // of A
  float scale_;          // alpha / r
  floats a_;             // (r, width)
  floats b_;             // (OC, r)
  floats a_gradient_;
  floats b_gradient_;
};

}  // namespace qeft_llm
