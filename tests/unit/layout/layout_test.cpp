// SPDX-License-Identifier: Apache-2.0
// Laws every layout obeys, what the library's own look like, and a layout of a user's.
#include <vector>

#include "qeft/container/repack.hpp"
#include "qeft/layout/fragment.hpp"
#include "support/cases.hpp"
#include "support/interleaved_layout.hpp"
#include "support/layout_laws.hpp"
#include "support/sweep.hpp"
#include "support/tall_layout.hpp"

using qeft::code_address;
using qeft::index_t;
using qeft::layout::extent;
using qeft::layout::fragment;
using qeft::layout::row_packed;
using qeft::layout::simd_tile;

namespace {

template <int Bits>
void check_row_packed_rows() {
  const extent e{5, 100, 1, 0};
  for (int p = 0; p < qeft::bit_planes<Bits>::count; ++p) {
    for (index_t n = 0; n < e.out_channels; ++n) {
      for (index_t k = 0; k < e.dense; ++k) {
        const code_address at = qeft::layout::locate<row_packed, Bits>(e, p, n, k);
        const code_address in_row = qeft::packed_array<Bits>::locate(p, k, e.dense);
        REQUIRE(at.word == n * qeft::packed_array<Bits>::words(e.dense) + in_row.word);
        REQUIRE(at.shift == in_row.shift);
      }
    }
  }
}

}  // namespace

TEST_CASE("row_packed is injective and stays inside its words") {
  qeft_test::check_layout_laws<row_packed>();
}

TEST_CASE("simd_tile is injective and stays inside its words") {
  qeft_test::check_layout_laws<simd_tile>();
}

TEST_CASE("fragment is injective and stays inside its words") {
  qeft_test::check_layout_laws<fragment>();
}

TEST_CASE("fragment holds operands of mma.m16n8k16") {
  // As the PTX manual draws A: a lane's four registers, two elements in each.
  for (int lane = 0; lane < 32; ++lane) {
    for (int reg = 0; reg < 4; ++reg) {
      for (int half = 0; half < 2; ++half) {
        const auto at =
            fragment::operand(lane / 4 + 8 * (reg % 2), lane % 4 * 2 + 8 * (reg / 2) + half);
        CHECK((at.lane == lane && at.reg == reg && at.half == half));
      }
    }
  }
  // 4 bits: 16 bytes per lane are its operands of four k-steps, a word each.
  const extent e{40, 200, 2, 20};
  for (index_t n = 16; n < 32; ++n) {
    for (index_t k = 64; k < 128; ++k) {
      const code_address at = qeft::layout::locate<fragment, 4>(e, 0, n, k);
      const auto in = fragment::operand(static_cast<int>(n % 16), static_cast<int>(k % 16));
      CHECK(at.word == (1 * 4 + 1) * 128 + in.lane * 4 + k % 64 / 16);
      CHECK(at.shift == 4 * in.reg + 16 * in.half);
    }
  }
  // The scales of rows r and r + 8 and four groups are the words of 32 lanes, in their order.
  const extent f{40, 640, 5, 20};
  CHECK(fragment::scale_count(f) == 3 * 2 * 64);
  CHECK(fragment::zero_words<4>(f) == 3 * 2 * 8);
  for (int lane = 0; lane < 32; ++lane) {
    const index_t n = 16 + lane / 4;
    const index_t g = lane % 4;
    CHECK(fragment::scale_index(f, n, g) == (2 * 32 + lane) * 2);
    CHECK(fragment::scale_index(f, n + 8, g) == (2 * 32 + lane) * 2 + 1);
    const code_address zero = fragment::locate_zero<4>(f, 0, n, g);
    CHECK(32 * zero.word + zero.shift == (2 * 32 + lane) * 8);
  }
  // 20 weak columns are two k-steps, the second one padded.
  CHECK(fragment::weak_count(f) == 3 * 2 * 256);
}

TEST_CASE("fragment is repacked like any layout") {
  const qeft::on_host exec(2);
  qeft_test::fuzz("fragment", 300, [&](std::uint64_t seed) {
    qeft_test::random_source random(seed);
    const auto layer = qeft_test::random_case(random, 20000);
    INFO(qeft_test::describe(layer.d));
    const auto rows = qeft_test::pack<row_packed>(layer);
    const auto packed = qeft_test::pack<fragment>(layer);
    CHECK(qeft_test::same_bytes(qeft::repack<fragment>(exec, rows), packed));
    CHECK(qeft_test::same_bytes(qeft::repack<row_packed>(exec, packed), rows));
  });
}

TEST_CASE("row_packed rows are packed arrays one after another") {
  check_row_packed_rows<2>();
  check_row_packed_rows<3>();
  check_row_packed_rows<4>();
  check_row_packed_rows<8>();
}

