// SPDX-License-Identifier: Apache-2.0
// The rules of a descriptor, its exact size, and the way back to types.
#include <cstdio>
#include <string>
#include <vector>

#include "qeft/container/storage.hpp"
#include "qeft/layout/simd_tile.hpp"
#include "support/catch.hpp"
#include "support/throws.hpp"

using qeft::index_t;
using qeft::matrix_descriptor;
using qeft::weak_kind;
using qeft::zero_kind;
using qeft_test::mentions;
using qeft_test::throws_with;

namespace {

matrix_descriptor valid() {
  matrix_descriptor d;
  d.out_channels = 64;
  d.in_channels = 256;
  return d;
}

/// The text of validate(d) after `change`.
template <class Change>
std::string broken_by(const Change& change) {
  matrix_descriptor d = valid();
  REQUIRE(qeft::validate(d).ok());
  change(d);
  const qeft::status s = qeft::validate(d);
  CHECK(s.code() == qeft::errc::invalid_argument);
  return s.message();
}

/// Bytes of Llama-2 7B: the seven linears of 32 layers quantised to 4 bits with g = 128 and k =
/// 128, the rest in FP16.
index_t llama2_7b_bytes(zero_kind zero) {
  struct linear {
    index_t out, in, count;
  };
  const index_t layers = 32, hidden = 4096, intermediate = 11008, vocabulary = 32000;
  index_t bytes = 0;
  for (const linear l : {linear{hidden, hidden, 4}, linear{intermediate, hidden, 2},
                         linear{hidden, intermediate, 1}}) {
    matrix_descriptor d;
    d.out_channels = l.out;
    d.in_channels = l.in;
    d.zero = zero;
    d.weak = weak_kind::tail;
    d.weak_columns = 128;
    bytes += layers * l.count * qeft::storage_of(d).total();
  }
  const index_t embedding_and_head = 2 * vocabulary * hidden;
  const index_t norms = (2 * layers + 1) * hidden;
  return bytes + 2 * (embedding_and_head + norms);
}

}  // namespace

TEST_CASE("validate names the field, its value and the rule") {
  using d_t = matrix_descriptor;
  CHECK(
      mentions(broken_by([](d_t& d) { d.out_channels = 0; }), {"out_channels is 0", "[1, 2^30]"}));
  CHECK(mentions(broken_by([](d_t& d) { d.out_channels = (1 << 30) + 1; }),
                 {"out_channels is 1073741825"}));
  CHECK(
      mentions(broken_by([](d_t& d) { d.in_channels = -5; }), {"in_channels is -5", "[1, 2^30]"}));
  CHECK(mentions(broken_by([](d_t& d) { d.in_channels = index_t{1} << 31; }),
                 {"in_channels is 2147483648"}));
  for (const int bits : {-1, 0, 1, 5, 6, 7, 16}) {
    CHECK(mentions(broken_by([=](d_t& d) { d.bits = bits; }),
                   {"bits is", std::to_string(bits).c_str(), "2, 3, 4 or 8"}));
  }
  for (const index_t g : {0, -2, 16, 48, 129}) {
    CHECK(mentions(broken_by([=](d_t& d) { d.group_size = g; }),
                   {"group_size is", std::to_string(g).c_str(), "multiple of 32"}));
  }
  CHECK(mentions(broken_by([](d_t& d) { d.group_size = index_t{1} << 40; }), {"group_size is"}));
  CHECK(mentions(broken_by([](d_t& d) { d.zero = static_cast<zero_kind>(3); }), {"zero is 3"}));
  CHECK(mentions(broken_by([](d_t& d) { d.scalar = static_cast<qeft::scalar_kind>(2); }),
                 {"scalar is 2"}));
  CHECK(mentions(broken_by([](d_t& d) { d.weak = static_cast<weak_kind>(4); }), {"weak is 4"}));
  CHECK(mentions(broken_by([](d_t& d) { d.weak = weak_kind::tail, d.weak_columns = -1; }),
                 {"weak_columns is -1", "in_channels = 256"}));
  CHECK(mentions(broken_by([](d_t& d) { d.weak = weak_kind::tail, d.weak_columns = 257; }),
                 {"weak_columns is 257", "between 0 and in_channels = 256"}));
  CHECK(mentions(broken_by([](d_t& d) { d.weak_columns = 16; }),
                 {"weak_columns is 16", "0 when weak is none"}));
  CHECK(
      mentions(broken_by([](d_t& d) { d.heads = 2; }), {"heads is 2", "unless weak is per_head"}));
  const auto per_head = [](index_t heads, index_t k) {
    return [=](d_t& d) { d.weak = weak_kind::per_head, d.heads = heads, d.weak_columns = k; };
  };
  CHECK(mentions(broken_by(per_head(0, 16)), {"heads is 0"}));
  CHECK(mentions(broken_by(per_head(3, 15)), {"heads is 3", "divisor of in_channels = 256"}));
  CHECK(mentions(broken_by(per_head(4, 18)), {"heads is 4", "weak_columns = 18"}));

  matrix_descriptor good = valid();
  per_head(4, 256)(good);
  CHECK(qeft::validate(good).ok());
  good.group_size = qeft::per_channel;
  CHECK(qeft::validate(good).ok());
}

