// SPDX-License-Identifier: Apache-2.0
// The weights that lanes make of layout::fragment are those of the definition, bit for bit.
#include <cstring>

#include "qeft/core/unroll.hpp"
#include "qeft/thread/dequantize.hpp"
#include "support/cases.hpp"
#include "support/catch.hpp"
#include "support/sweep.hpp"

namespace {

using qeft::index_t;
using qeft::zero_kind;
using qeft::layout::fragment;

/// Word `i` of an array, as a kernel loads it.
std::uint32_t word(const void* array, index_t i) {
  std::uint32_t w = 0;
  std::memcpy(&w, static_cast<const char*>(array) + 4 * i, 4);
  return w;
}

template <class Format>
class checked_layer {
  using dequantizer = qeft::lane_dequantizer<Format>;
  using unpack = qeft::unpack<Format::bits, typename Format::scalar_type>;
  static constexpr index_t tile_columns = fragment::columns<Format::bits>;

 public:
  void check() {
    for (index_t n_tile = 0; n_tile < fragment::row_tiles(e_); ++n_tile) {
      for (int lane = 0; lane < fragment::lanes; ++lane) {
        for (index_t k = 0; k < e_.dense; k += tile_columns) check_tile(n_tile, k, lane);
        for (index_t j = 0; j < e_.weak; j += fragment::step_columns) check_weak(n_tile, j, lane);
      }
    }
  }

 private:
  static qeft::matrix_descriptor describe() {
    qeft::matrix_descriptor d;
    d.out_channels = 37;
    d.in_channels = 335;
    d.bits = Format::bits;
    d.group_size = 32;
    d.zero = Format::zero;
    d.scalar = qeft::scalar_kind_of<typename Format::scalar_type>::value;
    d.weak = qeft::weak_kind::tail;
    d.weak_columns = 35;
    return d;
  }
  static qeft::quantized_matrix<fragment> make() {
    qeft_test::random_source random(Format::bits);
    return qeft_test::pack<fragment>(qeft_test::random_layer(describe(), random));
  }

  /// Weights of 16 rows and the columns from k on, in the layer's own order.
  void compare(const qeft::lane_weights& w, index_t n_tile, index_t k, index_t end, int lane) {
    for (int i = 0; i < 8; ++i) {
      const index_t n = n_tile * 16 + lane / 4 + 8 * (i / 2 % 2);
      const index_t column = k + lane % 4 * 2 + 8 * (i / 4) + i % 2;
      if (n >= view_.out_channels || column >= end) continue;
      const float expected = dequantize(view_, n, column);
      if (std::memcmp(&w.of[i], &expected, sizeof expected) != 0) {
        FAIL("row " << n << ", column " << column << ": " << w.of[i] << " for " << expected);
      }
      counted_.ran();
    }
  }
  void check_tile(index_t n_tile, index_t k, int lane) {
    std::uint32_t words[unpack::words];
    int next = 0;
    for (int p = 0; p < qeft::bit_planes<Format::bits>::count; ++p) {
      const int count = fragment::lane_words<Format::bits>(p);
      const index_t first =
          fragment::tile_word<Format::bits>(e_, p, n_tile, k / tile_columns) + lane * count;
      for (int i = 0; i < count; ++i) words[next++] = q_.code_words()[first + i];
    }
    qeft::unroll<unpack::steps>([&](auto step) {
      const index_t column = k + step * fragment::step_columns;
      if (column >= e_.dense) return;
      const index_t at = fragment::params_lane(e_, n_tile * 16 + lane / 4, view_.group_of(column));
      std::uint32_t zeros = 0;
      if (Format::zero == zero_kind::scaled) zeros = word(q_.zeros().data(), at);
      if (Format::zero == zero_kind::integer) {
        const int bits = 2 * fragment::zero_width<Format::bits>;
        zeros = word(q_.zeros().data(), at * bits / 32) >> (at * bits % 32);
      }
      const dequantizer of(word(q_.scales().data(), at), zeros);
      compare(of.template step<step>(words), n_tile, column, e_.dense, lane);
    });
  }
  void check_weak(index_t n_tile, index_t j, int lane) {
    std::uint32_t words[4];
    const index_t step = n_tile * fragment::weak_steps(e_) + j / fragment::step_columns;
    for (int i = 0; i < 4; ++i) {
      words[i] = word(q_.weak().data(), (step * fragment::lanes + lane) * 4 + i);
    }
    compare(dequantizer::weak_step(words), n_tile, e_.dense + j, view_.in_channels, lane);
  }

  qeft::quantized_matrix<fragment> q_ = make();
  qeft::quantized_matrix_view<Format, qeft::weak_tail<>, fragment> view_ =
      q_.view<Format>(qeft::weak_tail<>{{35}});
  qeft::layout::extent e_ = view_.extent();
  qeft_test::sweep counted_{"weights"};
};

template <zero_kind Zero, class Scalar>
void check_widths() {
  checked_layer<qeft::quant_format<2, qeft::dynamic, Zero, Scalar>>().check();
  checked_layer<qeft::quant_format<3, qeft::dynamic, Zero, Scalar>>().check();
  checked_layer<qeft::quant_format<4, qeft::dynamic, Zero, Scalar>>().check();
  checked_layer<qeft::quant_format<8, qeft::dynamic, Zero, Scalar>>().check();
}

}  // namespace

TEST_CASE("lanes dequantise to the bits of the definition") {
  check_widths<zero_kind::symmetric, qeft::half_bits>();
  check_widths<zero_kind::integer, qeft::half_bits>();
  check_widths<zero_kind::scaled, qeft::half_bits>();
  check_widths<zero_kind::symmetric, qeft::bf16_bits>();
  check_widths<zero_kind::integer, qeft::bf16_bits>();
  check_widths<zero_kind::scaled, qeft::bf16_bits>();
}
