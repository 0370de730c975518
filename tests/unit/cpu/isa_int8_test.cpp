// SPDX-License-Identifier: Apache-2.0
#include <algorithm>

#include "isa_cases.hpp"
#include "support/catch.hpp"

using qeft::index_t;

TEST_CASE("int8 is exact for activations that 8 bits hold") {
  qeft_test::sweep sweep("instruction sets");
  qeft_test::for_each_isa_case([&](const auto& c) {
    qeft_test::random_source random(11);
    const index_t tokens = 14;
    std::vector<float> x(static_cast<std::size_t>(tokens * c.layer.d.in_channels));
    // Multiples of 1/64 up to 127/64 in size. Chunks start at multiples of 32 dense columns: with
    // the largest size there, the rounding step is exactly 1/64.
    const auto view = c.view();
    for (index_t t = 0; t < tokens; ++t) {
      for (index_t slot = 0; slot < view.in_channels; ++slot) {
        const bool largest = slot % 32 == 0 || random.chance(50);
        const index_t units =
            largest ? random.pick<index_t>({-127, 127, 127}) : random.integer(-127, 127);
        const index_t column = qeft::activation_column(view.weak, slot, view.in_channels);
        x[static_cast<std::size_t>(t * view.in_channels + column)] =
            static_cast<float>(units) / 64.0F;
      }
    }
    const auto reference = qeft_test::multiply(c.layer, x, tokens);
    qeft_test::for_each_isa([&](auto isa) {
      INFO(isa.name << ": " << qeft_test::describe(c.layer.d));
      CHECK(qeft_test::worst_error(qeft_test::product<float>(c, x, tokens, qeft::cpu::int8{}, isa),
                                   reference) < qeft_test::exact_bound);
      sweep.ran();
    });
  });
}

TEST_CASE("int8 is within one percent for random activations, outliers in weak columns included") {
  qeft_test::sweep sweep("instruction sets");
  qeft_test::for_each_isa_case([&](const auto& c) {
    qeft_test::random_source random(12);
    auto x = qeft_test::random_activations<float>(c.layer, 6, random);
    // Without the weak columns' share, which is exact and would hide the error.
    for (std::size_t t = 0; t < 6; ++t) {
      for (const std::int32_t column : c.layer.weak_columns) {
        x[t * 357 + static_cast<std::size_t>(column)] *= 1e-6F;
      }
    }
    const auto reference = qeft_test::multiply(c.layer, x, 6);
    qeft_test::for_each_isa([&](auto isa) {
      const double error = qeft_test::relative_error(
          qeft_test::product<float>(c, x, 6, qeft::cpu::int8{}, isa), reference.y);
      INFO(isa.name << ": " << qeft_test::describe(c.layer.d) << ": relative error " << error);
      CHECK(error < 0.01);
      CHECK(error > 1e-4);  // it does round
      sweep.ran();
    });
  });
}

TEST_CASE("int8 keeps its bound: half a step per activation, for every output") {
  qeft_test::sweep sweep("instruction sets");
  qeft_test::for_each_isa_case([&](const auto& c) {
    qeft_test::random_source random(16);
    const index_t tokens = 14;
    auto x = qeft_test::random_activations<float>(c.layer, tokens, random);
    const auto view = c.view();
    const index_t ic = view.in_channels;
    const index_t dense = view.dense_columns();
    const index_t group = c.layer.d.columns_per_group();
    const auto at = [](index_t i) { return static_cast<std::size_t>(i); };
    x[at(qeft::activation_column(view.weak, 5, ic))] = 100.0F;  // an outlier in a dense column
    const auto reference = qeft_test::multiply(c.layer, x, tokens);
    const auto weights = qeft_test::weights_of(c.layer);
    std::vector<double> bound(reference.y.size(), 0.0);
    for (index_t first = 0, end = 0; first < dense; first = end) {
      end = std::min({first + 128, (first / group + 1) * group, dense});
      for (index_t t = 0; t < tokens; ++t) {
        double largest = 0.0;
        std::vector<double> sum(at(view.out_channels), 0.0);
        for (index_t slot = first; slot < end; ++slot) {
          const index_t column = qeft::activation_column(view.weak, slot, ic);
          largest = std::max(largest, std::abs(static_cast<double>(x[at(t * ic + column)])));
          for (index_t n = 0; n < view.out_channels; ++n) {
            sum[at(n)] += std::abs(static_cast<double>(weights[at(n * ic + column)]));
          }
        }
        for (index_t n = 0; n < view.out_channels; ++n) {
          bound[at(t * view.out_channels + n)] += largest / 127.0 / 2.0 * sum[at(n)];
        }
      }
    }
    qeft_test::for_each_isa([&](auto isa) {
      INFO(isa.name << ": " << qeft_test::describe(c.layer.d));
      const auto y = qeft_test::product<float>(c, x, tokens, qeft::cpu::int8{}, isa);
      for (std::size_t i = 0; i < y.size(); ++i) {
        const double error = std::abs(static_cast<double>(y[i]) - reference.y[i]);
        CHECK(error <= 1.0001 * bound[i] + qeft_test::exact_bound * reference.magnitude[i]);
      }
      sweep.ran();
    });
  });
}

TEST_CASE("int8 takes zero, tiny and huge activations") {
  const qeft_test::isa_case<qeft::quant_format<4>> c(40, 64, 13);
  qeft_test::for_each_isa([&](auto isa) {
    for (const float size : {0.0F, 1e-44F, 1e-38F, 1e30F}) {
      INFO(isa.name << ": " << size);
      const std::vector<float> x(357, size);
      const auto y = qeft_test::product<float>(c, x, 1, qeft::cpu::int8{}, isa);
      const auto reference = qeft_test::multiply(c.layer, x, 1);
      for (std::size_t n = 0; n < y.size(); ++n) {
        // Activations below the normal range may count as zero.
        const double error = std::abs(static_cast<double>(y[n]) - reference.y[n]);
        CHECK(error <= qeft_test::exact_bound * reference.magnitude[n] + 1e-35);
      }
    }
  });
}
