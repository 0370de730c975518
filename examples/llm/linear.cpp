// SPDX-License-Identifier: Apache-2.0
// The only file that instantiates the kernels.
#include "linear.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>

#include "qeft/container/repack.hpp"
#include "qeft/cpu/backward.hpp"
#include "qeft/cpu/matmul.hpp"
#include "qeft/io/convert.hpp"

namespace qeft_llm {

using qeft::errc;
using qeft::fail;
using qeft::index_t;

namespace {

/// Numbers rounded to a 16-bit type.
struct rounded_values {
  qeft::scalar_kind scalar;
  std::vector<std::uint16_t> bits;
  double error = 0;         // as in rounding_summary
  index_t overflowed = -1;  // the first number that became infinite
};

template <class Scalar>
rounded_values rounded(const std::vector<float>& values, index_t rows, index_t columns) {
  rounded_values r{
      std::is_same_v<Scalar, qeft::half_bits> ? qeft::scalar_kind::half : qeft::scalar_kind::bf16,
      std::vector<std::uint16_t>(values.size())};
  struct sums {
    double lost = 0;
    double whole = 0;
    void add(double x, double difference) {
      lost += difference * difference;
      whole += x * x;
    }
    double error() const { return lost == 0 ? 0 : std::sqrt(lost / whole); }
  };
  std::vector<sums> by_column(static_cast<std::size_t>(columns));
  std::size_t i = 0;
  for (index_t n = 0; n < rows; ++n) {
    sums row;
    for (sums& column : by_column) {
      const float x = values[i];
      const Scalar stored = qeft::from_float<Scalar>(x);
      const float back = qeft::to_float(stored);
      if (std::isinf(back) && r.overflowed < 0) r.overflowed = static_cast<index_t>(i);
      r.bits[i++] = stored.bits;
      const double difference = static_cast<double>(x) - static_cast<double>(back);
      row.add(static_cast<double>(x), difference);
      column.add(static_cast<double>(x), difference);
    }
    r.error = std::max(r.error, row.error());
  }
  for (const sums& column : by_column) r.error = std::max(r.error, column.error());
  return r;
}

/// One epilogue for layers with and without a bias halves what is compiled.
struct bias_if_any {
  const float* bias;  // (OC), or null

