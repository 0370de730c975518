// SPDX-License-Identifier: Apache-2.0
// Epilogues, those of the library and a user's, give what a pass over the outputs afterwards gives.
#include <cmath>
#include <cstdlib>
#include <new>

#include "isa_cases.hpp"
#include "support/catch.hpp"

namespace {

using qeft::index_t;
namespace epilogue = qeft::epilogue;

bool no_memory = false;

constexpr index_t rows = 70;
constexpr index_t tokens = 14;

/// A user's: depends on everything it is given and stores elsewhere.
struct custom {
  float factor;
  float operator()(float value, index_t token, index_t channel) const {
    return factor * value + static_cast<float>(1000 * token + channel);
  }
  index_t destination(index_t channel) const { return (channel * 3 + 5) % rows; }
};

template <class Y, class Epilogue>
std::vector<Y> afterwards(const std::vector<float>& plain, const Epilogue& e) {
  std::vector<Y> y(plain.size());
  for (index_t i = 0; i < static_cast<index_t>(plain.size()); ++i) {
    const index_t token = i / rows;
    const index_t to = token * rows + epilogue::destination(e, i % rows);
    y[static_cast<std::size_t>(to)] =
        qeft::from_float<Y>(e(plain[static_cast<std::size_t>(i)], token, i % rows));
  }
  return y;
}

template <class Y, class Executor, class Matrix, class Epilogue>
std::vector<Y> product(const Executor& exec, const Matrix& w, const std::vector<float>& x,
                       const Epilogue& e) {
  std::vector<Y> y(static_cast<std::size_t>(tokens * rows));
  REQUIRE(qeft::gemm(exec, w, x.data(), tokens, y.data(), e).ok());
  return y;
}

}  // namespace

QEFT_COLD void* operator new(std::size_t size, std::align_val_t alignment) {
  void* p = no_memory
                ? nullptr
                : std::aligned_alloc(static_cast<std::size_t>(alignment), (size + 63) / 64 * 64);
  if (p == nullptr) throw std::bad_alloc();
  return p;
}
QEFT_COLD void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
QEFT_COLD void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }

TEST_CASE("a custom epilogue is applied once to every output, whatever the kernels") {
  qeft_test::sweep sweep("kernels");
  const qeft_test::isa_case<qeft::quant_format<4>> c(rows, 128, 1);
  qeft_test::random_source random(1);
  const auto x = qeft_test::random_activations<float>(c.layer, tokens, random);
  const custom e{-0.5F};
  const auto check = [&](const auto& exec) {
    const auto plain = product<float>(exec, c.view(), x, epilogue::none{});
    const auto y = product<float>(exec, c.view(), x, e);
    CHECK(qeft_test::same_bits(y, afterwards<float>(plain, e)));
    std::vector<float> one(rows);
    REQUIRE(qeft::gemv(exec, c.view(), x.data(), one.data(), e).ok());
    CHECK(qeft_test::same_bits(one, std::vector<float>(y.begin(), y.begin() + rows)));
    sweep.ran();
  };
  const qeft::on_host host(2);
  check(host);
  qeft_test::for_each_isa([&](auto isa) {
    INFO(isa.name);
    check(qeft::cpu::with<qeft::cpu::exact, decltype(isa)>(host));
    check(qeft::cpu::with<qeft::cpu::int8, decltype(isa)>(host));
  });
  const auto row_packed = qeft_test::pack<qeft::layout::row_packed>(c.layer);
  const auto w = row_packed.view<qeft::quant_format<4>>(
      qeft::weak_indexed<>{{130}, row_packed.weak_index().data()});
  CHECK(qeft_test::same_bits(product<float>(host, w, x, e),
                             afterwards<float>(product<float>(host, w, x, epilogue::none{}), e)));
}

