// SPDX-License-Identifier: Apache-2.0
// The gradients of a layer against their definitions in double.
#include <cstdlib>
#include <new>

#include "isa_cases.hpp"
#include "qeft/cpu/backward.hpp"
#include "qeft/layout/fragment.hpp"
#include "qeft/layout/row_packed.hpp"
#include "support/catch.hpp"
#include "support/throws.hpp"

namespace {

using qeft::index_t;
using qeft::layout::simd_tile;
using qeft_test::plain_layer;
using qeft_test::random_source;

bool no_memory = false;

std::size_t at(index_t i) { return static_cast<std::size_t>(i); }

/// Sums in double, and the sums of the sizes of their terms.
struct sums {
  explicit sums(index_t count) : value(at(count)), magnitude(at(count)) {}
  void add(index_t i, double term) {
    value[at(i)] += term;
    magnitude[at(i)] += std::abs(term);
  }
  std::vector<double> value;
  std::vector<double> magnitude;
};

/// The largest error in units of 2^-24 times the size of the terms.
double worst(const std::vector<float>& computed, const sums& defined) {
  REQUIRE(computed.size() == defined.value.size());
  double largest = 0.0;
  for (std::size_t i = 0; i < computed.size(); ++i) {
    const double error = std::abs(static_cast<double>(computed[i]) - defined.value[i]);
    const double unit = std::ldexp(defined.magnitude[i], -24);
    if (!(error <= largest * unit)) {  // NaN counts
      largest = unit > 0.0 ? error / unit : std::numeric_limits<double>::infinity();
    }
  }
  return largest;
}
constexpr double bound = 8.0;

std::vector<float> random_vector(index_t count, random_source& random) {
  std::vector<float> v(at(count));
  for (float& x : v) x = static_cast<float>(random.real());
  return v;
}

sums input_gradient(const plain_layer& layer, const std::vector<float>& dy, index_t tokens) {
  const std::vector<float> w = weights_of(layer);
  const index_t oc = layer.d.out_channels;
  const index_t ic = layer.d.in_channels;
  sums dx(tokens * ic);
  for (index_t t = 0; t < tokens; ++t) {
    for (index_t n = 0; n < oc; ++n) {
      const auto gradient = static_cast<double>(dy[at(t * oc + n)]);
      for (index_t c = 0; c < ic; ++c) {
        dx.add(t * ic + c, gradient * static_cast<double>(w[at(n * ic + c)]));
      }
    }
  }
  return dx;
}

/// (OC, count) gradients of columns of W.
sums weight_gradient(index_t out_channels, index_t count, const std::vector<float>& dy,
                     const std::vector<float>& x, index_t tokens) {
  sums dw(out_channels * count);
  for (index_t t = 0; t < tokens; ++t) {
    for (index_t n = 0; n < out_channels; ++n) {
      const auto gradient = static_cast<double>(dy[at(t * out_channels + n)]);
      for (index_t j = 0; j < count; ++j) {
        dw.add(n * count + j, gradient * static_cast<double>(x[at(t * count + j)]));
      }
    }
  }
  return dw;
}

std::vector<index_t> dense_columns(const plain_layer& layer) {
  std::vector<index_t> columns;
  std::size_t weak = 0;
  for (index_t c = 0; c < layer.d.in_channels; ++c) {
    if (weak < layer.weak_columns.size() && layer.weak_columns[weak] == c) {
      ++weak;
    } else {
      columns.push_back(c);
    }
  }
  return columns;
}

sums scale_gradient(const plain_layer& layer, const std::vector<float>& dy,
                    const std::vector<float>& x, index_t tokens) {
  const auto& d = layer.d;
  const std::vector<index_t> columns = dense_columns(layer);
  const index_t dense = d.dense_columns();
  sums ds(d.out_channels * d.groups());
  for (index_t n = 0; n < d.out_channels; ++n) {
    for (index_t i = 0; i < dense; ++i) {
      const index_t param = n * d.groups() + i / d.columns_per_group();
      double code = layer.codes[at(n * dense + i)];
      if (d.zero == qeft::zero_kind::integer) code -= layer.zeros[at(param)];
      if (d.zero == qeft::zero_kind::symmetric) code -= std::ldexp(1.0, d.bits - 1);
      for (index_t t = 0; t < tokens; ++t) {
        ds.add(param, static_cast<double>(dy[at(t * d.out_channels + n)]) *
                          static_cast<double>(x[at(t * d.in_channels + columns[at(i)])]) * code);
      }
    }
  }
  return ds;
}

/// The sums added to what was there.
sums added(sums s, const std::vector<float>& before) {
  for (std::size_t i = 0; i < before.size(); ++i) {
    s.add(static_cast<index_t>(i), static_cast<double>(before[i]));
  }
  return s;
}

/// What the three gradients are of one layer, stored (before is empty) or added to `before`.
struct gradients {
  std::vector<float> dx;
  std::vector<float> dw;  // of weak columns
  std::vector<float> ds;
};

struct operands {
  operands(const plain_layer& layer, index_t count, random_source& random)
      : tokens(count),
        dy(random_vector(count * layer.d.out_channels, random)),
        x(qeft_test::random_activations<float>(layer, count, random)) {
    for (index_t t = 0; t < count; ++t) {
      for (const std::int32_t c : layer.weak_columns) {
        x_weak.push_back(x[at(t * layer.d.in_channels + c)]);
      }
    }
    before.dx = random_vector(count * layer.d.in_channels, random);
    before.dw = random_vector(layer.d.out_channels * layer.d.weak_columns, random);
    before.ds = random_vector(layer.d.out_channels * layer.d.groups(), random);
  }
  index_t tokens;
  std::vector<float> dy;
  std::vector<float> x;
  std::vector<float> x_weak;
  gradients before;
};

template <class Executor, class Layer>
gradients compute(const Executor& exec, const Layer& w, const plain_layer& layer, const operands& o,
                  bool accumulate) {
  gradients g = o.before;
  std::vector<float> x_weak(o.x_weak.size());
  REQUIRE(qeft::input_gradient(exec, w, o.dy.data(), o.tokens, g.dx.data(), accumulate).ok());
  REQUIRE(qeft::gather_weak(exec, w, o.x.data(), o.tokens, x_weak.data()).ok());
  CHECK(x_weak == o.x_weak);
  REQUIRE(qeft::weak_gradient(exec, layer.d.out_channels, layer.d.weak_columns, o.dy.data(),
                              x_weak.data(), o.tokens, g.dw.data(), accumulate)
              .ok());
  REQUIRE(qeft::scale_gradient(exec, w, o.dy.data(), o.x.data(), o.tokens, g.ds.data(), accumulate)
              .ok());
  return g;
}

/// Pools that all cases share.
const qeft::on_host one(1);
const qeft::on_host two(2);
const qeft::on_host five(5);

/// The gradients of a layer, checked against the definitions and for independence of threads and
/// of the other tokens.
template <class Executor, class Layer>
gradients checked(const Layer& w, const plain_layer& layer, const operands& o, bool accumulate) {
  const gradients g = compute(Executor(one), w, layer, o, accumulate);
  const auto expected = [&](sums s, const std::vector<float>& before) {
    return accumulate ? added(std::move(s), before) : std::move(s);
  };
  CHECK(worst(g.dx, expected(input_gradient(layer, o.dy, o.tokens), o.before.dx)) < bound);
  CHECK(worst(g.dw, expected(weight_gradient(layer.d.out_channels, layer.d.weak_columns, o.dy,
                                             o.x_weak, o.tokens),
                             o.before.dw)) < bound);
  CHECK(worst(g.ds, expected(scale_gradient(layer, o.dy, o.x, o.tokens), o.before.ds)) < bound);

  for (const qeft::on_host* many : {&two, &five}) {
    const gradients other = compute(Executor(*many), w, layer, o, accumulate);
    CHECK(qeft_test::same_bits(g.dx, other.dx));
    CHECK(qeft_test::same_bits(g.dw, other.dw));
    CHECK(qeft_test::same_bits(g.ds, other.ds));
  }
  const Executor exec(one);
  const index_t oc = layer.d.out_channels;
  const index_t ic = layer.d.in_channels;
  std::vector<float> alone = o.before.dx;
  for (index_t t = 0, count = 1; t < o.tokens; t += count, count = 3 - count) {
    if (count > o.tokens - t) count = 1;
    REQUIRE(qeft::input_gradient(exec, w, o.dy.data() + t * oc, count, alone.data() + t * ic,
                                 accumulate)
                .ok());
  }
  CHECK(qeft_test::same_bits(g.dx, alone));
  return g;
}

using native = qeft::cpu::executor<>;

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

TEST_CASE("gradients equal their definitions for random layers over simd_tile") {
  qeft_test::fuzz("gradients", 1000, [](std::uint64_t seed) {
    random_source random(seed);
    const auto layer = qeft_test::random_case(random, 6000);
    const operands o(layer, random.pick<index_t>({1, 2, 5, 6, 7, 12, 13, 25}), random);
    INFO(qeft_test::describe(layer.d) << ", " << o.tokens << " tokens");
    checked<native>(qeft_test::pack<simd_tile>(layer), layer, o, random.chance(50));
  });
}

TEST_CASE("gradients take any other layout through the definition") {
  qeft_test::fuzz("gradients", 60, [](std::uint64_t seed) {
    random_source random(seed);
    const auto layer = qeft_test::random_case(random, 1500);
    const operands o(layer, random.pick<index_t>({1, 3}), random);
    INFO(qeft_test::describe(layer.d) << ", " << o.tokens << " tokens");
    const bool accumulate = random.chance(50);
    checked<qeft::on_host>(qeft_test::pack<qeft::layout::row_packed>(layer), layer, o, accumulate);
  });
  random_source random(3);
  qeft::matrix_descriptor d;
  d.out_channels = 37;
  d.in_channels = 90;
  d.bits = 3;
  d.group_size = 32;
  d.weak = qeft::weak_kind::per_head;
  d.heads = 3;
  d.weak_columns = 6;
  const auto layer = qeft_test::random_layer(d, random);
  const auto w = qeft_test::pack<qeft::layout::fragment>(layer);
  checked<qeft::on_host>(w.view<qeft::quant_format<3>>(qeft::weak_per_head<>{{6}, 3}), layer,
                         operands(layer, 4, random), false);
}

TEST_CASE("gradients of sums and of vectors that take several blocks") {
  qeft_test::sweep sweep("sizes");
  const auto check = [&](index_t oc, index_t ic, index_t k, qeft::weak_kind weak, index_t tokens) {
    random_source random(static_cast<std::uint64_t>(oc + k));
    qeft::matrix_descriptor d;
    d.out_channels = oc;
    d.in_channels = ic;
    d.group_size = 32;
    d.weak = weak;
    d.weak_columns = k;
    const auto layer = qeft_test::random_layer(d, random);
    const operands o(layer, tokens, random);
    INFO(qeft_test::describe(d) << ", " << tokens << " tokens");
    const auto w = qeft_test::pack<simd_tile>(layer);
    for (const bool accumulate : {false, true}) {
      const gradients g = compute(one, w, layer, o, accumulate);
      const auto expected = [&](const sums& s, const std::vector<float>& before) {
        return accumulate ? added(s, before) : s;
      };
      CHECK(worst(g.dx, expected(input_gradient(layer, o.dy, tokens), o.before.dx)) < bound);
      CHECK(worst(g.dw, expected(weight_gradient(oc, k, o.dy, o.x_weak, tokens), o.before.dw)) <
            bound);
      CHECK(worst(g.ds, expected(scale_gradient(layer, o.dy, o.x, tokens), o.before.ds)) < bound);
      const gradients other = compute(five, w, layer, o, accumulate);
      CHECK(qeft_test::same_bits(g.dx, other.dx));
      CHECK(qeft_test::same_bits(g.dw, other.dw));
      CHECK(qeft_test::same_bits(g.ds, other.ds));
      const index_t t = tokens - 1;  // alone
      std::vector<float> last(o.before.dx.end() - ic, o.before.dx.end());
      REQUIRE(qeft::input_gradient(one, w, o.dy.data() + t * oc, 1, last.data(), accumulate).ok());
      CHECK(qeft_test::same_bits(last, std::vector<float>(g.dx.end() - ic, g.dx.end())));
    }
    sweep.ran();
  };
  check(1100, 70, 3, qeft::weak_kind::tail, 200);
  check(2100, 40, 40, qeft::weak_kind::tail, 3);       // no codes at all
  check(33, 250, 220, qeft::weak_kind::indexed, 400);  // more weak columns than are taken at once
  check(40, 96, 0, qeft::weak_kind::none, 2500);
  check(10, 8, 8, qeft::weak_kind::indexed, 2100);
}

TEST_CASE("every instruction set computes the gradients") {
  qeft_test::sweep sweep("instruction sets");
  qeft_test::for_each_isa_case([&](const auto& c) {
    random_source random(9);
    const operands o(c.layer, 14, random);  // a full block of tokens and a part of one
    qeft_test::for_each_isa([&](auto isa) {
      INFO(isa.name << ": " << qeft_test::describe(c.layer.d));
      using executor = qeft::cpu::executor<qeft::cpu::exact, decltype(isa)>;
      const gradients of_view = checked<executor>(c.view(), c.layer, o, true);
      const gradients of_owner = compute(executor(one), c.matrix, c.layer, o, true);
      CHECK(qeft_test::same_bits(of_view.dx, of_owner.dx));
      CHECK(qeft_test::same_bits(of_view.ds, of_owner.ds));
      sweep.ran();
    });
  });
}

TEST_CASE("the gradient of one output is its row of the layer, bit for bit") {
  qeft_test::for_each_isa_case([&](const auto& c) {
    const std::vector<float> weights = weights_of(c.layer);
    const index_t oc = c.layer.d.out_channels;
    std::vector<float> dy(at(oc * oc));
    for (index_t n = 0; n < oc; ++n) dy[at(n * oc + n)] = 1.0F;
    qeft_test::for_each_isa([&](auto isa) {
      INFO(isa.name << ": " << qeft_test::describe(c.layer.d));
      const auto exec = qeft::cpu::with<qeft::cpu::exact, decltype(isa)>(two);
      std::vector<float> dx(weights.size());
      REQUIRE(qeft::input_gradient(exec, c.view(), dy.data(), oc, dx.data()).ok());
      CHECK(dx == weights);
    });
  });
}

TEST_CASE("gradients are written and nothing else, and not-a-number stays with its token") {
  random_source random(6);
  qeft::matrix_descriptor d;
  d.out_channels = 45;
  d.in_channels = 41;
  d.weak = qeft::weak_kind::indexed;
  d.weak_columns = 5;
  const auto layer = qeft_test::random_layer(d, random);
  const auto w = qeft_test::pack<simd_tile>(layer);
  const qeft::on_host& exec = two;
  operands o(layer, 7, random);
  const float mark = -77.0F;
  const auto only_inside = [&](index_t count, const auto& write) {
    std::vector<float> to(at(count + 64), mark);
    write(to.data() + 32);
    for (index_t i = 0; i < count + 64; ++i) {
      CHECK((to[at(i)] == mark) == (i < 32 || i >= 32 + count));
    }
  };
  only_inside(7 * 41,
              [&](float* to) { CHECK(qeft::input_gradient(exec, w, o.dy.data(), 7, to).ok()); });
  only_inside(45 * 5, [&](float* to) {
    CHECK(qeft::weak_gradient(exec, 45, 5, o.dy.data(), o.x_weak.data(), 7, to).ok());
  });
  only_inside(45, [&](float* to) {
    CHECK(qeft::scale_gradient(exec, w, o.dy.data(), o.x.data(), 7, to).ok());
  });
  only_inside(7 * 5, [&](float* to) { CHECK(qeft::gather_weak(exec, w, o.x.data(), 7, to).ok()); });

  o.dy[2 * 45 + 44] = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> dx(7 * 41);
  REQUIRE(qeft::input_gradient(exec, w, o.dy.data(), 7, dx.data()).ok());
  for (std::size_t i = 0; i < dx.size(); ++i) CHECK(std::isnan(dx[i]) == (i / 41 == 2));
}

TEST_CASE("the gradients of no tokens are zero, or add nothing") {
  random_source random(8);
  qeft::matrix_descriptor d;
  d.out_channels = 5;
  d.in_channels = 40;
  d.weak = qeft::weak_kind::tail;
  d.weak_columns = 2;
  const auto layer = qeft_test::random_layer(d, random);
  const qeft::on_host& exec = one;
  const auto check = [&](const auto& w) {
    std::vector<float> dw(10, 3.0F);
    std::vector<float> ds(5, 3.0F);
    CHECK(qeft::input_gradient(exec, w, nullptr, 0, nullptr).ok());
    CHECK(qeft::gather_weak(exec, w, nullptr, 0, nullptr).ok());
    CHECK(qeft::weak_gradient(exec, 5, 2, nullptr, nullptr, 0, dw.data(), true).ok());
    CHECK(qeft::scale_gradient(exec, w, nullptr, nullptr, 0, ds.data(), true).ok());
    CHECK(dw == std::vector<float>(10, 3.0F));
    CHECK(ds == std::vector<float>(5, 3.0F));
    CHECK(qeft::weak_gradient(exec, 5, 2, nullptr, nullptr, 0, dw.data()).ok());
    CHECK(qeft::scale_gradient(exec, w, nullptr, nullptr, 0, ds.data()).ok());
    CHECK(dw == std::vector<float>(10, 0.0F));
    CHECK(ds == std::vector<float>(5, 0.0F));
  };
  check(qeft_test::pack<simd_tile>(layer));
  const auto rows = qeft_test::pack<qeft::layout::row_packed>(layer);
  check(rows.view<qeft::quant_format<4>>(qeft::weak_tail<>{{2}}));
}

TEST_CASE("gradients say why they refuse, and touch nothing") {
  random_source random(1);
  qeft::matrix_descriptor d;
  d.out_channels = 4;
  d.in_channels = 8;
  d.weak = qeft::weak_kind::tail;
  d.weak_columns = 2;
  const auto w = qeft_test::pack<simd_tile>(qeft_test::random_layer(d, random));
  const qeft::on_host& exec = one;
  const std::vector<float> v(8, 1.0F);
  std::vector<float> to(8, 5.0F);
  const float* none = nullptr;
  float* nowhere = nullptr;
  const auto refused = [](const qeft::status& s, std::initializer_list<const char*> fragments) {
    return s.code() == qeft::errc::invalid_argument && qeft_test::mentions(s.message(), fragments);
  };
  CHECK(refused(qeft::input_gradient(exec, w, v.data(), -3, to.data()),
                {"input_gradient", "tokens is -3", "negative"}));
  CHECK(refused(qeft::input_gradient(exec, w, none, 1, to.data()), {"dy is null"}));
  CHECK(refused(qeft::input_gradient(exec, w, v.data(), 1, nowhere), {"dx is null"}));
  CHECK(refused(qeft::gather_weak(exec, w, none, 1, to.data()), {"gather_weak", "x is null"}));
  CHECK(refused(qeft::gather_weak(exec, w, v.data(), 1, nowhere), {"x_weak is null"}));
  CHECK(refused(qeft::gather_weak(exec, w, v.data(), -1, to.data()), {"tokens is -1"}));
  CHECK(refused(qeft::weak_gradient(exec, 4, 2, none, v.data(), 1, to.data()),
                {"weak_gradient", "dy is null"}));
  CHECK(refused(qeft::weak_gradient(exec, 4, 2, v.data(), none, 1, to.data()), {"x_weak is null"}));
  CHECK(refused(qeft::weak_gradient(exec, 4, 2, v.data(), v.data(), 1, nowhere),
                {"dw is null", "8 elements"}));
  CHECK(refused(qeft::weak_gradient(exec, 4, 2, v.data(), v.data(), -1, to.data()),
                {"tokens is -1"}));
  CHECK(refused(qeft::weak_gradient(exec, 4, -2, v.data(), v.data(), 1, to.data()), {"k is -2"}));
  CHECK(refused(qeft::weak_gradient(exec, 0, 2, v.data(), v.data(), 1, to.data()),
                {"out_channels is 0"}));
  CHECK(qeft::weak_gradient(exec, 4, 0, none, none, 1, nowhere).ok());
  CHECK(refused(qeft::scale_gradient(exec, w, none, v.data(), 1, to.data()),
                {"scale_gradient", "dy is null"}));
  CHECK(refused(qeft::scale_gradient(exec, w, v.data(), none, 1, to.data()), {"x is null"}));
  CHECK(refused(qeft::scale_gradient(exec, w, v.data(), v.data(), 1, nowhere),
                {"dscales is null", "4 elements"}));
  CHECK(
      refused(qeft::scale_gradient(exec, w, v.data(), v.data(), -1, to.data()), {"tokens is -1"}));

  auto view = w.view<qeft::quant_format<4>>(qeft::weak_tail<>{{2}});
  view.codes = nullptr;
  CHECK(refused(qeft::supports_input_gradient(exec, view, v.data(), 1, to.data()),
                {"input_gradient", "no codes"}));
  CHECK(refused(qeft::supports_gather_weak(exec, view, v.data(), 1, to.data()),
                {"gather_weak", "no codes"}));
  CHECK(refused(qeft::supports_scale_gradient(exec, view, v.data(), v.data(), 1, to.data()),
                {"scale_gradient", "no codes"}));
  const qeft::quantized_matrix<simd_tile> empty;
  CHECK(refused(qeft::input_gradient(exec, empty, v.data(), 1, to.data()), {"out_channels is 0"}));
  CHECK(refused(qeft::gather_weak(exec, empty, v.data(), 1, to.data()), {"out_channels is 0"}));
  CHECK(refused(qeft::scale_gradient(exec, empty, v.data(), v.data(), 1, to.data()),
                {"out_channels is 0"}));

  struct only_3_bits : qeft::format_list<qeft::quant_format<3>> {};
  const auto not_built_in = [](const qeft::status& s) {
    return s.code() == qeft::errc::unsupported &&
           qeft_test::mentions(s.message(), {"4-bit", "not built in", "3-bit"});
  };
  CHECK(not_built_in(qeft::input_gradient<only_3_bits>(exec, w, v.data(), 1, to.data())));
  CHECK(not_built_in(qeft::scale_gradient<only_3_bits>(exec, w, v.data(), v.data(), 1, to.data())));

  no_memory = true;
  const qeft::status of_input = qeft::input_gradient(exec, w, v.data(), 1, to.data());
  const qeft::status of_weak = qeft::weak_gradient(exec, 4, 2, v.data(), v.data(), 1, to.data());
  const qeft::status of_scale = qeft::scale_gradient(exec, w, v.data(), v.data(), 1, to.data());
  no_memory = false;
  for (const qeft::status& s : {of_input, of_weak, of_scale}) {
    CHECK(s.code() == qeft::errc::out_of_memory);
  }
  CHECK(to == std::vector<float>(8, 5.0F));
}
