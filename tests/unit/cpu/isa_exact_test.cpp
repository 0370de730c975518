// SPDX-License-Identifier: Apache-2.0
#include "isa_cases.hpp"
#include "support/catch.hpp"

namespace {

using qeft::index_t;

template <class T>
std::vector<T> rounded(const std::vector<float>& x) {
  std::vector<T> r;
  for (const float v : x) r.push_back(qeft::from_float<T>(v));
  return r;
}

}  // namespace

TEST_CASE("every instruction set computes the exact product") {
  qeft_test::sweep sweep("instruction sets");
  qeft_test::for_each_isa_case([&](const auto& c) {
    qeft_test::random_source random(9);
    const index_t tokens = 14;  // a full block of tokens and a part of one
    const auto x = qeft_test::random_activations<float>(c.layer, tokens, random);
    const auto reference = qeft_test::multiply(c.layer, x, tokens);
    qeft_test::for_each_isa([&](auto isa) {
      INFO(isa.name << ": " << qeft_test::describe(c.layer.d));
      const auto y = qeft_test::product<float>(c, x, tokens, qeft::cpu::exact{}, isa);
      CHECK(qeft_test::worst_error(y, reference) < qeft_test::exact_bound);
      sweep.ran();
    });
  });
}

TEST_CASE("exact is as precise for tiny activations") {
  qeft_test::for_each_isa_case([&](const auto& c) {
    qeft_test::random_source random(14);
    auto x = qeft_test::random_activations<float>(c.layer, 14, random);
    for (std::size_t i = 0; i < x.size(); ++i) x[i] *= i < x.size() / 2 ? 1e-36F : 1e-38F;
    const auto reference = qeft_test::multiply(c.layer, x, 14);
    qeft_test::for_each_isa([&](auto isa) {
      INFO(isa.name << ": " << qeft_test::describe(c.layer.d));
      const auto y = qeft_test::product<float>(c, x, 14, qeft::cpu::exact{}, isa);
      for (std::size_t i = 0; i < y.size(); ++i) {
        const double error = std::abs(static_cast<double>(y[i]) - reference.y[i]);
        // Outputs below the normal range are rounded to multiples of 2^-149, once per chunk.
        CHECK(error <= qeft_test::exact_bound * reference.magnitude[i] + 1e-44);
      }
    });
  });
}

TEST_CASE("FP16 outputs are the product rounded once, outliers of 60 times included") {
  const qeft_test::isa_case<qeft::quant_format<4>> c(70, 128, 15);
  qeft_test::random_source random(15);
  const auto x = qeft_test::random_activations<qeft::half_bits>(c.layer, 3, random);
  const auto reference = qeft_test::multiply(c.layer, qeft_test::floats(x), 3);
  qeft_test::for_each_isa([&](auto isa) {
    INFO(isa.name);
    const auto y = qeft_test::product<qeft::half_bits>(c, x, 3, qeft::cpu::exact{}, isa);
    for (std::size_t i = 0; i < y.size(); ++i) {
      const double error = std::abs(static_cast<double>(qeft::to_float(y[i])) - reference.y[i]);
      CHECK(error <= std::ldexp(std::abs(reference.y[i]), -11) +
                         std::ldexp(8.0 * reference.magnitude[i], -24));
    }
  });
}

TEST_CASE("16-bit activations and outputs are conversions of FP32 ones") {
  qeft_test::sweep sweep("instruction sets");
  const qeft_test::isa_case<qeft::quant_format<4>> c(70, 128, 1);
  qeft_test::random_source random(10);
  const auto x = qeft_test::random_activations<float>(c.layer, 3, random);
  qeft_test::for_each_isa([&](auto isa) {
    INFO(isa.name);
    const auto half = rounded<qeft::half_bits>(x);
    const auto of_half =
        qeft_test::product<float>(c, qeft_test::floats(half), 3, qeft::cpu::exact{}, isa);
    CHECK(qeft_test::same_bits(qeft_test::product<float>(c, half, 3, qeft::cpu::exact{}, isa),
                               of_half));
    CHECK(qeft_test::same_bits(
        qeft_test::product<qeft::half_bits>(c, half, 3, qeft::cpu::exact{}, isa),
        rounded<qeft::half_bits>(of_half)));

    const auto brain = rounded<qeft::bf16_bits>(x);
    const auto of_brain =
        qeft_test::product<float>(c, qeft_test::floats(brain), 3, qeft::cpu::exact{}, isa);
    CHECK(qeft_test::same_bits(qeft_test::product<float>(c, brain, 3, qeft::cpu::exact{}, isa),
                               of_brain));
    CHECK(qeft_test::same_bits(
        qeft_test::product<qeft::bf16_bits>(c, brain, 3, qeft::cpu::exact{}, isa),
        rounded<qeft::bf16_bits>(of_brain)));
    sweep.ran();
  });
}
