// SPDX-License-Identifier: Apache-2.0
#include "matmul_support.hpp"
#include "qeft/layout/row_packed.hpp"
#include "support/catch.hpp"
#include "support/throws.hpp"

namespace {

using qeft::index_t;
using qeft::layout::simd_tile;
using qeft_test::random_source;

using plain_format = qeft::quant_format<4>;

}  // namespace

TEST_CASE("gemm equals the definition for random layers") {
  const qeft::on_host one(1);
  const qeft::on_host many[] = {qeft::on_host(2), qeft::on_host(3), qeft::on_host(7)};
  qeft_test::fuzz("gemm", 2000, [&](std::uint64_t seed) {
    random_source random(seed);
    const auto layer = qeft_test::random_case(random, 6000);
    const index_t tokens = random.pick<index_t>({1, 1, 2, 3, 5, 6, 7, 12, 13});
    const auto x = qeft_test::random_activations<float>(layer, tokens, random);
    INFO(qeft_test::describe(layer.d) << ", " << tokens << " tokens");
    const auto w = qeft_test::pack<simd_tile>(layer);
    const auto reference = qeft_test::multiply(layer, x, tokens);

    std::vector<float> y(reference.y.size());
    REQUIRE(qeft::gemm(one, w, x.data(), tokens, y.data()).ok());
    CHECK(qeft_test::worst_error(y, reference) < qeft_test::exact_bound);

    // The same bits for every number of threads, and for a token on its own.
    std::vector<float> other(y.size());
    REQUIRE(qeft::gemm(many[seed % 3], w, x.data(), tokens, other.data()).ok());
    CHECK(qeft_test::same_bits(y, other));
    for (index_t t = 0; t < tokens; ++t) {
      REQUIRE(qeft::gemv(one, w, x.data() + t * layer.d.in_channels,
                         other.data() + t * layer.d.out_channels)
                  .ok());
    }
    CHECK(qeft_test::same_bits(y, other));
  });
}

TEST_CASE("gemm keeps within 1.2e-4 of the definition with outliers in the weak columns") {
  const qeft::on_host exec(2);
  qeft_test::sweep sweep("bit widths");
  for (const int bits : {2, 3, 4, 8}) {
    random_source random(static_cast<std::uint64_t>(bits));
    qeft::matrix_descriptor d;
    d.out_channels = 100;
    d.in_channels = 1536;
    d.bits = bits;
    d.weak = qeft::weak_kind::tail;
    d.weak_columns = 16;
    const auto layer = qeft_test::random_layer(d, random);
    // 200 tokens are packed in two rounds.
    const auto x = qeft_test::random_activations<float>(layer, 200, random);
    std::vector<float> y(200 * 100);
    const auto w = qeft_test::pack<simd_tile>(layer);
    REQUIRE(qeft::gemm(exec, w, x.data(), 200, y.data()).ok());
    const double error = qeft_test::relative_error(y, qeft_test::multiply(layer, x, 200).y);
    INFO(bits << " bits: relative error " << error);
    CHECK(error < 2e-6);
    sweep.ran();
  }
}

TEST_CASE("gemm takes any other layout through the definition") {
  random_source random(5);
  qeft::matrix_descriptor d;
  d.out_channels = 37;
  d.in_channels = 90;
  d.group_size = 32;
  d.weak = qeft::weak_kind::per_head;
  d.heads = 3;
  d.weak_columns = 6;
  const auto layer = qeft_test::random_layer(d, random);
  const auto x = qeft_test::random_activations<qeft::half_bits>(layer, 3, random);
  const auto w = qeft_test::pack<qeft::layout::row_packed>(layer);
  const auto view = w.view<plain_format>(qeft::weak_per_head<>{{6}, 3});
  std::vector<float> y(3 * 37);
  REQUIRE(qeft::gemm(qeft::on_host(2), view, x.data(), 3, y.data()).ok());
  const auto reference = qeft_test::multiply(layer, qeft_test::floats(x), 3);
  CHECK(qeft_test::worst_error(y, reference) < qeft_test::exact_bound);
}

TEST_CASE("gemm writes its outputs and nothing else") {
  random_source random(6);
  qeft::matrix_descriptor d;
  d.out_channels = 45;
  d.in_channels = 33;
  const auto layer = qeft_test::random_layer(d, random);
  const auto w = qeft_test::pack<simd_tile>(layer);
  for (const index_t tokens : {index_t{1}, index_t{2}, index_t{7}}) {
    const auto x = qeft_test::random_activations<float>(layer, tokens, random);
    const auto count = static_cast<std::size_t>(45 * tokens);
    std::vector<qeft::half_bits> y(count + 64, qeft::half_bits{0xabcd});
    REQUIRE(qeft::gemm(qeft::on_host(2), w, x.data(), tokens, y.data() + 32).ok());
    for (std::size_t i = 0; i < y.size(); ++i) {
      const bool outside = i < 32 || i >= 32 + count;
      CHECK((y[i] == qeft::half_bits{0xabcd}) == outside);
    }
  }
}

