// SPDX-License-Identifier: Apache-2.0
#include "support/cases.hpp"

#include <algorithm>
#include <numeric>

namespace qeft_test {

namespace {

using qeft::index_t;
using qeft::matrix_descriptor;
using qeft::scalar_kind;
using qeft::weak_kind;
using qeft::zero_kind;

float scalar_value(scalar_kind kind, std::uint16_t bits) {
  return kind == scalar_kind::half ? qeft::to_float(qeft::half_bits{bits})
                                   : qeft::to_float(qeft::bf16_bits{bits});
}

std::uint16_t scalar_bits(scalar_kind kind, double value) {
  const auto x = static_cast<float>(value);
  return kind == scalar_kind::half ? qeft::from_float<qeft::half_bits>(x).bits
                                   : qeft::from_float<qeft::bf16_bits>(x).bits;
}

std::vector<std::int32_t> random_weak_columns(const matrix_descriptor& d, random_source& random) {
  std::vector<std::int32_t> columns;
  if (d.weak == weak_kind::per_head) {
    const index_t head_dim = d.in_channels / d.heads;
    const index_t per = d.weak_columns / d.heads;
    for (index_t h = 0; h < d.heads; ++h) {
      for (index_t j = head_dim - per; j < head_dim; ++j) {
        columns.push_back(static_cast<std::int32_t>(h * head_dim + j));
      }
    }
  } else if (d.weak == weak_kind::indexed) {
    std::vector<std::int32_t> all(static_cast<std::size_t>(d.in_channels));
    std::iota(all.begin(), all.end(), 0);
    for (index_t j = 0; j < d.weak_columns; ++j) {  // the first k of a Fisher-Yates shuffle
      const index_t other = random.integer(j, d.in_channels - 1);
      std::swap(all[static_cast<std::size_t>(j)], all[static_cast<std::size_t>(other)]);
    }
    columns.assign(all.begin(), all.begin() + d.weak_columns);
    std::sort(columns.begin(), columns.end());
  } else {
    columns.resize(static_cast<std::size_t>(d.weak_columns));
    std::iota(columns.begin(), columns.end(),
              static_cast<std::int32_t>(d.in_channels - d.weak_columns));
  }
  return columns;
}

template <class Layout>
read_back read_by_view(const qeft::quantized_matrix<Layout>& q) {
  const matrix_descriptor& d = q.descriptor();
  read_back result;
  result.weights.resize(static_cast<std::size_t>(d.out_channels * d.in_channels));
  result.codes.resize(static_cast<std::size_t>(d.out_channels * d.dense_columns()));
  float* weight = result.weights.data();
  unsigned* code = result.codes.data();
  q.visit([&](auto view) {
    for (index_t n = 0; n < view.out_channels; ++n) {
      for (index_t c = 0; c < view.in_channels; ++c) *weight++ = dequantize(view, n, c);
      for (index_t i = 0; i < view.dense_columns(); ++i) *code++ = read_code(view, n, i);
    }
  });
  return result;
}

}  // namespace

std::vector<std::int32_t> plain_layer::weak_index() const {
  return d.weak == weak_kind::indexed ? weak_columns : std::vector<std::int32_t>{};
}

std::vector<float> weights_of(const plain_layer& layer) {
  const matrix_descriptor& d = layer.d;
  std::vector<float> w;
  std::size_t code = 0;
  std::size_t weak = 0;
  for (index_t n = 0; n < d.out_channels; ++n) {
    auto next_weak = layer.weak_columns.begin();
    index_t dense = 0;
    for (index_t c = 0; c < d.in_channels; ++c) {
      if (next_weak != layer.weak_columns.end() && *next_weak == c) {
        ++next_weak;
        w.push_back(scalar_value(d.scalar, layer.weak[weak++]));
        continue;
      }
      const index_t group = d.group_size == qeft::per_channel ? 0 : dense / d.group_size;
      const auto at = static_cast<std::size_t>(n * d.groups() + group);
      const double s = static_cast<double>(scalar_value(d.scalar, layer.scales[at]));
      const auto q = static_cast<double>(layer.codes[code++]);
      double value = 0.0;
      switch (d.zero) {
        case zero_kind::symmetric:
          value = s * (q - static_cast<double>(1 << (d.bits - 1)));
          break;
        case zero_kind::integer:
          value = s * (q - static_cast<double>(layer.zeros[at]));
          break;
        case zero_kind::scaled:
          value = s * q + static_cast<double>(
                              scalar_value(d.scalar, static_cast<std::uint16_t>(layer.zeros[at])));
          break;
      }
      w.push_back(static_cast<float>(value));
      ++dense;
    }
  }
  return w;
}

plain_layer random_layer(const matrix_descriptor& d, random_source& random) {
  qeft::validate(d).throw_if_error();
  plain_layer layer;
  layer.d = d;
  layer.weak_columns = random_weak_columns(d, random);
  const std::uint64_t max_code = (std::uint64_t{1} << static_cast<unsigned>(d.bits)) - 1;
  const auto count = [](index_t a, index_t b) { return static_cast<std::size_t>(a * b); };
  layer.codes.resize(count(d.out_channels, d.dense_columns()));
  for (auto& q : layer.codes) q = static_cast<unsigned>(random.bits() & max_code);
  layer.scales.resize(count(d.out_channels, d.groups()));
  for (auto& s : layer.scales) s = scalar_bits(d.scalar, 0.01 * random.real());
  layer.zeros.assign(layer.scales.size(), 0);
  for (auto& z : layer.zeros) {
    if (d.zero == zero_kind::integer) z = static_cast<unsigned>(random.bits() & max_code);
    if (d.zero == zero_kind::scaled) z = scalar_bits(d.scalar, 0.1 * random.real());
  }
  layer.weak.resize(count(d.out_channels, d.weak_columns));
  for (auto& x : layer.weak) x = scalar_bits(d.scalar, random.real());
  return layer;
}

plain_layer random_case(random_source& random, index_t max_elements) {
  matrix_descriptor d;
  const index_t model_size = random.pick<index_t>({576, 1536, 4304, 10944, 29568});
  const index_t few = random.integer(1, std::max<index_t>(1, max_elements / model_size));
  switch (random.integer(0, 3)) {
    case 0:
      d.in_channels = model_size, d.out_channels = few;
      break;
    case 1:
      d.out_channels = model_size, d.in_channels = few;
      break;
    case 2:  // small and odd
      d.in_channels = random.integer(1, 40), d.out_channels = random.integer(1, 70);
      break;
    default:
      d.in_channels = random.integer(1, 400);
      d.out_channels = random.integer(1, std::max<index_t>(1, max_elements / d.in_channels));
      d.out_channels = std::min<index_t>(d.out_channels, 200);
  }
  d.bits = random.pick({2, 3, 4, 8});
  d.group_size = random.pick<index_t>({32, 64, 96, 128, 128, 1024, qeft::per_channel});
  d.zero = random.pick({zero_kind::symmetric, zero_kind::integer, zero_kind::scaled});
  d.scalar = random.pick({scalar_kind::half, scalar_kind::bf16});
  d.weak = random.pick({weak_kind::none, weak_kind::tail, weak_kind::indexed, weak_kind::per_head});
  if (d.weak == weak_kind::per_head) {
    std::vector<index_t> divisors;
    for (index_t h = 1; h <= std::min<index_t>(d.in_channels, 64); ++h) {
      if (d.in_channels % h == 0) divisors.push_back(h);
    }
    d.heads = divisors[static_cast<std::size_t>(
        random.integer(0, static_cast<index_t>(divisors.size()) - 1))];
  }
  if (d.weak != weak_kind::none) {
    const index_t units = d.in_channels / d.heads;
    const auto at_most = [units](index_t k) { return std::min(units, k); };
    const index_t k = random.pick<index_t>(
        {0, 1, at_most(16), at_most(48), at_most(128), random.integer(0, units), units});
    d.weak_columns = k * d.heads;
  }
  return random_layer(d, random);
}

std::string describe(const matrix_descriptor& d) {
  return std::to_string(d.out_channels) + " x " + std::to_string(d.in_channels) + ", " +
         std::to_string(d.bits) + " bits, g = " + std::to_string(d.group_size) + ", " +
         to_string(d.zero) + " zeros, " + to_string(d.scalar) + ", weak " + to_string(d.weak) +
         " k = " + std::to_string(d.weak_columns) + " heads = " + std::to_string(d.heads);
}

read_back read(const qeft::quantized_matrix<qeft::layout::row_packed>& q) {
  return read_by_view(q);
}
read_back read(const qeft::quantized_matrix<qeft::layout::simd_tile>& q) { return read_by_view(q); }

}  // namespace qeft_test
