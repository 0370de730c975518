// SPDX-License-Identifier: Apache-2.0
// Random quantised layers, kept next to a plain description that defines what they mean.
#pragma once

#include <algorithm>
#include <vector>

#include "qeft/container/quantized_matrix.hpp"
#include "qeft/layout/simd_tile.hpp"
#include "support/random.hpp"

namespace qeft_test {

/// A layer as plain arrays, without packing, layouts or policies.
struct plain_layer {
  qeft::matrix_descriptor d;
  std::vector<std::int32_t> weak_columns;  // (k) ascending, whatever the policy
  std::vector<unsigned> codes;             // (OC, IC - k)
  std::vector<std::uint16_t> scales;       // (OC, groups)
  std::vector<unsigned> zeros;             // (OC, groups) integers, or bits of scalars
  std::vector<std::uint16_t> weak;         // (OC, k)

  /// What quantized_matrix stores as index.
  std::vector<std::int32_t> weak_index() const;
};

/// W, (OC, IC) row-major: METHOD section 1, element by element.
std::vector<float> weights_of(const plain_layer& layer);

/// Random codes, finite scales and zeros, weak values for the shape `d`.
plain_layer random_layer(const qeft::matrix_descriptor& d, random_source& random);

/// A random shape and format, then random_layer. Covers the input and output sizes of real models
/// (with the other dimension small), odd sizes, k = 0 and k = IC, and every format and placement.
/// @param max_elements about the largest OC * IC
plain_layer random_case(random_source& random, qeft::index_t max_elements);

/// Short description for failure messages.
std::string describe(const qeft::matrix_descriptor& d);

/// Packs by the element-wise writers.
template <class Layout>
qeft::quantized_matrix<Layout> pack(const plain_layer& layer) {
  qeft::quantized_matrix<Layout> q(layer.d, layer.weak_index());
  const qeft::layout::extent e = layer.d.extent();
  std::size_t code = 0;
  std::size_t param = 0;
  std::size_t weak = 0;
  for (qeft::index_t n = 0; n < e.out_channels; ++n) {
    for (qeft::index_t i = 0; i < e.dense; ++i) q.write_code(n, i, layer.codes[code++]);
    for (qeft::index_t g = 0; g < e.groups; ++g, ++param) {
      q.write_params(n, g, layer.scales[param], layer.zeros[param]);
    }
    for (qeft::index_t j = 0; j < e.weak; ++j) q.write_weak(n, j, layer.weak[weak++]);
  }
  return q;
}

/// What the library's slow accessors say about a layer.
struct read_back {
  std::vector<float> weights;   // (OC, IC) by dequantize
  std::vector<unsigned> codes;  // (OC, IC - k) by read_code
};

/// Compiled once, because a visit of all formats takes long to compile.
read_back read(const qeft::quantized_matrix<qeft::layout::row_packed>& q);
read_back read(const qeft::quantized_matrix<qeft::layout::simd_tile>& q);

template <class Layout>
std::vector<float> dequantized(const qeft::quantized_matrix<Layout>& q) {
  return read(q).weights;
}
template <class Layout>
std::vector<unsigned> codes_of(const qeft::quantized_matrix<Layout>& q) {
  return read(q).codes;
}

/// Whether every stored byte and the description are equal.
template <class Layout>
bool same_bytes(const qeft::quantized_matrix<Layout>& a, const qeft::quantized_matrix<Layout>& b) {
  const auto equal = [](qeft::span<const std::byte> x, qeft::span<const std::byte> y) {
    return x.size() == y.size() && std::equal(x.begin(), x.end(), y.begin());
  };
  return a.descriptor() == b.descriptor() && a.weak_index() == b.weak_index() &&
         equal(a.codes(), b.codes()) && equal(a.scales(), b.scales()) &&
         equal(a.zeros(), b.zeros()) && equal(a.weak(), b.weak());
}

}  // namespace qeft_test