TEST_CASE("not-a-number reaches every output of its token and no other token") {
  random_source random(7);
  qeft::matrix_descriptor d;
  d.out_channels = 40;
  d.in_channels = 70;
  d.weak = qeft::weak_kind::tail;
  d.weak_columns = 5;
  const auto layer = qeft_test::random_layer(d, random);
  const auto matrix = qeft_test::pack<simd_tile>(layer);
  const auto w = matrix.view<plain_format>(qeft::weak_tail<>{{5}});
  const auto check = [&](const auto& exec) {
    for (const std::size_t column : {std::size_t{3}, std::size_t{69}}) {
      auto x = qeft_test::random_activations<float>(layer, 3, random);
      x[70 + column] = std::numeric_limits<float>::quiet_NaN();
      std::vector<float> y(3 * 40);
      REQUIRE(qeft::gemm(exec, w, x.data(), 3, y.data()).ok());
      for (std::size_t i = 0; i < y.size(); ++i) CHECK(std::isnan(y[i]) == (i / 40 == 1));
    }
  };
  const qeft::on_host host(1);
  check(host);
  check(qeft::cpu::with<qeft::cpu::int8>(host));
}

TEST_CASE("gemm says why it refuses") {
  const qeft::on_host exec(1);
  qeft::matrix_descriptor d;
  d.out_channels = 4;
  d.in_channels = 8;
  const qeft::quantized_matrix<simd_tile> w(d);
  const std::vector<float> x(8);
  std::vector<float> y(4, 1.0F);
  const float* no_x = nullptr;
  float* no_y = nullptr;

  const auto refused = [](const qeft::status& s, std::initializer_list<const char*> fragments) {
    return s.code() == qeft::errc::invalid_argument && qeft_test::mentions(s.message(), fragments);
  };
  CHECK(refused(qeft::gemm(exec, w, x.data(), -3, y.data()), {"tokens is -3", "negative"}));
  CHECK(refused(qeft::gemm(exec, w, no_x, 1, y.data()), {"x is null"}));
  CHECK(refused(qeft::gemv(exec, w, x.data(), no_y), {"y is null"}));
  CHECK(y == std::vector<float>(4, 1.0F));
  CHECK(qeft::gemm(exec, w, no_x, 0, no_y).ok());

  using view_type = qeft::quantized_matrix_view<plain_format, qeft::weak_tail<>, simd_tile>;
  view_type view = qeft_test::pack<simd_tile>([] {
                     qeft::matrix_descriptor tail;
                     tail.out_channels = 4;
                     tail.in_channels = 8;
                     tail.weak = qeft::weak_kind::tail;
                     tail.weak_columns = 2;
                     random_source random(1);
                     return qeft_test::random_layer(tail, random);
                   }())
                       .view<plain_format>(qeft::weak_tail<>{{2}});
  view_type broken = view;
  broken.codes = nullptr;
  CHECK(refused(qeft::supports_gemm(exec, broken, x.data(), 1, y.data()), {"no codes"}));
  broken = view;
  broken.zeros = nullptr;
  CHECK(refused(qeft::supports_gemm(exec, broken, x.data(), 1, y.data()), {"zeros"}));
  for (const index_t columns : {index_t{3}, index_t{0}, index_t{-2}}) {
    broken = view;
    broken.columns_per_group = columns;
    broken.groups = columns == 3 ? 2 : 1;
    CHECK(refused(qeft::supports_gemm(exec, broken, x.data(), 1, y.data()),
                  {"columns_per_group", "multiple of 32"}));
  }
  broken = view;
  broken.groups += 1;
  CHECK(refused(qeft::supports_gemm(exec, broken, x.data(), 1, y.data()), {"groups"}));
  broken = view;
  broken.weak_values = nullptr;
  CHECK(refused(qeft::supports_gemm(exec, broken, x.data(), 1, y.data()), {"no weak values"}));
  broken = view;
  broken.weak.k = 9;
  CHECK(refused(qeft::gemm(exec, broken, x.data(), 1, y.data()), {"4 x 8", "9 weak columns"}));

  struct only_3_bits : qeft::format_list<qeft::quant_format<3>> {};
  const qeft::status s = qeft::gemv<only_3_bits>(exec, w, x.data(), y.data());
  CHECK(s.code() == qeft::errc::unsupported);
  CHECK(qeft_test::mentions(s.message(), {"4-bit", "not built in", "3-bit"}));
}
