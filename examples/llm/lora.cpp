// SPDX-License-Identifier: Apache-2.0
#include "lora.hpp"

#include <Eigen/Core>
#include <algorithm>
#include <cmath>
#include <utility>

#include "qeft/container/visit.hpp"
#include "qeft/io/checksum.hpp"
#include "qeft/io/tensor.hpp"
#include "qeft/solver/matrix_ops.hpp"
#include "qeft/training/counter_random.hpp"

namespace qeft_llm {

using qeft::errc;
using qeft::fail;
using qeft::index_t;
using qeft::text;
using qeft::solver::map_rows;

namespace {

// Tokens of one product: its size, and so its sums, depend on nothing else.
constexpr index_t token_piece = 64;

/// body(first token, tokens) of pieces.
template <class Body>
void for_each_piece(const qeft::on_host& exec, index_t tokens, const Body& body) {
  exec.parallel_for(qeft::ceil_div(tokens, token_piece), 1, [&](index_t begin, index_t end) {
    for (; begin < end; ++begin)
      body(begin * token_piece, std::min(token_piece, tokens - begin * token_piece));
  });
}

/// y += scale * x w^T. @param x (tokens, columns) @param w (rows, columns) @param y (tokens, rows)
void add_product(const qeft::on_host& exec, const float* x, index_t tokens, const float* w,
                 index_t rows, index_t columns, float scale, float* y) {
  for_each_piece(exec, tokens, [&](index_t first, index_t count) {
    map_rows(y + first * rows, count, rows, rows).noalias() +=
        scale * map_rows(x + first * columns, count, columns, columns) *
        map_rows(w, rows, columns, columns).transpose();
  });
}

/// dx += scale * dy w. @param dy (tokens, rows) @param w (rows, columns)
/// @param dx (tokens, columns)
void add_product_back(const qeft::on_host& exec, const float* dy, index_t tokens, const float* w,
                      index_t rows, index_t columns, float scale, float* dx) {
  for_each_piece(exec, tokens, [&](index_t first, index_t count) {
    map_rows(dx + first * columns, count, columns, columns).noalias() +=
        scale * map_rows(dy + first * rows, count, rows, rows) *
        map_rows(w, rows, columns, columns);
  });
}

/// In an order that vectors keep, wherever x lies.
float sum_of(const float* x, index_t count) {
  constexpr index_t lanes = 8;
  float sums[lanes] = {};
  index_t i = 0;
  for (; i + lanes <= count; i += lanes) {
    for (index_t l = 0; l < lanes; ++l) sums[l] += x[i + l];
  }
  float sum = 0;
  for (; i < count; ++i) sum += x[i];
  for (const float s : sums) sum += s;
  return sum;
}

}  // namespace

column_groups groups_of(const qeft::matrix_descriptor& d,
                        qeft::span<const std::int32_t> weak_index) {
  column_groups g;
  std::vector<index_t> size(static_cast<std::size_t>(d.groups()));
  qeft::visit_weak(d, weak_index.data(), [&](const auto& weak) {
    for (index_t i = 0; i < d.dense_columns(); ++i) {
      const index_t group = i / d.columns_per_group();
      const index_t column = weak.dense_column(i, d.in_channels);
      ++size[static_cast<std::size_t>(group)];
      if (!g.runs.empty() && g.runs.back().group == group &&
          g.runs.back().first + g.runs.back().count == column) {
        ++g.runs.back().count;
      } else {
        g.runs.push_back({column, 1, group});
      }
    }
  });
  for (const index_t s : size) g.share.push_back(1.0F / static_cast<float>(s));
  return g;
}

lora::lora(std::unique_ptr<tuned_linear> base, const std::string& name, const lora_options& options,
           column_groups groups)
    : base_(std::move(base)),
      groups_(std::move(groups)),
      rank_(options.rank),
      width_(groups_.count() > 0 ? groups_.count() : base_->in_channels()),
      scale_(static_cast<float>(options.alpha / static_cast<double>(options.rank))) {
  if (rank_ < 1 || rank_ > 65536) {
    fail(errc::invalid_argument, text("lora: rank is ", rank_, ", but must be in [1, 65536]"));
  }
  if (!(options.alpha > 0 && std::isfinite(scale_))) {
    fail(errc::invalid_argument,
         text("lora: alpha is ", options.alpha, ", but must be a positive number"));
  }
  a_.resize(static_cast<std::size_t>(rank_ * width_));
  b_.resize(static_cast<std::size_t>(out_channels() * rank_));
  a_gradient_.resize(a_.size());
  b_gradient_.resize(b_.size());
  qeft::io::stream_hash layer;
  layer.update(qeft::io::as_bytes(name));
  const std::uint64_t seed = qeft::counter_bits(options.seed, layer.finish());
  const float bound = 1.0F / std::sqrt(static_cast<float>(width_));
  for (std::size_t i = 0; i < a_.size(); ++i) {
    a_[i] = bound * (2.0F * qeft::counter_uniform(seed, i) - 1.0F);
  }
}

/// The means of the groups. @param z (tokens, groups)
void lora::pool(const qeft::on_host& exec, const float* x, index_t tokens, float* z) const {
  for_each_piece(exec, tokens, [&](index_t first, index_t count) {
    for (index_t t = first; t < first + count; ++t) {
      float* to = z + t * width_;
      std::fill_n(to, width_, 0.0F);
      for (const column_groups::run& r : groups_.runs) {
        to[r.group] += sum_of(x + t * in_channels() + r.first, r.count);
      }
      for (index_t g = 0; g < width_; ++g) to[g] *= groups_.share[static_cast<std::size_t>(g)];
    }
  });
}

/// The counterpart of pool: adds the gradient of x. @param dz (tokens, groups)
void lora::pool_back(const qeft::on_host& exec, const float* dz, index_t tokens, float* dx) const {
  for_each_piece(exec, tokens, [&](index_t first, index_t count) {
    for (index_t t = first; t < first + count; ++t) {
      for (const column_groups::run& r : groups_.runs) {
        const float each =
            dz[t * width_ + r.group] * groups_.share[static_cast<std::size_t>(r.group)];
        float* to = dx + t * in_channels() + r.first;
        for (index_t i = 0; i < r.count; ++i) to[i] += each;
      }
    }
  });
}

void lora::forward(const qeft::on_host& exec, const float* x, index_t tokens, float* y,
                   float* saved) const {
  base_->forward(exec, x, tokens, y, nullptr);
  // Behind each other: z, (tokens, width), and A z, (tokens, r).
  floats own(saved == nullptr ? static_cast<std::size_t>(tokens * saved_channels()) : 0);
  float* z = saved == nullptr ? own.data() : saved;
  float* az = z + tokens * width_;
  if (groups_.count() > 0) {
    pool(exec, x, tokens, z);
  } else {
    std::copy_n(x, tokens * width_, z);
  }
  std::fill_n(az, tokens * rank_, 0.0F);
  add_product(exec, z, tokens, a_.data(), rank_, width_, 1.0F, az);
  if (y != nullptr) add_product(exec, az, tokens, b_.data(), out_channels(), rank_, scale_, y);
}

void lora::backward(const qeft::on_host& exec, const float* dy, const float* saved, index_t tokens,
                    float* dx) {
  base_->backward(exec, dy, nullptr, tokens, dx);
  const float* z = saved;
  const float* az = saved + tokens * width_;

  floats scaled(az, az + tokens * rank_);
  for (float& value : scaled) value *= scale_;
  add_weight_gradient(exec, dy, out_channels(), scaled.data(), rank_, tokens, b_gradient_.data());

  floats d_az(static_cast<std::size_t>(tokens * rank_));
  add_product_back(exec, dy, tokens, b_.data(), out_channels(), rank_, scale_, d_az.data());
  floats da(a_.size());  // transposed: there are more columns than ranks to share among threads
  add_weight_gradient(exec, z, width_, d_az.data(), rank_, tokens, da.data());
  map_rows(a_gradient_.data(), rank_, width_, width_) +=
      map_rows(std::as_const(da).data(), width_, rank_, rank_).transpose();

  if (groups_.count() == 0) {
    add_product_back(exec, d_az.data(), tokens, a_.data(), rank_, width_, 1.0F, dx);
    return;
  }
  floats dz(static_cast<std::size_t>(tokens * width_));
  add_product_back(exec, d_az.data(), tokens, a_.data(), rank_, width_, 1.0F, dz.data());
  pool_back(exec, dz.data(), tokens, dx);
}

void lora::add_parameters(const std::string& name, std::vector<parameter>& to) {
  to.push_back({name + ".lora_A.weight", rank_, width_, a_.data(), a_gradient_.data()});
  to.push_back({name + ".lora_B.weight", out_channels(), rank_, b_.data(), b_gradient_.data()});
}

}  // namespace qeft_llm