TEST_CASE("dense columns and groups, the last one ragged") {
  matrix_descriptor d = valid();
  d.in_channels = 576;
  d.weak = weak_kind::tail;
  d.weak_columns = 16;
  CHECK(d.dense_columns() == 560);
  CHECK(d.groups() == 5);  // four of 128 and one of 48
  d.group_size = qeft::per_channel;
  CHECK(d.groups() == 1);
  d.weak_columns = 576;
  CHECK(d.dense_columns() == 0);
  CHECK(d.groups() == 0);
  const qeft::layout::extent e = d.extent();
  CHECK((e.out_channels == 64 && e.dense == 0 && e.groups == 0 && e.weak == 576));
}

TEST_CASE("descriptors compare by every field") {
  const matrix_descriptor d = valid();
  CHECK(d == valid());
  using d_t = matrix_descriptor;
  void (*const changes[])(d_t&) = {[](d_t& x) { x.out_channels = 1; },
                                   [](d_t& x) { x.in_channels = 1; },
                                   [](d_t& x) { x.bits = 3; },
                                   [](d_t& x) { x.group_size = 64; },
                                   [](d_t& x) { x.zero = zero_kind::scaled; },
                                   [](d_t& x) { x.scalar = qeft::scalar_kind::bf16; },
                                   [](d_t& x) { x.weak = weak_kind::tail; },
                                   [](d_t& x) { x.weak_columns = 1; },
                                   [](d_t& x) { x.heads = 2; }};
  for (const auto change : changes) {
    d_t other = d;
    change(other);
    CHECK(other != d);
    CHECK_FALSE(other == d);
  }
}

TEST_CASE("storage is exact: nothing twice, no code for a weak column") {
  matrix_descriptor d;
  d.out_channels = 4096;
  d.in_channels = 4096;
  d.weak = weak_kind::tail;
  d.weak_columns = 128;
  qeft::storage_bytes s = qeft::storage_of(d);
  CHECK(s.codes == 4096 * 3968 / 2);
  CHECK(s.scales == 4096 * 31 * 2);
  CHECK(s.zeros == 4096 * 31 / 2);
  CHECK(s.weak == 4096 * 128 * 2);
  CHECK(s.weak_index == 0);
  CHECK(s.total() == s.codes + s.scales + s.zeros + s.weak);
  // 4 bits x 3968/4096 + (16 + 4) x 31/4096 + 16 x 128/4096
  CHECK(qeft::bits_per_weight(d) == 4.0 * 3968 / 4096 + 20.0 * 31 / 4096 + 0.5);

  d.zero = zero_kind::symmetric;
  CHECK(qeft::storage_of(d).zeros == 0);
  d.zero = zero_kind::scaled;
  CHECK(qeft::storage_of(d).zeros == 4096 * 31 * 2);
  d.weak = weak_kind::indexed;
  CHECK(qeft::storage_of(d).weak_index == 128 * 4);
  d.bits = 3;
  CHECK(qeft::storage_of(d).codes == 4096 * 3968 * 3 / 8);
  d.group_size = qeft::per_channel;
  CHECK(qeft::storage_of(d).scales == 4096 * 2);

  // Only rows that do not fill a word, and rows that do not fill a tile, are padded.
  d = matrix_descriptor{};
  d.out_channels = 33;
  d.in_channels = 9;
  CHECK(qeft::storage_of(d).codes == 33 * 8);
  CHECK(qeft::storage_of(d).zeros == 20);  // 33 x 4 bits
  CHECK(qeft::storage_of<qeft::layout::simd_tile>(d).codes == 2 * 32 * 32 / 2);
  CHECK(qeft::storage_of<qeft::layout::simd_tile>(d).scales == 2 * 32 * 2);
}

TEST_CASE("Llama-2 7B with k = 128, g = 128 takes at most 4029 MiB") {
  const auto mib = [](zero_kind zero) {
    return static_cast<double>(llama2_7b_bytes(zero)) / (1024.0 * 1024.0);
  };
  std::printf(
      "Llama-2 7B, 4 bits, k = 128, g = 128: %.2f MiB with integer zeros, %.2f MiB with "
      "scaled zeros\n",
      mib(zero_kind::integer), mib(zero_kind::scaled));
  CHECK(mib(zero_kind::integer) <= 4029.0);
  CHECK(mib(zero_kind::scaled) <= 4029.0);
  CHECK(mib(zero_kind::integer) < mib(zero_kind::scaled));
  CHECK(mib(zero_kind::integer) > 3500.0);  // the formula has not lost a part
}

