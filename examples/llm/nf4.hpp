// SPDX-License-Identifier: Apache-2.0
// Weights in NF4, the 4-bit type of QLoRA (METHOD section 8), and a frozen linear of them.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "tuned_linear.hpp"

namespace qeft_llm {

/// The 16 levels of NF4, ascending: quantiles of a normal distribution, scaled to [-1, 1], with an
/// exact 0.
inline constexpr std::array<float, 16> nf4_levels = {-1.0F,
                                                     -0.6961928009986877F,
                                                     -0.5250730514526367F,
                                                     -0.39491748809814453F,
                                                     -0.28444138169288635F,
                                                     -0.18477343022823334F,
                                                     -0.09105003625154495F,
                                                     0.0F,
                                                     0.07958029955625534F,
                                                     0.16093020141124725F,
                                                     0.24611230194568634F,
                                                     0.33791524171829224F,
                                                     0.44070982933044434F,
                                                     0.5626170039176941F,
                                                     0.7229568362236023F,
                                                     1.0F};

/// A matrix in NF4. A block is 64 adjacent columns of a row (the last one of a row may be shorter):
/// each number is the level nearest to it divided by the block's largest magnitude. These
/// magnitudes are quantised too: their mean over the matrix is subtracted, and 256 of them in a row
/// share a scale in FP32 for codes of 8 bits, mean + scale * code. (QLoRA has a floating-point code
/// of 8 bits there.) That makes 4 + 8 / 64 + 32 / (64 * 256) bits per weight and the mean.
class nf4_matrix {
 public:
  static constexpr qeft::index_t block = 64;
  static constexpr qeft::index_t blocks_per_scale = 256;

  /// @param values (rows, columns), finite
  nf4_matrix(qeft::index_t rows, qeft::index_t columns, const std::vector<float>& values);

  qeft::index_t rows() const noexcept { return rows_; }
  qeft::index_t columns() const noexcept { return columns_; }
  /// Columns [first, last) of a row as floats. @pre first is a multiple of the block
  void decode(qeft::index_t row, qeft::index_t first, qeft::index_t last, float* to) const;
  /// Of everything that is stored.
  qeft::index_t bytes() const noexcept;
  double bits_per_weight() const noexcept {
    return 8.0 * static_cast<double>(bytes()) / static_cast<double>(rows_ * columns_);
  }

 private:
  qeft::index_t row_bytes() const noexcept { return (columns_ + 1) / 2; }
  qeft::index_t row_blocks() const noexcept { return qeft::ceil_div(columns_, block); }
  float largest(qeft::index_t index) const noexcept;

  qeft::index_t rows_;
  qeft::index_t columns_;
  std::vector<std::uint8_t> codes_;      // (rows, row_bytes): column 2 i in the low half of byte i
  std::vector<std::int8_t> magnitudes_;  // (rows, row_blocks)
  std::vector<float> scales_;            // one per blocks_per_scale of them
  float mean_ = 0;
};

/// A layer without parameters whose weight is in NF4. At most a panel of it exists as floats, in
/// which products are done. (QLoRA on a GPU computes in BF16.)
class nf4_linear final : public tuned_linear {
 public:
  /// @param weight in full precision: all columns are weak
  /// @param bias   (OC), or empty
  nf4_linear(const packed_matrix& weight, std::vector<float> bias);

  qeft::index_t out_channels() const override { return weight_.rows(); }
  qeft::index_t in_channels() const override { return weight_.columns(); }
  qeft::index_t saved_channels() const override { return 0; }
  void forward(const qeft::on_host& exec, const float* x, qeft::index_t tokens, float* y,
               float* saved) const override;
  void backward(const qeft::on_host& exec, const float* dy, const float* saved,
                qeft::index_t tokens, float* dx) override;
  void add_parameters(const std::string&, std::vector<parameter>&) override {}
  void update(const qeft::on_host&) override {}

  const nf4_matrix& weight() const noexcept { return weight_; }

 private:
  nf4_matrix weight_;
  std::vector<float> bias_;
};

}  // namespace qeft_llm
