// SPDX-License-Identifier: Apache-2.0
// The only file that instantiates the kernels.
#include "linear.hpp"

#include <cmath>
#include <cstring>
#include <string>
#include <utility>

#include "qeft/container/repack.hpp"
#include "qeft/cpu/matmul.hpp"
#include "qeft/io/convert.hpp"

namespace qeft_llm {

using qeft::errc;
using qeft::fail;
using qeft::index_t;

packed_matrix full_precision(const std::string& name, const qeft::io::tensor_view& tensor,
                             index_t out_channels, index_t in_channels) {
  qeft::matrix_descriptor d;
  d.out_channels = out_channels;
  d.in_channels = in_channels;
  d.weak = qeft::weak_kind::tail;
  d.weak_columns = in_channels;
  d.scalar = tensor.type == qeft::io::dtype::bf16 ? qeft::scalar_kind::bf16
                                                  : qeft::scalar_kind::half;
  packed_matrix m(d);
  auto* out = reinterpret_cast<std::uint16_t*>(m.weak().data());
  const index_t count = out_channels * in_channels;
  const auto refuse = [&](index_t i, const std::string& why) {
    fail(errc::not_finite, "tensor " + name + ", element " + std::to_string(i) + ": " + why);
  };
  if (tensor.type == qeft::io::dtype::f32 || tensor.type == qeft::io::dtype::f64) {
    const std::vector<float> values = qeft::io::to_floats(tensor);
    for (index_t i = 0; i < count; ++i) {
      const float x = values[static_cast<std::size_t>(i)];
      out[i] = qeft::from_float<qeft::half_bits>(x).bits;
      if (!std::isfinite(x)) refuse(i, "not finite");
      if ((out[i] & 0x7fffU) == 0x7c00U) refuse(i, std::to_string(x) + " overflows FP16");
    }
    return m;
  }
  if (tensor.type != qeft::io::dtype::f16 && tensor.type != qeft::io::dtype::bf16) {
    fail(errc::unsupported, "tensor " + name + " is " + qeft::io::to_string(tensor.type) +
                                ", but must be F16, BF16, F32 or F64");
  }
  std::memcpy(out, tensor.data.data(), static_cast<std::size_t>(2 * count));
  const unsigned exponent = tensor.type == qeft::io::dtype::f16 ? 0x7c00U : 0x7f80U;
  for (index_t i = 0; i < count; ++i) {
    if ((out[i] & exponent) == exponent) refuse(i, "not finite");
  }
  return m;
}

linear::linear(const qeft::on_host& exec, const packed_matrix& weight, std::vector<float> bias)
    : weight_(qeft::repack<qeft::layout::simd_tile>(exec, weight)), bias_(std::move(bias)) {
  if (!bias_.empty() && static_cast<index_t>(bias_.size()) != out_channels()) {
    fail(errc::invalid_argument, "linear: bias has " + std::to_string(bias_.size()) +
                                     " elements, but out_channels is " +
                                     std::to_string(out_channels()));
  }
}

void linear::replace_weight(const qeft::on_host& exec, const packed_matrix& weight) {
  *this = linear(exec, weight, std::move(bias_));
}

void linear::forward(const qeft::on_host& exec, const float* x, index_t tokens, float* y) const {
  qeft::gemm(exec, weight_, x, tokens, y).throw_if_error();
  const auto oc = static_cast<std::size_t>(out_channels());
  for (index_t t = 0; t < tokens && !bias_.empty(); ++t) {
    for (std::size_t n = 0; n < oc; ++n) y[static_cast<std::size_t>(t) * oc + n] += bias_[n];
  }
}

void linear::read_row(index_t n, float* row) const {
  if (n < 0 || n >= out_channels() || descriptor().dense_columns() != 0) {
    fail(errc::invalid_argument, "linear::read_row: n is " + std::to_string(n) +
                                     ", but must be below " + std::to_string(out_channels()) +
                                     " and the weight in full precision");
  }
  const auto* weak = reinterpret_cast<const std::uint16_t*>(weight_.weak().data());
  const bool half = descriptor().scalar == qeft::scalar_kind::half;
  for (index_t j = 0; j < in_channels(); ++j) {
    const std::uint16_t bits =
        weak[qeft::layout::simd_tile::weak_index(descriptor().extent(), n, j)];
    row[j] = half ? qeft::to_float(qeft::half_bits{bits}) : qeft::to_float(qeft::bf16_bits{bits});
  }
}

}  // namespace qeft_llm
