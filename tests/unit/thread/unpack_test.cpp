// SPDX-License-Identifier: Apache-2.0
// The operands that lanes make of layout::fragment hold q - z, for every lane, step and register.
#include <cstring>
#include <vector>

#include "qeft/core/unroll.hpp"
#include "qeft/thread/unpack.hpp"
#include "support/cases.hpp"
#include "support/catch.hpp"
#include "support/sweep.hpp"

namespace {

using qeft::index_t;
using qeft::layout::fragment;

/// The words of a lane of tile (n_tile, k_tile), as a kernel loads them.
template <int Bits>
std::vector<std::uint32_t> words_of(const qeft::quantized_matrix<fragment>& q, index_t n_tile,
                                    index_t k_tile, int lane) {
  std::vector<std::uint32_t> words;
  const qeft::layout::extent e = q.descriptor().extent();
  for (int p = 0; p < qeft::bit_planes<Bits>::count; ++p) {
    const int count = fragment::lane_words<Bits>(p);
    const std::uint32_t* first =
        q.code_words() + fragment::tile_word<Bits>(e, p, n_tile, k_tile) + lane * count;
    words.insert(words.end(), first, first + count);
  }
  return words;
}

template <int Bits, class Scalar>
void check_operands() {
  using unpack = qeft::unpack<Bits, Scalar>;
  qeft_test::sweep counted("lanes");
  qeft::matrix_descriptor d;
  d.out_channels = 37;
  d.in_channels = 300;
  d.bits = Bits;
  d.group_size = qeft::per_channel;
  qeft_test::random_source random(Bits);
  const auto layer = qeft_test::random_layer(d, random);
  const auto q = qeft_test::pack<fragment>(layer);
  const qeft::layout::extent e = d.extent();
  std::uint32_t words[unpack::words];
  for (index_t n_tile = 0; n_tile < fragment::row_tiles(e); ++n_tile) {
    for (index_t k_tile = 0; k_tile < fragment::column_tiles<Bits>(e); ++k_tile) {
      for (int lane = 0; lane < 32; ++lane) {
        const auto loaded = words_of<Bits>(q, n_tile, k_tile, lane);
        REQUIRE(loaded.size() == sizeof words / 4);
        std::memcpy(words, loaded.data(), sizeof words);
        const unsigned zeros[2] = {static_cast<unsigned>(random.bits()) & ((1U << Bits) - 1U),
                                   lane % 2 == 0 ? 0U : (1U << Bits) - 1U};
        const auto offsets = unpack::make_offsets(zeros[0], zeros[1]);
        qeft::unroll<unpack::steps>([&](auto step) {
          std::uint32_t a[4];
          unpack::template step<step>(words, offsets, a);
          for (int reg = 0; reg < 4; ++reg) {
            for (int half = 0; half < 2; ++half) {
              const index_t n = n_tile * 16 + lane / 4 + 8 * (reg % 2);
              const index_t k = k_tile * fragment::columns<Bits> + step * 16 + lane % 4 * 2 +
                                8 * (reg / 2) + half;
              const bool inside = n < d.out_channels && k < d.in_channels;
              const auto code =
                  inside ? static_cast<int>(
                               layer.codes[static_cast<std::size_t>(n * d.in_channels + k)])
                         : 0;
              const Scalar got{static_cast<std::uint16_t>(a[reg] >> (16 * half))};
              if (to_float(got) != static_cast<float>(code - static_cast<int>(zeros[reg % 2]))) {
                FAIL("lane " << lane << ", step " << step << ", register " << reg << ", half "
                             << half << ": " << to_float(got) << " for " << code << " - "
                             << zeros[reg % 2]);
              }
              counted.ran();
            }
          }
        });
      }
    }
  }
}

}  // namespace

TEST_CASE("lanes unpack q - z exactly") {
  check_operands<2, qeft::half_bits>();
  check_operands<3, qeft::half_bits>();
  check_operands<4, qeft::half_bits>();
  check_operands<8, qeft::half_bits>();
  check_operands<2, qeft::bf16_bits>();
  check_operands<3, qeft::bf16_bits>();
  check_operands<4, qeft::bf16_bits>();
  check_operands<8, qeft::bf16_bits>();
}