  float operator()(float value, index_t, index_t channel) const noexcept {
    return bias == nullptr ? value : value + bias[channel];
  }
};

float widened(std::uint16_t bits, qeft::scalar_kind scalar) {
  return scalar == qeft::scalar_kind::half ? qeft::to_float(qeft::half_bits{bits})
                                           : qeft::to_float(qeft::bf16_bits{bits});
}

std::uint16_t narrowed(float value, qeft::scalar_kind scalar) {
  return scalar == qeft::scalar_kind::half ? qeft::from_float<qeft::half_bits>(value).bits
                                           : qeft::from_float<qeft::bf16_bits>(value).bits;
}

// Rows whose weak columns are worth another thread.
constexpr index_t weak_grain = 256;
// Tokens whose sums over groups are.
constexpr index_t sum_grain = 16;

}  // namespace

packed_matrix full_precision(const std::string& name, const qeft::io::tensor_view& tensor,
                             index_t out_channels, index_t in_channels,
                             rounding_summary* rounding) {
  qeft::matrix_descriptor d;
  d.out_channels = out_channels;
  d.in_channels = in_channels;
  d.weak = qeft::weak_kind::tail;
  d.weak_columns = in_channels;
  d.scalar =
      tensor.type == qeft::io::dtype::bf16 ? qeft::scalar_kind::bf16 : qeft::scalar_kind::half;
  const auto refuse = [&](index_t i, const std::string& why) {
    fail(errc::not_finite, "tensor " + name + ", element " + std::to_string(i) + ": " + why);
  };
  if (tensor.type == qeft::io::dtype::f32 || tensor.type == qeft::io::dtype::f64) {
    const std::vector<float> values = qeft::io::to_floats(tensor);
    const index_t bad =
        qeft::io::find_not_finite({values.data(), static_cast<index_t>(values.size())});
    if (bad >= 0) refuse(bad, "not finite");
    rounded_values best = rounded<qeft::half_bits>(values, out_channels, in_channels);
    if (best.error > 0) {
      rounded_values other = rounded<qeft::bf16_bits>(values, out_channels, in_channels);
      if (best.overflowed >= 0 || (other.overflowed < 0 && other.error < best.error)) {
        best = std::move(other);
      }
    }
    if (best.overflowed >= 0) {
      refuse(best.overflowed, std::to_string(values[static_cast<std::size_t>(best.overflowed)]) +
                                  " overflows FP16 and BF16");
    }
    if (rounding != nullptr && best.error > 0) {
      ++rounding->tensors;
      if (best.error > rounding->error) {
        rounding->error = best.error;
        rounding->worst = name;
      }
    }
    d.scalar = best.scalar;
    packed_matrix m(d);
    std::memcpy(m.weak().data(), best.bits.data(), 2 * best.bits.size());
    return m;
  }
  if (tensor.type != qeft::io::dtype::f16 && tensor.type != qeft::io::dtype::bf16) {
    fail(errc::unsupported, "tensor " + name + " is " + qeft::io::to_string(tensor.type) +
                                ", but must be F16, BF16, F32 or F64");
  }
  packed_matrix m(d);
  std::memcpy(m.weak().data(), tensor.data.data(), static_cast<std::size_t>(tensor.data.size()));
  const index_t bad = qeft::io::find_not_finite(tensor.data, d.scalar);
  if (bad >= 0) refuse(bad, "not finite");
  return m;
}

std::vector<float> values_of(const packed_matrix& weight) {
  const qeft::matrix_descriptor& d = weight.descriptor();
  if (d.dense_columns() != 0) {
    fail(errc::invalid_argument, "values_of: the weight has " + std::to_string(d.dense_columns()) +
                                     " quantised columns, but must have none");
  }
  std::vector<float> values;
  values.reserve(static_cast<std::size_t>(d.out_channels * d.in_channels));
  for (index_t n = 0; n < d.out_channels; ++n) {
    for (index_t j = 0; j < d.in_channels; ++j) {
      values.push_back(widened(weight.read_weak(n, j), d.scalar));
    }
  }
  return values;
}

linear::linear(const qeft::on_host& exec, const packed_matrix& weight, std::vector<float> bias)
    : weight_(qeft::repack<qeft::layout::simd_tile>(exec, weight)), bias_(std::move(bias)) {
  if (!bias_.empty() && static_cast<index_t>(bias_.size()) != out_channels()) {
    fail(errc::invalid_argument, "linear: bias has " + std::to_string(bias_.size()) +
                                     " elements, but out_channels is " +
                                     std::to_string(out_channels()));
  }
}

void linear::replace_weight(const qeft::on_host& exec, const packed_matrix& weight,
                            const qeft::permutation& order) {
  *this = linear(exec, weight, std::move(bias_));
  if (!order.is_identity()) order_ = order;
}

void linear::forward(const qeft::on_host& exec, const float* x, index_t tokens, float* y) const {
  std::vector<float> ordered;
  if (order_.size() > 0) {
    ordered.assign(x, x + tokens * in_channels());
    qeft::permute_columns(order_, qeft::span<float>(ordered), tokens);
    x = ordered.data();
  }
  const qeft::status s =
      activations_ == activation_type::int8
          ? qeft::gemm(qeft::cpu::with<qeft::cpu::int8>(exec), weight_, x, tokens, y,
                       bias_if_any{bias_.empty() ? nullptr : bias_.data()})
          : qeft::gemm(exec, weight_, x, tokens, y,
                       bias_if_any{bias_.empty() ? nullptr : bias_.data()});
  s.throw_if_error();
}

void linear::add_input_gradient(const qeft::on_host& exec, const float* dy, index_t tokens,
                                float* dx) const {
  qeft::input_gradient(exec, weight_, dy, tokens, dx, true).throw_if_error();
}

void linear::gather_weak(const qeft::on_host& exec, const float* x, index_t tokens,
                         float* x_weak) const {
  qeft::gather_weak(exec, weight_, x, tokens, x_weak).throw_if_error();
}

void add_weight_gradient(const qeft::on_host& exec, const float* dy, index_t rows, const float* x,
                         index_t columns, index_t tokens, float* dw) {
  qeft::weak_gradient(exec, rows, columns, dy, x, tokens, dw, true).throw_if_error();
}

std::vector<float> linear::read_weak() const {
  const index_t k = descriptor().weak_columns;
  std::vector<float> values(static_cast<std::size_t>(out_channels() * k));
  for (index_t n = 0; n < out_channels(); ++n) {
    for (index_t j = 0; j < k; ++j) {
      values[static_cast<std::size_t>(n * k + j)] =
          widened(weight_.read_weak(n, j), descriptor().scalar);
    }
  }
  return values;
}

void linear::write_weak(const qeft::on_host& exec, const float* values) {
  const index_t k = descriptor().weak_columns;
  const auto stored = [&](index_t i) { return narrowed(values[i], descriptor().scalar); };
  for (index_t i = 0; i < out_channels() * k; ++i) {
    if (std::isfinite(widened(stored(i), descriptor().scalar))) continue;
    fail(errc::not_finite, "row " + std::to_string(i / k) + " of weak column " +
                               std::to_string(i % k) + " is " + std::to_string(values[i]) +
                               ", but must be a finite number of " +
                               qeft::to_string(descriptor().scalar));
  }
  exec.parallel_for(out_channels(), weak_grain, [&](index_t begin, index_t end) {
    for (index_t n = begin; n < end; ++n) {
      for (index_t j = 0; j < k; ++j) weight_.write_weak(n, j, stored(n * k + j));
    }
  });
}

void linear::add_scale_gradient(const qeft::on_host& exec, const float* dy, const float* x,
                                index_t tokens, float* dscales) const {
  qeft::scale_gradient(exec, weight_, dy, x, tokens, dscales, true).throw_if_error();
}

void linear::sum_groups(const qeft::on_host& exec, const float* x, index_t tokens,
                        float* sums) const {
  const qeft::matrix_descriptor& d = descriptor();
  qeft::visit_weak(d, weight_.weak_index().data(), [&](const auto& weak) {
    exec.parallel_for(tokens, sum_grain, [&](index_t t, index_t end) {
      for (; t < end; ++t) {
        float* of_token = sums + t * d.groups();
        std::fill_n(of_token, d.groups(), 0.0F);
        for (index_t i = 0; i < d.dense_columns(); ++i) {
          of_token[i / d.columns_per_group()] +=
              x[t * d.in_channels + weak.dense_column(i, d.in_channels)];
        }
      }
    });
  });
}

group_values linear::read_groups() const {
  const index_t groups = descriptor().groups();
  const bool scaled = descriptor().zero == qeft::zero_kind::scaled;
  group_values values;
  for (index_t n = 0; n < out_channels(); ++n) {
    for (index_t g = 0; g < groups; ++g) {
      const qeft::stored_params p = weight_.read_params(n, g);
      values.scales.push_back(widened(p.scale_bits, descriptor().scalar));
      if (!scaled) continue;
      values.zeros.push_back(widened(static_cast<std::uint16_t>(p.zero), descriptor().scalar));
    }
  }
  return values;
}

void linear::write_groups(const qeft::on_host& exec, const group_values& values) {
  const index_t groups = descriptor().groups();
  const qeft::scalar_kind scalar = descriptor().scalar;
  const auto check = [&](const char* what, const std::vector<float>& all, float largest) {
    for (std::size_t i = 0; i < all.size(); ++i) {
      if (std::abs(widened(narrowed(all[i], scalar), scalar)) <= largest) continue;  // false of NaN
      const auto at = static_cast<index_t>(i);
      fail(errc::not_finite, qeft::text("row ", at / groups, ", group ", at % groups, ": the ",
                                        what, " is ", all[i], ", but must be a number of ",
                                        qeft::to_string(scalar), " of at most ", largest));
    }
  };
  check("scale", values.scales, std::ldexp(1.0F, 119));
  check("zero point", values.zeros, std::numeric_limits<float>::max());
  exec.parallel_for(out_channels(), weak_grain, [&](index_t begin, index_t end) {
    for (index_t n = begin; n < end; ++n) {
      for (index_t g = 0; g < groups; ++g) {
        const auto i = static_cast<std::size_t>(n * groups + g);
        const unsigned zero = values.zeros.empty() ? weight_.read_params(n, g).zero
                                                   : narrowed(values.zeros[i], scalar);
        weight_.write_params(n, g, narrowed(values.scales[i], scalar), zero);
      }
    }
  });
}

void linear::read_row(index_t n, float* row) const {
  if (n < 0 || n >= out_channels() || descriptor().dense_columns() != 0) {
    fail(errc::invalid_argument, "linear::read_row: n is " + std::to_string(n) +
                                     ", but must be below " + std::to_string(out_channels()) +
                                     " and the weight in full precision");
  }
  for (index_t j = 0; j < in_channels(); ++j) {
    row[j] = widened(weight_.read_weak(n, j), descriptor().scalar);
  }
}

}  // namespace qeft_llm
