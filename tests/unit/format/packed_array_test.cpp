// SPDX-License-Identifier: Apache-2.0
// Laws of bit planes and packed arrays: injective, dense, and exactly `Bits` bits per code.
#include <vector>

#include "qeft/format/bit_planes.hpp"
#include "qeft/format/quant_format.hpp"
#include "support/catch.hpp"
#include "support/sweep.hpp"

using qeft::bit_planes;
using qeft::code_address;
using qeft::index_t;
using qeft::packed_array;

namespace {

template <int Bits>
void check_planes() {
  // Together the planes hold every bit of a code once, in widths that divide a word.
  unsigned covered = 0;
  int total = 0;
  for (int p = 0; p < bit_planes<Bits>::count; ++p) {
    const int width = bit_planes<Bits>::width(p);
    CHECK(32 % width == 0);
    const unsigned mask = ((1U << static_cast<unsigned>(width)) - 1U)
                          << static_cast<unsigned>(bit_planes<Bits>::shift(p));
    CHECK((covered & mask) == 0);
    covered |= mask;
    total += width;
  }
  CHECK(total == Bits);
  CHECK(covered == (1U << static_cast<unsigned>(Bits)) - 1U);
}

template <int Bits>
void check_array(index_t count, qeft_test::random_source& random) {
  using array = packed_array<Bits>;
  index_t expected_words = 0;
  for (int p = 0; p < bit_planes<Bits>::count; ++p) {
    expected_words += (count * bit_planes<Bits>::width(p) + 31) / 32;
  }
  REQUIRE(array::words(count) == expected_words);

  // Every field is inside the array and no bit belongs to two of them.
  std::vector<std::uint32_t> claimed(static_cast<std::size_t>(array::words(count)), 0);
  bool disjoint = true;
  for (int p = 0; p < bit_planes<Bits>::count; ++p) {
    for (index_t i = 0; i < count; ++i) {
      const code_address at = array::locate(p, i, count);
      const int width = bit_planes<Bits>::width(p);
      REQUIRE((at.word >= 0 && at.word < array::words(count)));
      REQUIRE((at.shift >= 0 && at.shift + width <= 32));
      const std::uint32_t mask = ((1U << static_cast<unsigned>(width)) - 1U)
                                 << static_cast<unsigned>(at.shift);
      disjoint = disjoint && (claimed[static_cast<std::size_t>(at.word)] & mask) == 0;
      claimed[static_cast<std::size_t>(at.word)] |= mask;
    }
  }
  CHECK(disjoint);

  // Writing in any order, twice, over garbage: every code reads back, and padding is not touched.
  std::vector<std::uint32_t> words(claimed.size(), 0xa5a5a5a5U);
  std::vector<unsigned> codes(static_cast<std::size_t>(count));
  const auto write = [&](index_t i) {
    codes[static_cast<std::size_t>(i)] =
        static_cast<unsigned>(random.bits()) & ((1U << static_cast<unsigned>(Bits)) - 1U);
    // Upper bits of the argument must be ignored.
    qeft::scatter_code<Bits>(words.data(), codes[static_cast<std::size_t>(i)] | 0xffff0000U,
                             [&](int p) { return array::locate(p, i, count); });
  };
  for (index_t i = count; i-- > 0;) write(i);
  for (index_t i = 0; i < count; i += 2) write(i);
  bool same = true;
  for (index_t i = 0; i < count; ++i) {
    same = same && qeft::gather_code<Bits>(words.data(), [&](int p) {
                     return array::locate(p, i, count);
                   }) == codes[static_cast<std::size_t>(i)];
  }
  CHECK(same);
  bool untouched = true;
  for (std::size_t w = 0; w < words.size(); ++w) {
    untouched = untouched && ((words[w] ^ 0xa5a5a5a5U) & ~claimed[w]) == 0;
  }
  CHECK(untouched);
}

}  // namespace

TEST_CASE("bit planes partition a code") {
  check_planes<2>();
  check_planes<3>();
  check_planes<4>();
  check_planes<8>();
}

TEST_CASE("packed arrays are injective, exact in size and round-trip") {
  qeft_test::random_source random(1);
  qeft_test::sweep counted("counts");
  for (const index_t count : {1,  2,  3,  4,  5,   7,   8,   15,  16,   17,   31,   32,
                              33, 63, 64, 65, 127, 128, 560, 576, 1536, 4304, 10944}) {
    check_array<2>(count, random);
    check_array<3>(count, random);
    check_array<4>(count, random);
    check_array<8>(count, random);
    counted.ran();
  }
  CHECK(packed_array<3>::words(0) == 0);
}

TEST_CASE("a packed array is a little-endian bit string per plane") {
  // Golden words: files hold them.
  const std::vector<unsigned> codes = {5, 2, 7, 1};
  std::uint32_t words[2] = {0, 0};
  for (index_t i = 0; i < 4; ++i) {
    qeft::scatter_code<3>(words, codes[static_cast<std::size_t>(i)],
                          [&](int p) { return packed_array<3>::locate(p, i, 4); });
  }
  CHECK(words[0] == 0b01'11'10'01U);  // low two bits, first code lowest
  CHECK(words[1] == 0b0101U);         // third bits
}

TEST_CASE("supported widths") {
  for (int bits = -1; bits <= 16; ++bits) {
    CHECK(qeft::is_supported_bits(bits) == (bits == 2 || bits == 3 || bits == 4 || bits == 8));
  }
}
