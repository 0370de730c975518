// SPDX-License-Identifier: Apache-2.0
#include "nf4.hpp"

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <utility>

#include "qeft/core/host_buffer.hpp"
#include "qeft/solver/matrix_ops.hpp"

namespace qeft_llm {

using qeft::fail;
using qeft::index_t;
using qeft::solver::map_rows;

namespace {

// Rows, or columns, of a weight that exist as floats at a time, per thread. A multiple of the
// block.
constexpr index_t panel = 128;

constexpr float largest_code = 127.0F;

/// The index of the level nearest to x, which is in [-1, 1].
unsigned nearest_level(float x) {
  const auto* above = std::lower_bound(nf4_levels.begin(), nf4_levels.end(), x);
  if (above == nf4_levels.begin()) return 0;
  if (above == nf4_levels.end()) return 15;
  const bool is_above = *above - x < x - above[-1];
  return static_cast<unsigned>(above - nf4_levels.begin()) - (is_above ? 0U : 1U);
}

}  // namespace

nf4_matrix::nf4_matrix(index_t rows, index_t columns, const std::vector<float>& values)
    : rows_(rows), columns_(columns) {
  if (rows < 1 || columns < 1 || static_cast<index_t>(values.size()) != rows * columns) {
    fail(qeft::errc::invalid_argument,
         qeft::text("nf4_matrix: values has ", values.size(), " elements, but must have ", rows,
                    " x ", columns, ", both at least 1"));
  }
  codes_.resize(static_cast<std::size_t>(rows * row_bytes()));
  std::vector<float> exact;  // of all blocks
  double sum = 0;
  for (index_t n = 0; n < rows; ++n) {
    for (index_t first = 0; first < columns; first += block) {
      const float* from = values.data() + n * columns + first;
      const index_t count = std::min(block, columns - first);
      float most = 0;
      for (index_t i = 0; i < count; ++i) most = std::max(most, std::abs(from[i]));
      for (index_t i = 0; i < count; ++i) {
        const unsigned code = nearest_level(most > 0 ? from[i] / most : 0.0F);
        std::uint8_t& to = codes_[static_cast<std::size_t>(n * row_bytes() + (first + i) / 2)];
        to = static_cast<std::uint8_t>(to | code << ((first + i) % 2 == 0 ? 0U : 4U));
      }
      exact.push_back(most);
      sum += static_cast<double>(most);
    }
  }
  mean_ = static_cast<float>(sum / static_cast<double>(exact.size()));
  for (std::size_t first = 0; first < exact.size(); first += blocks_per_scale) {
    const std::size_t last =
        std::min(exact.size(), first + static_cast<std::size_t>(blocks_per_scale));
    float most = 0;
    for (std::size_t i = first; i < last; ++i) most = std::max(most, std::abs(exact[i] - mean_));
    const float scale = most / largest_code;
    scales_.push_back(scale);
    for (std::size_t i = first; i < last; ++i) {
      const float code = scale > 0 ? std::nearbyint((exact[i] - mean_) / scale) : 0.0F;
      magnitudes_.push_back(
          static_cast<std::int8_t>(std::clamp(code, -largest_code, largest_code)));
    }
  }
}

/// The magnitude of a block as it is stored.
float nf4_matrix::largest(index_t index) const noexcept {
  return mean_ + scales_[static_cast<std::size_t>(index / blocks_per_scale)] *
                     static_cast<float>(magnitudes_[static_cast<std::size_t>(index)]);
}

index_t nf4_matrix::bytes() const noexcept {
  return static_cast<index_t>(codes_.size() + magnitudes_.size() + sizeof(float) * scales_.size() +
                              sizeof mean_);
}

void nf4_matrix::decode(index_t row, index_t first, index_t last, float* to) const {
  for (; first < last; first += block) {
    const float most = largest(row * row_blocks() + first / block);
    std::array<float, 16> level;
    for (std::size_t i = 0; i < level.size(); ++i) level[i] = nf4_levels[i] * most;
    const std::uint8_t* from = codes_.data() + row * row_bytes() + first / 2;
    const index_t count = std::min(block, last - first);
    for (index_t i = 0; i + 1 < count; i += 2) {
      const std::uint8_t both = from[i / 2];
      to[i] = level[both & 15U];
      to[i + 1] = level[both >> 4U];
    }
    if (count % 2 != 0) to[count - 1] = level[from[count / 2] & 15U];
    to += count;
  }
}

nf4_linear::nf4_linear(const packed_matrix& weight, std::vector<float> bias)
    : weight_(weight.descriptor().out_channels, weight.descriptor().in_channels, values_of(weight)),
      bias_(std::move(bias)) {}

void nf4_linear::forward(const qeft::on_host& exec, const float* x, index_t tokens, float* y,
                         float*) const {
  if (y == nullptr) return;
  const index_t rows = weight_.rows();
  const index_t columns = weight_.columns();
  exec.parallel_for(qeft::ceil_div(rows, panel), 1, [&](index_t begin, index_t end) {
    qeft::host_buffer<float> w(static_cast<std::size_t>(panel * columns));
    for (; begin < end; ++begin) {
      const index_t first = begin * panel;
      const index_t count = std::min(panel, rows - first);
      for (index_t n = 0; n < count; ++n) {
        weight_.decode(first + n, 0, columns, w.data() + n * columns);
      }
      auto out = map_rows(y + first, tokens, count, rows);
      out.noalias() = map_rows(x, tokens, columns, columns) *
                      map_rows(std::as_const(w).data(), count, columns, columns).transpose();
      if (bias_.empty()) continue;
      out.rowwise() += Eigen::Map<const Eigen::RowVectorXf>(bias_.data() + first, count);
    }
  });
}

void nf4_linear::backward(const qeft::on_host& exec, const float* dy, const float*, index_t tokens,
                          float* dx) {
  const index_t rows = weight_.rows();
  const index_t columns = weight_.columns();
  exec.parallel_for(qeft::ceil_div(columns, panel), 1, [&](index_t begin, index_t end) {
    qeft::host_buffer<float> w(static_cast<std::size_t>(rows * panel));
    for (; begin < end; ++begin) {
      const index_t first = begin * panel;
      const index_t count = std::min(panel, columns - first);
      for (index_t n = 0; n < rows; ++n) {
        weight_.decode(n, first, first + count, w.data() + n * count);
      }
      map_rows(dx + first, tokens, count, columns).noalias() +=
          map_rows(dy, tokens, rows, rows) * map_rows(std::as_const(w).data(), rows, count, count);
    }
  });
}

}  // namespace qeft_llm
