// SPDX-License-Identifier: Apache-2.0
// The dequantisation formula and the rules of group sizes.
#include "qeft/format/quant_format.hpp"

#include <vector>

#include "support/catch.hpp"
#include "support/sweep.hpp"

using qeft::group_params;
using qeft::quant_format;
using qeft::zero_kind;

namespace {

template <int Bits>
void check_formula() {
  using symmetric = quant_format<Bits, 128, zero_kind::symmetric>;
  using integer = quant_format<Bits, 128, zero_kind::integer>;
  using scaled = quant_format<Bits, 128, zero_kind::scaled>;
  CHECK(symmetric::max_code == (1U << static_cast<unsigned>(Bits)) - 1U);
  CHECK(symmetric::mid_code == (symmetric::max_code + 1U) / 2U);

  qeft_test::random_source random(7);
  for (int round = 0; round < 50; ++round) {
    // Scales as they are stored: FP16.
    const float s =
        qeft::to_float(qeft::from_float<qeft::half_bits>(static_cast<float>(random.real())));
    const float zs =
        qeft::to_float(qeft::from_float<qeft::half_bits>(static_cast<float>(random.real())));
    bool same = true;
    for (unsigned q = 0; q <= symmetric::max_code; ++q) {
      const auto code = static_cast<double>(q);
      const double mid = static_cast<double>(symmetric::mid_code);
      same = same && static_cast<double>(qeft::dequantize_code<symmetric>(
                         q, {s, static_cast<float>(mid)})) == s * (code - mid);
      for (unsigned z = 0; z <= symmetric::max_code; z += 3) {
        same = same && static_cast<double>(qeft::dequantize_code<integer>(
                           q, {s, static_cast<float>(z)})) == s * (code - static_cast<double>(z));
      }
      same =
          same && qeft::dequantize_code<scaled>(q, {s, zs}) ==
                      static_cast<float>(static_cast<double>(s) * code + static_cast<double>(zs));
    }
    CHECK(same);
  }
}

}  // namespace

TEST_CASE("dequantisation follows the formula of each zero kind") {
  check_formula<2>();
  check_formula<3>();
  check_formula<4>();
  check_formula<8>();
}

TEST_CASE("types that a format stores") {
  using qeft::bf16_bits;
  using qeft::half_bits;
  STATIC_REQUIRE(std::is_same_v<quant_format<4>::scalar_type, half_bits>);
  STATIC_REQUIRE(std::is_same_v<quant_format<4>::zero_type, std::uint32_t>);
  using scaled = quant_format<4, 64, zero_kind::scaled, bf16_bits>;
  STATIC_REQUIRE(std::is_same_v<scaled::zero_type, bf16_bits>);
  STATIC_REQUIRE(qeft::is_quant_format_v<scaled>);
  STATIC_REQUIRE_FALSE(qeft::is_quant_format_v<int>);
}

TEST_CASE("supported group sizes") {
  for (const qeft::index_t g : {32, 64, 96, 128, 4096, -1}) CHECK(qeft::is_supported_group_size(g));
  for (const qeft::index_t g : {0, -2, -32, 1, 31, 33, 48, 100}) {
    CHECK_FALSE(qeft::is_supported_group_size(g));
  }
}
