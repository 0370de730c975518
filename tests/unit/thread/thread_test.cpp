// SPDX-License-Identifier: Apache-2.0
#include <array>
#include <vector>

#include "qeft/core/on_host.hpp"
#include "qeft/cpu/tile_fields.hpp"
#include "qeft/cpu/vectors.hpp"
#include "qeft/thread/activation_order.hpp"
#include "qeft/thread/dot.hpp"
#include "qeft/thread/group.hpp"
#include "support/cases.hpp"
#include "support/catch.hpp"

namespace {

using qeft::index_t;
using qeft_test::random_source;

/// One lane of a warp, without the means to combine: the test adds up the lanes.
template <index_t Size>
struct lane_probe {
  index_t lane;

  index_t rank() const { return lane; }
  index_t size() const { return Size; }
};

template <int Bits>
struct tile_row {
  std::array<unsigned, 32> codes;
  std::uint32_t words[static_cast<std::size_t>(Bits)];
};

/// 32 codes of one row, placed by the definition of simd_tile.
template <int Bits>
tile_row<Bits> random_row(random_source& random) {
  tile_row<Bits> row{};
  for (int c = 0; c < 32; ++c) {
    unsigned& code = row.codes[static_cast<std::size_t>(c)];
    code = static_cast<unsigned>(random.bits()) & ((1U << Bits) - 1U);
    qeft::scatter_code<Bits>(row.words, code, [&](int p) {
      const int first = qeft::bit_planes<Bits>::shift(p);
      const auto in = qeft::layout::simd_tile::locate_in_tile<Bits>(p, 0, c);
      return qeft::code_address{first + in.word / 32, in.shift};
    });
  }
  return row;
}

template <int Bits, int W>
std::uint32_t joined(const tile_row<Bits>& row) {
  using fields = qeft::cpu::tile_fields<Bits>;
  return fields::template join<W>(row.words[fields::low_word(W)], row.words[fields::high_word(W)]);
}

template <int Bits>
void check_fields() {
  using fields = qeft::cpu::tile_fields<Bits>;
  random_source random(Bits);
  for (int repeat = 0; repeat < 50; ++repeat) {
    const auto row = random_row<Bits>(random);
    qeft::cpu::detail::unroll<32>([&](auto c) {
      constexpr auto word = static_cast<int>(fields::locate(c).word);
      const std::uint32_t isolated = fields::template isolate<c>(joined<Bits, word>(row));
      const std::uint64_t code = row.codes[static_cast<std::size_t>(c)];
      CHECK(isolated == code << static_cast<unsigned>(fields::exponent(c)));
      CHECK(isolated < 0x80000000U);  // converts as a signed integer
      CHECK(fields::column(word, fields::locate(c).shift / fields::distance) == c);
    });
    std::array<unsigned, 32> from_quads{};
    qeft::cpu::detail::unroll<fields::quads>([&](auto q) {
      const std::uint32_t word = joined<Bits, fields::quad_word(q)>(row);
      qeft::cpu::detail::unroll<fields::halves>([&](auto half) {
        const std::uint32_t quad = fields::template isolate_quad<q, half>(word);
        for (int b = 0; b < 4; ++b) {
          const unsigned byte = (quad >> (8 * b)) & 0xffU;
          CHECK(byte < 16);
          from_quads[static_cast<std::size_t>(fields::quad_column(q, b))] |= byte << (4 * half);
        }
      });
    });
    CHECK(from_quads == row.codes);
  }
}

template <class Weak>
void check_activation_columns(const Weak& weak, index_t in_channels) {
  std::vector<bool> seen(static_cast<std::size_t>(in_channels), false);
  const index_t dense = in_channels - weak.count();
  for (index_t slot = 0; slot < in_channels; ++slot) {
    const index_t column = activation_column(weak, slot, in_channels);
    const qeft::column_location at = weak.locate(column, in_channels);
    CHECK(at.is_weak == (slot >= dense));
    CHECK(at.index == (at.is_weak ? slot - dense : slot));
    CHECK_FALSE(seen[static_cast<std::size_t>(column)]);
    seen[static_cast<std::size_t>(column)] = true;
  }
}

}  // namespace

TEST_CASE("fields of a tile's row are its codes, for every width") {
  check_fields<2>();
  check_fields<3>();
  check_fields<4>();
  check_fields<8>();
}

TEST_CASE("activation columns list the dense columns, then the weak ones") {
  const std::int32_t index[] = {0, 3, 4, 11};
  check_activation_columns(qeft::weak_none{}, 12);
  check_activation_columns(qeft::weak_tail<>{{5}}, 12);
  check_activation_columns(qeft::weak_tail<12>{}, 12);
  check_activation_columns(qeft::weak_indexed<>{{4}, index}, 12);
  check_activation_columns(qeft::weak_indexed<>{{0}, nullptr}, 12);
  check_activation_columns(qeft::weak_per_head<>{{6}, 3}, 12);
  check_activation_columns(qeft::weak_per_head<>{{12}, 3}, 12);
}

TEST_CASE("the lanes of a row's dot product take every column exactly once") {
  using format = qeft::quant_format<3>;
  qeft::matrix_descriptor d;
  d.out_channels = 3;
  d.in_channels = 75;
  d.bits = 3;
  d.group_size = 32;
  d.weak = qeft::weak_kind::indexed;
  d.weak_columns = 7;
  random_source random(1);
  const auto layer = qeft_test::random_layer(d, random);
  const auto matrix = qeft_test::pack<qeft::layout::simd_tile>(layer);
  const auto w = matrix.view<format>(qeft::weak_indexed<>{{7}, matrix.weak_index().data()});
  const auto weights = qeft_test::weights_of(layer);
  std::vector<qeft::half_bits> x(75);
  for (index_t n = 0; n < 3; ++n) {
    for (std::size_t column = 0; column < 75; ++column) {
      x[column] = qeft::from_float<qeft::half_bits>(1.0F);
      float sum = 0.0F;
      for (index_t lane = 0; lane < 32; ++lane) {
        sum += row_dot_partial(w, n, x.data(), lane_probe<32>{lane});
      }
      CHECK(sum == weights[static_cast<std::size_t>(n) * 75 + column]);
      CHECK(row_dot(w, n, x.data(), qeft::serial_group{}) == sum);
      x[column] = qeft::from_float<qeft::half_bits>(0.0F);
    }
  }
}
