// SPDX-License-Identifier: Apache-2.0
// Laws every layout obeys: injective maps, inside the sizes it declares.
#include <vector>

#include "qeft/layout/row_packed.hpp"
#include "qeft/layout/simd_tile.hpp"
#include "support/catch.hpp"
#include "support/sweep.hpp"

using qeft::code_address;
using qeft::index_t;
using qeft::layout::extent;
using qeft::layout::row_packed;
using qeft::layout::simd_tile;

namespace {

template <class Layout, int Bits>
void check_codes(const extent& e) {
  const index_t words = Layout::template code_words<Bits>(e);
  std::vector<std::uint32_t> claimed(static_cast<std::size_t>(words), 0);
  bool inside = true;
  bool disjoint = true;
  for (int p = 0; p < qeft::bit_planes<Bits>::count; ++p) {
    const int width = qeft::bit_planes<Bits>::width(p);
    for (index_t n = 0; n < e.out_channels; ++n) {
      for (index_t k = 0; k < e.dense; ++k) {
        const code_address at = Layout::template locate<Bits>(e, p, n, k);
        inside =
            inside && at.word >= 0 && at.word < words && at.shift >= 0 && at.shift + width <= 32;
        if (!inside) break;
        const std::uint32_t mask = ((1U << static_cast<unsigned>(width)) - 1U)
                                   << static_cast<unsigned>(at.shift);
        disjoint = disjoint && (claimed[static_cast<std::size_t>(at.word)] & mask) == 0;
        claimed[static_cast<std::size_t>(at.word)] |= mask;
      }
    }
  }
  CHECK(inside);
  CHECK(disjoint);
}

template <class Map>
void check_index(index_t size, index_t rows, index_t columns, const Map& map) {
  std::vector<bool> seen(static_cast<std::size_t>(size), false);
  bool injective = true;
  for (index_t n = 0; n < rows; ++n) {
    for (index_t c = 0; c < columns; ++c) {
      const index_t at = map(n, c);
      injective = injective && at >= 0 && at < size && !seen[static_cast<std::size_t>(at)];
      if (!injective) break;
      seen[static_cast<std::size_t>(at)] = true;
    }
  }
  CHECK(injective);
}

template <class Layout>
void check_layout() {
  qeft_test::sweep counted(Layout::name);
  for (const index_t oc : {1, 2, 31, 32, 33, 64, 97}) {
    const index_t rows = Layout::padded_rows(oc);
    CHECK(rows >= oc);
    for (const index_t dense : {0, 1, 15, 16, 17, 31, 32, 33, 48, 64, 129, 560}) {
      for (const index_t weak : {0, 1, 16, 33}) {
        const extent e{oc, dense, qeft::ceil_div(dense, 32), weak};
        check_codes<Layout, 2>(e);
        check_codes<Layout, 3>(e);
        check_codes<Layout, 4>(e);
        check_codes<Layout, 8>(e);
        check_index(rows * e.groups, oc, e.groups,
                    [&](index_t n, index_t g) { return Layout::param_index(e, n, g); });
        check_index(rows * e.weak, oc, e.weak,
                    [&](index_t n, index_t j) { return Layout::weak_index(e, n, j); });
        counted.ran();
      }
    }
  }
}

template <int Bits>
void check_row_packed_rows() {
  const extent e{5, 100, 1, 0};
  for (int p = 0; p < qeft::bit_planes<Bits>::count; ++p) {
    for (index_t n = 0; n < e.out_channels; ++n) {
      for (index_t k = 0; k < e.dense; ++k) {
        const code_address at = row_packed::locate<Bits>(e, p, n, k);
        const code_address in_row = qeft::packed_array<Bits>::locate(p, k, e.dense);
        REQUIRE(at.word == n * qeft::packed_array<Bits>::words(e.dense) + in_row.word);
        REQUIRE(at.shift == in_row.shift);
      }
    }
  }
}

}  // namespace

TEST_CASE("row_packed is injective and stays inside its words") { check_layout<row_packed>(); }

TEST_CASE("simd_tile is injective and stays inside its words") { check_layout<simd_tile>(); }

TEST_CASE("row_packed rows are packed arrays one after another") {
  check_row_packed_rows<2>();
  check_row_packed_rows<3>();
  check_row_packed_rows<4>();
  check_row_packed_rows<8>();
}

TEST_CASE("simd_tile puts 32 output channels side by side") {
  const extent e{70, 100, 4, 3};
  CHECK(simd_tile::padded_rows(70) == 96);
  CHECK(simd_tile::code_words<4>(e) == 3 * 4 * 128);
  for (index_t n = 0; n < 31; ++n) {  // neighbouring rows are neighbouring words
    const code_address a = simd_tile::locate<4>(e, 0, n, 57);
    const code_address b = simd_tile::locate<4>(e, 0, n + 1, 57);
    CHECK(b.word == a.word + 1);
    CHECK(b.shift == a.shift);
    CHECK(simd_tile::param_index(e, n + 1, 2) == simd_tile::param_index(e, n, 2) + 1);
    CHECK(simd_tile::weak_index(e, n + 1, 2) == simd_tile::weak_index(e, n, 2) + 1);
  }
  // A word of 4-bit codes holds 8 consecutive columns, lowest bits first.
  for (index_t k = 0; k < 100; ++k) {
    const code_address at = simd_tile::locate<4>(e, 0, 33, k);
    CHECK(at.shift == 4 * (k % 8));
    CHECK(at.word == (1 * 4 + k / 32) * 128 + k % 32 / 8 * 32 + 1);
  }
  // 3 bits: column c of the high plane shares the position of a pair of the low plane.
  for (index_t c = 0; c < 32; ++c) {
    const code_address low = simd_tile::locate<3>(e, 0, 0, c);
    const code_address high = simd_tile::locate<3>(e, 1, 0, c);
    CHECK(low.word == 32 * (c / 16));
    CHECK(high.word == 64);
    CHECK(high.shift == low.shift + c / 16);
  }
}
