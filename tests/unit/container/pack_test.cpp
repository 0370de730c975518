// SPDX-License-Identifier: Apache-2.0
// pack_array and unpack_array against the element-wise definition of a packed_array.
#include "qeft/container/pack.hpp"
#include "qeft/container/visit.hpp"

#include <random>
#include <vector>

#include "support/catch.hpp"

TEST_CASE("pack_array writes what scatter_code writes, and unpack_array reads it back") {
  std::mt19937 rng(2);
  for (const int run_time_bits : {2, 3, 4, 8}) {
    qeft::visit_bits(run_time_bits, [&](auto bits) {
      using array = qeft::packed_array<bits>;
      for (const qeft::index_t count : {0, 1, 3, 4, 15, 16, 31, 32, 33, 100, 128, 560}) {
        std::vector<std::uint8_t> codes(static_cast<std::size_t>(count));
        for (auto& c : codes) c = static_cast<std::uint8_t>(rng());  // upper bits must be ignored
        const auto words = static_cast<std::size_t>(array::words(count));
        std::vector<std::uint32_t> expected(words, 0U);
        for (qeft::index_t i = 0; i < count; ++i) {
          qeft::scatter_code<bits>(expected.data(), codes[static_cast<std::size_t>(i)],
                                   [&](int p) { return array::locate(p, i, count); });
        }
        std::vector<std::uint32_t> packed(words, 0xffffffffU);
        qeft::pack_array<bits>(codes.data(), count, packed.data());
        REQUIRE(packed == expected);

        std::vector<std::uint8_t> unpacked(codes.size(), 0xffU);
        qeft::unpack_array<bits>(packed.data(), count, unpacked.data());
        for (std::size_t i = 0; i < codes.size(); ++i) {
          REQUIRE(unpacked[i] == (codes[i] & ((1U << static_cast<unsigned>(bits)) - 1U)));
        }
      }
    });
  }
}