TEST_CASE("the library's epilogues and their composition do what a pass afterwards does") {
  const qeft::on_host exec(3);
  const qeft_test::isa_case<qeft::quant_format<4>> c(rows, 128, 2);
  qeft_test::random_source random(2);
  const auto x = qeft_test::random_activations<float>(c.layer, tokens, random);
  const auto plain = product<float>(exec, c.view(), x, epilogue::none{});
  std::vector<float> b;
  std::vector<float> r;
  std::vector<std::int32_t> to;
  for (index_t n = 0; n < rows; ++n) {
    b.push_back(static_cast<float>(random.real()));
    to.push_back(static_cast<std::int32_t>((n * 11 + 3) % rows));
  }
  for (index_t i = 0; i < tokens * rows; ++i) r.push_back(static_cast<float>(random.real()));
  const auto at = [](index_t i) { return static_cast<std::size_t>(i); };
  const auto check = [&](const auto& e, const auto& expected) {
    const auto y = product<float>(exec, c.view(), x, e);
    for (index_t t = 0; t < tokens; ++t) {
      for (index_t n = 0; n < rows; ++n) {
        const index_t stored = t * rows + epilogue::destination(e, n);
        CHECK(y[at(stored)] ==
              Approx(expected(plain[at(t * rows + n)], t, n)).epsilon(2e-5).margin(1e-30));
      }
    }
  };
  const auto silu = [](float v) { return v / (1.0F + std::exp(-v)); };
  check(epilogue::bias{b.data()}, [&](float v, index_t, index_t n) { return v + b[at(n)]; });
  check(epilogue::relu{}, [&](float v, index_t, index_t) { return v > 0.0F ? v : 0.0F; });
  CHECK(std::isnan(epilogue::relu{}(std::nanf(""), 0, 0)));
  check(epilogue::silu{}, [&](float v, index_t, index_t) { return silu(v); });
  check(epilogue::gelu{}, [&](float v, index_t, index_t) {
    return 0.5 * static_cast<double>(v) * std::erfc(static_cast<double>(v) / -std::sqrt(2.0));
  });
  check(epilogue::residual{r.data(), rows},
        [&](float v, index_t t, index_t n) { return v + r[at(t * rows + n)]; });
  check(epilogue::permute{to.data()}, [](float v, index_t, index_t) { return v; });
  check(epilogue::then{epilogue::bias{b.data()},
                       epilogue::then{epilogue::silu{}, epilogue::permute{to.data()}}},
        [&](float v, index_t, index_t n) { return silu(v + b[at(n)]); });
  // Behind a permuted store the channel is the new one.
  check(epilogue::then{epilogue::permute{to.data()}, epilogue::residual{r.data(), rows}},
        [&](float v, index_t t, index_t n) { return v + r[at(t * rows + to[at(n)])]; });

  auto y = r;  // added to what is there
  REQUIRE(qeft::gemm(exec, c.view(), x.data(), tokens, y.data(), epilogue::residual{y.data(), rows})
              .ok());
  CHECK(qeft_test::same_bits(y, afterwards<float>(plain, epilogue::residual{r.data(), rows})));

  const custom e{2.0F};
  CHECK(qeft_test::same_bits(product<qeft::half_bits>(exec, c.view(), x, e),
                             afterwards<qeft::half_bits>(plain, e)));
}

TEST_CASE("gemm without memory is a status, and y is untouched") {
  const qeft_test::isa_case<qeft::quant_format<4>> c(rows, 128, 3);
  const qeft::on_host exec(1);
  const std::vector<float> x(static_cast<std::size_t>(c.layer.d.in_channels), 1.0F);
  std::vector<float> y(rows, 7.0F);
  no_memory = true;
  const qeft::status of_gemm = qeft::gemm(exec, c.view(), x.data(), 1, y.data());
  const qeft::status of_gemv = qeft::gemv(exec, c.view(), x.data(), y.data());
  no_memory = false;
  CHECK(of_gemm.code() == qeft::errc::out_of_memory);
  CHECK(of_gemv.code() == qeft::errc::out_of_memory);
  CHECK(y == std::vector<float>(rows, 7.0F));
}
