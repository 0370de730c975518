// SPDX-License-Identifier: Apache-2.0
// How far a quantised layer is from the original, read off what is stored.
#pragma once

#include <vector>

#include "qeft/container/pack.hpp"
#include "qeft/container/quantized_matrix.hpp"
#include "qeft/core/host_buffer.hpp"
#include "qeft/core/text.hpp"
#include "qeft/solver/group_search.hpp"
#include "qeft/solver/matrix_ops.hpp"

namespace qeft::solver {
inline namespace QEFT_TARGET {

struct layer_error {
  double output = 0.0;   // E = tr(dW H dW^T); 0 without a Hessian
  double squared = 0.0;  // ||dW||^2
};

namespace detail {

/// Row n of the dequantised layer, in input order: (IC) values, equal to `dequantize`.
inline void dequantize_row(const quantized_matrix<>& m, index_t n, std::vector<std::uint8_t>& codes,
                           float* out) {
  const matrix_descriptor& d = m.descriptor();
  const layout::extent e = d.extent();
  codes.resize(static_cast<std::size_t>(e.dense));
  visit_bits(d.bits, [&](auto bits) {
    const auto* words = reinterpret_cast<const std::uint32_t*>(m.codes().data());
    unpack_array<bits>(words + n * layout::row_packed::row_words<bits>(e), e.dense, codes.data());
  });
  visit_scalar(d.scalar, [&](auto scalar) {
    using scalar_type = decltype(scalar);
    visit_weak(d, m.weak_index().data(), [&](auto weak) {
      index_t i = 0;
      for (index_t g = 0; g < e.groups; ++g) {
        const auto [scale, zero] = m.read_params(n, g);
        const group_quantizer q =
            quantizer_of(group_format{d.bits, d.zero, d.scalar}, scalar_type{scale}, zero);
        const index_t end = std::min(e.dense, i + d.columns_per_group());
        for (; i < end; ++i) {
          const auto code = static_cast<float>(codes[static_cast<std::size_t>(i)]);
          out[weak.dense_column(i, d.in_channels)] = q.value(q.lower + code);
        }
      }
      const auto* values = reinterpret_cast<const scalar_type*>(m.weak().data());
      for (index_t j = 0; j < e.weak; ++j) {
        out[weak.weak_column(j, d.in_channels)] = to_float(values[n * e.weak + j]);
      }
    });
  });
}

/// Calls body(tile, rows, dw) with dw = W - dequantised of each tile of rows, (rows, IC).
template <class Body>
void for_each_error_tile(const on_host& exec, span<const float> w, const quantized_matrix<>& m,
                         index_t tile_rows, const Body& body) {
  const index_t oc = m.descriptor().out_channels;
  const index_t ic = m.descriptor().in_channels;
  if (w.size() != oc * ic) {
    fail(errc::invalid_argument,
         text("layer_error: w has ", w.size(), " elements, but the layer has ", oc, " x ", ic));
  }
  exec.parallel_for(ceil_div(oc, tile_rows), 1, [&](index_t begin, index_t end) {
    std::vector<std::uint8_t> codes;
    std::vector<float> row(static_cast<std::size_t>(ic));
    host_buffer<float> dw(static_cast<std::size_t>(tile_rows * ic));
    for (index_t t = begin; t < end; ++t) {
      const index_t first = t * tile_rows;
      const index_t rows = std::min(tile_rows, oc - first);
      for (index_t r = 0; r < rows; ++r) {
        dequantize_row(m, first + r, codes, row.data());
        const float* original = w.data() + (first + r) * ic;
        for (index_t c = 0; c < ic; ++c) {
          dw[static_cast<std::size_t>(r * ic + c)] = original[c] - row[static_cast<std::size_t>(c)];
        }
      }
      body(t, rows, dw.data());
    }
  });
}

/// tr(dW H dW^T) of one tile. Uses H = upper + upper^T - diag in blocks of columns: half the
/// products.
inline double quadratic_form(const float* dw, index_t rows, const float* h, index_t n) {
  constexpr index_t block = 256;
  row_major_matrix<float> product;
  double sum = 0.0;
  for (index_t c = 0; c < n; c += block) {
    const index_t cols = std::min(block, n - c);
    const auto right = map_rows(dw + c, rows, cols, n);
    product.noalias() = right * map_rows(h + c * n + c, cols, cols, n);
    sum += product.cwiseProduct(right).cast<double>().sum();
    if (c == 0) continue;
    product.noalias() = map_rows(dw, rows, c, n) * map_rows(h + c, c, cols, n);
    sum += 2.0 * product.cwiseProduct(right).cast<double>().sum();
  }
  return sum;
}

}  // namespace detail

/// ||dW_:,j||^2 for every input column j.
/// @param w (OC, IC) original weights
inline std::vector<double> column_error(const on_host& exec, span<const float> w,
                                        const quantized_matrix<>& m) {
  constexpr index_t tile_rows = 64;
  const index_t ic = m.descriptor().in_channels;
  const index_t tiles = ceil_div(m.descriptor().out_channels, tile_rows);
  std::vector<double> partial(static_cast<std::size_t>(tiles * ic));
  detail::for_each_error_tile(exec, w, m, tile_rows, [&](index_t t, index_t rows, const float* dw) {
    double* sum = partial.data() + t * ic;
    for (index_t r = 0; r < rows; ++r) {
      for (index_t c = 0; c < ic; ++c) {
        const auto e = static_cast<double>(dw[r * ic + c]);
        sum[c] += e * e;
      }
    }
  });
  std::vector<double> total(static_cast<std::size_t>(ic));
  for (std::size_t i = 0; i < partial.size(); ++i) total[i % total.size()] += partial[i];
  return total;
}

/// E and ||dW||^2 of a quantised layer: tiles are summed in order, so the result does not depend on
/// the number of threads.
/// @param w (OC, IC) original weights  @param h (IC, IC) undamped Hessian, or empty
inline layer_error measure_error(const on_host& exec, span<const float> w,
                                 const quantized_matrix<>& m, span<const float> h) {
  constexpr index_t tile_rows = 128;
  const index_t ic = m.descriptor().in_channels;
  if (!h.empty() && h.size() != ic * ic) {
    fail(errc::invalid_argument,
         text("measure_error: h has ", h.size(), " elements, but must have ", ic, "^2"));
  }
  std::vector<layer_error> partial(
      static_cast<std::size_t>(ceil_div(m.descriptor().out_channels, tile_rows)));
  detail::for_each_error_tile(exec, w, m, tile_rows, [&](index_t t, index_t rows, const float* dw) {
    layer_error& e = partial[static_cast<std::size_t>(t)];
    e.squared = map_rows(dw, rows, ic, ic).cast<double>().squaredNorm();
    if (!h.empty()) e.output = detail::quadratic_form(dw, rows, h.data(), ic);
  });
  layer_error total;
  for (const layer_error& e : partial) {
    total.output += e.output;
    total.squared += e.squared;
  }
  return total;
}

}  // namespace QEFT_TARGET
}  // namespace qeft::solver
