// SPDX-License-Identifier: Apache-2.0
#include <Eigen/Core>
#include <algorithm>
#include <cmath>

#include "attention.hpp"
#include "elementwise.hpp"

namespace qeft_llm {

using qeft::index_t;

namespace {

using matrix = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
/// One head of all tokens, (tokens, head_dim), among the others.
using head_view = Eigen::Map<matrix, 0, Eigen::OuterStride<>>;
using const_head_view = Eigen::Map<const matrix, 0, Eigen::OuterStride<>>;

// Queries at a time. Sums depend on it, so that it must not depend on the number of threads.
constexpr index_t query_piece = 64;

/// A query head, and the gradients that it adds to.
struct query_head {
  const_head_view q, k, v, dout;
  head_view dq, dk, dv;
};

/// Queries [first, first + size) of a head.
void attend_back(const query_head& head, index_t first, index_t size, index_t window) {
  const index_t begin = window > 0 ? std::max<index_t>(0, first + 1 - window) : 0;
  const index_t keys = first + size - begin;
  const float scale = 1.0F / std::sqrt(static_cast<float>(head.q.cols()));
  const auto q = head.q.middleRows(first, size);
  const auto k = head.k.middleRows(begin, keys);
  const auto dout = head.dout.middleRows(first, size);

  matrix p(size, keys);
  p.noalias() = q * k.transpose();
  p *= scale;
  for (index_t i = 0; i < size; ++i) {
    const index_t hidden = window > 0 ? std::max(begin, first + i + 1 - window) - begin : 0;
    const index_t seen = first + i + 1 - begin;
    p.row(i).head(hidden).setZero();
    softmax(&p(i, hidden), seen - hidden);
    p.row(i).tail(keys - seen).setZero();
  }
  auto dv = head_view(head.dv).middleRows(begin, keys);
  dv.noalias() += p.transpose() * dout;

  // Through the softmax: ds = p * (dp - sum over keys of p * dp).
  matrix ds(size, keys);
  ds.noalias() = dout * head.v.middleRows(begin, keys).transpose();
  const Eigen::VectorXf mean = p.cwiseProduct(ds).rowwise().sum();
  ds.colwise() -= mean;
  ds = ds.cwiseProduct(p) * scale;
  head_view(head.dq).middleRows(first, size).noalias() = ds * k;
  head_view(head.dk).middleRows(begin, keys).noalias() += ds.transpose() * q;
}

}  // namespace

void causal_attention_gradient(const qeft::on_host& exec, const attention_shape& shape,
                               const float* q, const float* k, const float* v, const float* dout,
                               float* dq, float* dk, float* dv) {
  const index_t dim = shape.head_dim;
  const index_t group = shape.heads / shape.value_heads;
  const index_t width = shape.heads * dim;
  const index_t value_width = shape.value_heads * dim;
  const auto values = [&](const float* x, index_t h) {
    return const_head_view(x + h / group * dim, shape.tokens, dim,
                           Eigen::OuterStride<>(value_width));
  };
  const auto queries = [&](const float* x, index_t h) {
    return const_head_view(x + h * dim, shape.tokens, dim, Eigen::OuterStride<>(width));
  };
  // Gradients of keys and values by query head, so that heads which share them are apart.
  matrix dk_of = matrix::Zero(shape.tokens, width);
  matrix dv_of = matrix::Zero(shape.tokens, width);
  const auto result = [&](float* x, index_t h) {
    return head_view(x + h * dim, shape.tokens, dim, Eigen::OuterStride<>(width));
  };
  exec.parallel_for(shape.heads, 1, [&](index_t h, index_t end) {
    for (; h < end; ++h) {
      const query_head head{queries(q, h),          values(k, h),  values(v, h),
                            queries(dout, h),       result(dq, h), result(dk_of.data(), h),
                            result(dv_of.data(), h)};
      for (index_t first = 0; first < shape.tokens; first += query_piece) {
        attend_back(head, first, std::min(query_piece, shape.tokens - first), shape.window);
      }
    }
  });
  exec.parallel_for(shape.tokens, query_piece, [&](index_t begin, index_t end) {
    for (index_t t = begin; t < end; ++t) {
      for (index_t c = 0; c < value_width; ++c) {
        const index_t first = c / dim * group * dim + c % dim;
        float sum_k = 0;
        float sum_v = 0;
        for (index_t h = 0; h < group; ++h) {
          sum_k += dk_of(t, first + h * dim);
          sum_v += dv_of(t, first + h * dim);
        }
        dk[t * value_width + c] = sum_k;
        dv[t * value_width + c] = sum_v;
      }
    }
  });
}

}  // namespace qeft_llm