TEST_CASE("simd_tile puts 32 output channels side by side") {
  const extent e{70, 100, 4, 3};
  CHECK(simd_tile::scale_count(e) == 96 * 4);
  CHECK(simd_tile::weak_count(e) == 96 * 3);
  CHECK(simd_tile::code_words<4>(e) == 3 * 4 * 128);
  for (index_t n = 0; n < 31; ++n) {  // neighbouring rows are neighbouring words
    const code_address a = qeft::layout::locate<simd_tile, 4>(e, 0, n, 57);
    const code_address b = qeft::layout::locate<simd_tile, 4>(e, 0, n + 1, 57);
    CHECK(b.word == a.word + 1);
    CHECK(b.shift == a.shift);
    CHECK(simd_tile::scale_index(e, n + 1, 2) == simd_tile::scale_index(e, n, 2) + 1);
    CHECK(simd_tile::weak_index(e, n + 1, 2) == simd_tile::weak_index(e, n, 2) + 1);
  }
  // A word of 4-bit codes holds 8 consecutive columns, lowest bits first.
  for (index_t k = 0; k < 100; ++k) {
    const code_address at = qeft::layout::locate<simd_tile, 4>(e, 0, 33, k);
    CHECK(at.shift == 4 * (k % 8));
    CHECK(at.word == (1 * 4 + k / 32) * 128 + k % 32 / 8 * 32 + 1);
  }
  // 3 bits: column c of the high plane shares the position of a pair of the low plane.
  for (index_t c = 0; c < 32; ++c) {
    const code_address low = qeft::layout::locate<simd_tile, 3>(e, 0, 0, c);
    const code_address high = qeft::layout::locate<simd_tile, 3>(e, 1, 0, c);
    CHECK(low.word == 32 * (c / 16));
    CHECK(high.word == 64);
    CHECK(high.shift == low.shift + c / 16);
  }
}

TEST_CASE("simd_tile keeps the zero points of 32 rows and a group in words of their own") {
  const extent e{70, 100, 4, 3};
  CHECK(simd_tile::zero_words<3>(e) == 3 * 4 * 3);
  for (index_t n = 32; n < 64; ++n) {
    const index_t record = (1 * 4 + 2) * 3;
    const code_address low = simd_tile::locate_zero<3>(e, 0, n, 2);
    const code_address high = simd_tile::locate_zero<3>(e, 1, n, 2);
    CHECK(low.word == record + (n - 32) / 16);
    CHECK(low.shift == 2 * (n % 16));
    CHECK(high.word == record + 2);
    CHECK(high.shift == n - 32);
  }
}

TEST_CASE("a layout of a user's obeys the laws and is repacked like the library's own") {
  using qeft_test::interleaved_layout;
  qeft_test::check_layout_laws<interleaved_layout>();
  const qeft::on_host exec(2);
  qeft_test::fuzz("interleaved", 300, [&](std::uint64_t seed) {
    qeft_test::random_source random(seed);
    const auto layer = qeft_test::random_case(random, 5000);
    INFO(qeft_test::describe(layer.d));
    const auto rows = qeft_test::pack<row_packed>(layer);
    const auto packed = qeft_test::pack<interleaved_layout>(layer);
    CHECK(qeft_test::same_bytes(qeft::repack<interleaved_layout>(exec, rows), packed));
    CHECK(qeft_test::same_bytes(qeft::repack<row_packed>(exec, packed), rows));
    CHECK(qeft_test::same_bytes(qeft::repack<simd_tile>(exec, packed),
                                qeft_test::pack<simd_tile>(layer)));
    std::vector<float> weights;
    packed.visit([&](const auto& view) {
      for (index_t n = 0; n < view.out_channels; ++n) {
        for (index_t c = 0; c < view.in_channels; ++c) weights.push_back(dequantize(view, n, c));
      }
    });
    CHECK(weights == qeft_test::weights_of(layer));
    CHECK(packed.zeros().data() == packed.scales().data());
    CHECK(qeft::storage_of<interleaved_layout>(layer.d).zeros == 0);
  });
}

TEST_CASE("tiles may have any number of rows") {
  using qeft_test::tall_layout;
  qeft_test::check_layout_laws<tall_layout>();
  const qeft::on_host exec(3);
  qeft_test::fuzz("tall", 300, [&](std::uint64_t seed) {
    qeft_test::random_source random(seed);
    const auto layer = qeft_test::random_case(random, 20000);
    INFO(qeft_test::describe(layer.d));
    const auto simd = qeft_test::pack<simd_tile>(layer);
    const auto packed = qeft_test::pack<tall_layout>(layer);
    CHECK(qeft_test::same_bytes(qeft::repack<tall_layout>(exec, simd), packed));
    CHECK(qeft_test::same_bytes(qeft::repack<simd_tile>(exec, packed), simd));
    CHECK(qeft_test::same_bytes(qeft::repack<row_packed>(exec, packed),
                                qeft_test::pack<row_packed>(layer)));
  });
}
