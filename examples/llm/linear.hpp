// SPDX-License-Identifier: Apache-2.0
// One type for every linear layer of a model, quantised or not.
#pragma once

#include <string>
#include <vector>

#include "qeft/container/quantized_matrix.hpp"
#include "qeft/core/on_host.hpp"
#include "qeft/io/tensor.hpp"
#include "qeft/layout/simd_tile.hpp"
#include "qeft/reorder/permutation.hpp"

namespace qeft_llm {

using packed_matrix = qeft::quantized_matrix<qeft::layout::row_packed>;

/// What rounding tensors to 16 bits has cost.
struct rounding_summary {
  qeft::index_t tensors = 0;  // that hold a number which 16 bits do not
  std::string worst;          // the tensor with the largest error
  double error = 0;           // ||x - rounded x|| / ||x||, the largest of a row or a column
  bool reported = false;
};

/// A full-precision (F16, BF16, F32, F64) tensor of OC x IC as a layer whose columns are all weak:
/// no codes, the values as they are. F32 and F64 are rounded to FP16 or BF16, whichever has the
/// smaller error by the measure of rounding_summary: FP16 for weights of usual size, BF16 where
/// rows or columns are too small or too large for FP16. NaN, infinity and overflow throw
/// qeft::error naming the tensor.
/// @param rounding counts the tensor if its numbers changed; may be null
packed_matrix full_precision(const std::string& name, const qeft::io::tensor_view& tensor,
                             qeft::index_t out_channels, qeft::index_t in_channels,
                             rounding_summary* rounding = nullptr);

/// The numbers of such a layer, (OC, IC). @pre all columns of the weight are weak
std::vector<float> values_of(const packed_matrix& weight);

/// The arithmetic of quantised columns: FP32, or 8-bit activations (qeft::cpu::int8).
enum class activation_type { exact, int8 };

/// What the codes of groups are turned into weights with, (OC, groups) each.
struct group_values {
  std::vector<float> scales;
  std::vector<float> zeros;  // where they are scaled, else empty
};

class linear {
 public:
  linear() = default;
  /// @param bias (OC), or empty
  linear(const qeft::on_host& exec, const packed_matrix& weight, std::vector<float> bias = {});

  qeft::index_t out_channels() const noexcept { return weight_.descriptor().out_channels; }
  qeft::index_t in_channels() const noexcept { return weight_.descriptor().in_channels; }
  const qeft::matrix_descriptor& descriptor() const noexcept { return weight_.descriptor(); }

  /// Another weight of the same shape; the bias stays.
  /// @param order of its columns: column i is for input channel order[i]
  void replace_weight(const qeft::on_host& exec, const packed_matrix& weight,
                      const qeft::permutation& order);

  void set_activations(activation_type type) noexcept { activations_ = type; }

  /// y = W x + bias. @param x (tokens, IC) @param y (tokens, OC)
  void forward(const qeft::on_host& exec, const float* x, qeft::index_t tokens, float* y) const;

  // The backward pass (METHOD section 6). @pre replace_weight has not been called with an order

  /// dx += dy W. @param dy (tokens, OC) @param dx (tokens, IC)
  void add_input_gradient(const qeft::on_host& exec, const float* dy, qeft::index_t tokens,
                          float* dx) const;
  /// x_weak[t, j] = x[t, weak column j]. @param x (tokens, IC) @param x_weak (tokens, k)
  void gather_weak(const qeft::on_host& exec, const float* x, qeft::index_t tokens,
                   float* x_weak) const;

  /// The weak columns, (OC, k).
  std::vector<float> read_weak() const;
  /// Replaces them by `values`, (OC, k), rounded to the weight's 16-bit type.
  /// @throws qeft::error errc::not_finite, writing nothing, for a value that is not finite or not
  /// in 16 bits
  void write_weak(const qeft::on_host& exec, const float* values);

  /// dscales += the gradient of the scales, (OC, groups): see qeft::scale_gradient.
  /// @param dy (tokens, OC) @param x (tokens, IC)
  void add_scale_gradient(const qeft::on_host& exec, const float* dy, const float* x,
                          qeft::index_t tokens, float* dscales) const;
  /// sums[t, g] = the sum of x[t, i] over the dense columns i of group g: what scaled zero points
  /// are multiplied with. @param x (tokens, IC) @param sums (tokens, groups)
  void sum_groups(const qeft::on_host& exec, const float* x, qeft::index_t tokens,
                  float* sums) const;

  group_values read_groups() const;
  /// Replaces them, rounded to the weight's 16-bit type; other kinds of zero points stay.
  /// @throws qeft::error errc::not_finite, writing nothing, for a value that is not finite or not
  /// in 16 bits, or a scale above 2^119, which is more than a checkpoint may hold
  void write_groups(const qeft::on_host& exec, const group_values& values);

  /// Row n of a full-precision weight, (IC): the embedding of token n. An embedding and a tied head
  /// are one linear.
  void read_row(qeft::index_t n, float* row) const;

 private:
  qeft::quantized_matrix<qeft::layout::simd_tile> weight_;
  std::vector<float> bias_;
  qeft::permutation order_;  // of the weight's columns; empty: that of the inputs
  activation_type activations_ = activation_type::exact;
};

/// dw += dy^T x: gradient of a weight, or of columns of it.
/// @param dy (tokens, rows) @param x (tokens, columns) @param dw (rows, columns)
void add_weight_gradient(const qeft::on_host& exec, const float* dy, qeft::index_t rows,
                         const float* x, qeft::index_t columns, qeft::index_t tokens, float* dw);

}  // namespace qeft_llm
