// SPDX-License-Identifier: Apache-2.0
// Every instruction set that is compiled in, on layers whose formats cover every branch.
#pragma once

#include "matmul_support.hpp"
#include "support/catch.hpp"
#include "support/sweep.hpp"

namespace qeft_test {

/// body(isa) for every instruction set of this build.
template <class Body>
void for_each_isa(const Body& body) {
  body(qeft::cpu::isa::portable{});
#if defined(QEFT_HAS_AVX2)
  body(qeft::cpu::isa::avx2{});
#endif
#if defined(QEFT_HAS_AVX512)
  body(qeft::cpu::isa::avx512{});
#if defined(QEFT_HAS_AVX512_VNNI)
  body(qeft::cpu::isa::avx512_vnni{});
#endif
#endif
}

/// A layer, and its typed view through `with_view`.
template <class Format>
struct isa_case {
  explicit isa_case(qeft::index_t out_channels, qeft::index_t group_size, std::uint64_t seed) {
    random_source random(seed);
    qeft::matrix_descriptor d;
    d.out_channels = out_channels;
    d.in_channels = 357;
    d.bits = Format::bits;
    d.group_size = group_size;
    d.zero = Format::zero;
    d.scalar = qeft::scalar_kind_of<typename Format::scalar_type>::value;
    d.weak = qeft::weak_kind::indexed;
    d.weak_columns = 130;  // two chunks
    layer = random_layer(d, random);
    matrix = pack<qeft::layout::simd_tile>(layer);
  }

  auto view() const {
    return matrix.template view<Format>(
        qeft::weak_indexed<>{{layer.d.weak_columns}, matrix.weak_index().data()});
  }

  plain_layer layer;
  qeft::quantized_matrix<qeft::layout::simd_tile> matrix;
};

/// body(isa_case) for every code width, zero kind and scalar type, and groups that are whole
/// chunks, parts of one, several, and ragged. 205 rows are 7 tiles: one block of each size, and
/// half a tile.
template <class Body>
void for_each_isa_case(const Body& body) {
  using qeft::quant_format;
  using qeft::zero_kind;
  body(isa_case<quant_format<2, qeft::dynamic, zero_kind::scaled, qeft::bf16_bits>>(205, 96, 2));
  body(isa_case<quant_format<3>>(205, 32, 3));
  body(isa_case<quant_format<4>>(205, 128, 4));
  body(isa_case<quant_format<4, qeft::dynamic, zero_kind::symmetric>>(5, qeft::per_channel, 5));
  body(isa_case<quant_format<8, qeft::dynamic, zero_kind::integer, qeft::bf16_bits>>(205, 160, 6));
}

/// y of gemm in type Y, checked for independence of batch and threads.
template <class Y, class Case, class X, class Activation, class Isa>
std::vector<Y> product(const Case& c, const std::vector<X>& x, qeft::index_t tokens, Activation,
                       Isa) {
  const auto view = c.view();
  std::vector<Y> y(static_cast<std::size_t>(tokens * view.out_channels));
  using executor = qeft::cpu::executor<Activation, Isa>;
  const executor one(qeft::on_host(1));
  REQUIRE(qeft::gemm(one, view, x.data(), tokens, y.data()).ok());
  std::vector<Y> other(y.size());
  for (const int threads : {2, 3, 7}) {
    const executor exec(qeft::on_host{threads});
    REQUIRE(qeft::gemm(exec, view, x.data(), tokens, other.data()).ok());
    CHECK(qeft_test::same_bits(y, other));
    for (qeft::index_t t = 0; t < tokens; ++t) {
      REQUIRE(qeft::gemv(exec, view, x.data() + t * view.in_channels,
                         other.data() + t * view.out_channels)
                  .ok());
    }
    CHECK(qeft_test::same_bits(y, other));
  }
  return y;
}

}  // namespace qeft_test