TEST_CASE("visit_format finds the type of every supported format") {
  int visited = 0;
  for (const int bits : {2, 3, 4, 8}) {
    for (const auto zero : {zero_kind::symmetric, zero_kind::integer, zero_kind::scaled}) {
      for (const auto scalar : {qeft::scalar_kind::half, qeft::scalar_kind::bf16}) {
        matrix_descriptor d = valid();
        d.bits = bits;
        d.zero = zero;
        d.scalar = scalar;
        qeft::visit_format(d, [&](auto format) {
          using format_t = decltype(format);
          CHECK(format_t::bits == bits);
          CHECK(format_t::zero == zero);
          CHECK(qeft::scalar_kind_of<typename format_t::scalar_type>::value == scalar);
          ++visited;
        });
      }
    }
  }
  CHECK(visited == 24);
}

TEST_CASE("visit_format of an own list: the first fit, or an error that lists the choices") {
  using formats = qeft::format_list<qeft::quant_format<4, 128>, qeft::quant_format<4>,
                                    qeft::quant_format<3, 64, zero_kind::scaled, qeft::bf16_bits>>;
  matrix_descriptor d = valid();
  index_t group = 0;
  const auto note = [&](auto format) { group = decltype(format)::group_size; };
  qeft::visit_format<formats>(d, note);
  CHECK(group == 128);
  d.group_size = 64;
  qeft::visit_format<formats>(d, note);
  CHECK(group == qeft::dynamic);

  d.bits = 2;
  CHECK(throws_with(qeft::errc::unsupported,
                    {"2-bit/integer/f16/g=64", "built in are:", "4-bit/integer/f16/g=128",
                     "4-bit/integer/f16/g=any", "3-bit/scaled/bf16/g=64"},
                    [&] { qeft::visit_format<formats>(d, note); }));
  d.bits = 3;
  d.zero = zero_kind::scaled;
  CHECK(throws_with(qeft::errc::unsupported, {"3-bit/scaled/f16"},
                    [&] { qeft::visit_format<formats>(d, note); }));
  d.scalar = qeft::scalar_kind::bf16;
  d.group_size = 32;
  CHECK(throws_with(qeft::errc::unsupported, {"g=32 is not built in"},
                    [&] { qeft::visit_format<formats>(d, note); }));
}

TEST_CASE("visit_weak gives the policy of the descriptor") {
  const std::int32_t index[] = {3, 5};
  matrix_descriptor d = valid();
  for (const auto kind :
       {weak_kind::none, weak_kind::tail, weak_kind::indexed, weak_kind::per_head}) {
    d.weak = kind;
    d.weak_columns = kind == weak_kind::none ? 0 : 2;
    d.heads = kind == weak_kind::per_head ? 2 : 1;
    index_t first = -2;
    qeft::visit_weak(d, index, [&](auto weak) {
      CHECK(decltype(weak)::kind == kind);
      CHECK(weak.count() == d.weak_columns);
      if (d.weak_columns > 0) first = weak.weak_column(0, d.in_channels);
    });
    const index_t expected[] = {-2, 254, 3, 127};
    CHECK(first == expected[static_cast<int>(kind)]);
  }
}

TEST_CASE("visit_bits") {
  for (const int bits : {2, 3, 4, 8}) {
    int got = 0;
    qeft::visit_bits(bits, [&](auto b) { got = b; });
    CHECK(got == bits);
  }
}

TEST_CASE("names of kinds") {
  CHECK(std::string(to_string(zero_kind::symmetric)) == "symmetric");
  CHECK(std::string(to_string(zero_kind::integer)) == "integer");
  CHECK(std::string(to_string(zero_kind::scaled)) == "scaled");
  CHECK(std::string(to_string(static_cast<zero_kind>(9))) == "unknown");
  CHECK(std::string(to_string(weak_kind::none)) == "none");
  CHECK(std::string(to_string(weak_kind::tail)) == "tail");
  CHECK(std::string(to_string(weak_kind::indexed)) == "indexed");
  CHECK(std::string(to_string(weak_kind::per_head)) == "per_head");
  CHECK(std::string(to_string(static_cast<weak_kind>(9))) == "unknown");
  CHECK(std::string(to_string(qeft::scalar_kind::half)) == "f16");
  CHECK(std::string(to_string(qeft::scalar_kind::bf16)) == "bf16");
}
