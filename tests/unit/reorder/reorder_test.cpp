// SPDX-License-Identifier: Apache-2.0
// Permutations, weak-column selection and Offline Global Reordering.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <set>

#include "qeft/container/quantized_matrix.hpp"
#include "qeft/reorder/permutation.hpp"
#include "qeft/reorder/permute_matrix.hpp"
#include "qeft/reorder/reorder_plan.hpp"
#include "qeft/reorder/weak_selection.hpp"
#include "support/cases.hpp"
#include "support/catch.hpp"
#include "support/throws.hpp"

namespace {

using qeft::index_t;
using qeft::permutation;
using qeft_test::contains;
using qeft_test::same_bytes;
using packed = qeft::quantized_matrix<qeft::layout::row_packed>;

permutation random_permutation(index_t n, std::mt19937& rng) {
  auto source = permutation::identity(n).source();
  std::shuffle(source.begin(), source.end(), rng);
  return permutation(source);
}

std::vector<std::int32_t> random_subset(index_t n, index_t k, std::mt19937& rng) {
  auto source = random_permutation(n, rng).source();
  source.resize(static_cast<std::size_t>(k));
  std::sort(source.begin(), source.end());
  return source;
}

/// A plain round-to-nearest packer: enough to tell whether two ways of packing give the same bytes.
packed pack(const std::vector<float>& w, qeft::matrix_descriptor d,
            std::vector<std::int32_t> weak_index) {
  packed m(d, weak_index);
  std::vector<index_t> dense;
  std::vector<index_t> weak;
  qeft::visit_weak(d, m.weak_index().data(), [&](auto where) {
    for (index_t i = 0; i < d.dense_columns(); ++i) {
      dense.push_back(where.dense_column(i, d.in_channels));
    }
    for (index_t j = 0; j < d.weak_columns; ++j) {
      weak.push_back(where.weak_column(j, d.in_channels));
    }
  });
  const index_t g_size = d.group_size == qeft::per_channel ? d.in_channels : d.group_size;
  const float max_code = static_cast<float>((1 << d.bits) - 1);
  for (index_t n = 0; n < d.out_channels; ++n) {
    const float* row = w.data() + n * d.in_channels;
    for (index_t g = 0; g < d.groups(); ++g) {
      float low = 0;
      float high = 0;
      const index_t end = std::min(d.dense_columns(), (g + 1) * g_size);
      for (index_t i = g * g_size; i < end; ++i) {
        low = std::min(low, row[dense[static_cast<std::size_t>(i)]]);
        high = std::max(high, row[dense[static_cast<std::size_t>(i)]]);
      }
      const auto scale = qeft::from_float<qeft::half_bits>((high - low) / max_code + 1e-3F);
      const float s = qeft::to_float(scale);
      const auto zero = static_cast<unsigned>(std::min(max_code, std::round(-low / s)));
      m.write_params(n, g, scale.bits, zero);
      for (index_t i = g * g_size; i < end; ++i) {
        const float q =
            std::round(row[dense[static_cast<std::size_t>(i)]] / s) + static_cast<float>(zero);
        m.write_code(n, i, static_cast<unsigned>(std::min(max_code, std::max(0.0F, q))));
      }
    }
    for (index_t j = 0; j < d.weak_columns; ++j) {
      m.write_weak(n, j,
                   qeft::from_float<qeft::half_bits>(row[weak[static_cast<std::size_t>(j)]]).bits);
    }
  }
  return m;
}

std::vector<float> random_weights(index_t n, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  std::vector<float> w(static_cast<std::size_t>(n));
  for (auto& x : w) x = normal(rng);
  return w;
}

}  // namespace

TEST_CASE("a permutation is validated, inverted and composed") {
  CHECK_THROWS_WITH(permutation({0, 2, 2}), contains("source[2] is 2, which occurs twice"));
  CHECK_THROWS_WITH(permutation({0, 3, 1}), contains("must be in [0, 3)"));
  CHECK_THROWS_WITH(permutation({0, -1}), contains("source[1] is -1"));
  CHECK(permutation(std::vector<std::int32_t>{}).is_identity());

  std::mt19937 rng(7);
  for (const index_t n : {1, 2, 17, 300}) {
    const auto a = random_permutation(n, rng);
    const auto b = random_permutation(n, rng);
    CHECK(compose(a, a.inverse()).is_identity());
    CHECK(compose(a.inverse(), a).is_identity());
    auto x = random_weights(n, rng);
    auto y = x;
    qeft::permute_columns(a, qeft::span<float>(x));
    qeft::permute_columns(b, qeft::span<float>(x));
    qeft::permute_columns(compose(a, b), qeft::span<float>(y));
    CHECK(x == y);
  }
  CHECK_THROWS_WITH(compose(permutation::identity(2), permutation::identity(3)),
                    contains("sizes are 2 and 3"));
}

TEST_CASE("dense rows and columns move as the definition says") {
  std::mt19937 rng(8);
  const index_t rows = 5;
  const index_t cols = 7;
  const auto w = random_weights(rows * cols, rng);
  const auto p = random_permutation(rows, rng);
  const auto q = random_permutation(cols, rng);
  auto moved = w;
  qeft::permute_rows(p, qeft::span<float>(moved), cols);
  qeft::permute_columns(q, qeft::span<float>(moved), rows);
  for (index_t i = 0; i < rows; ++i) {
    for (index_t j = 0; j < cols; ++j) {
      CHECK(moved[static_cast<std::size_t>(i * cols + j)] ==
            w[static_cast<std::size_t>(p[i] * cols + q[j])]);
    }
  }
  CHECK_THROWS_AS(qeft::permute_rows(p, qeft::span<float>(moved), cols + 1), qeft::error);
}

TEST_CASE("sizes that make no sense are refused") {
  const auto refused = [](auto&& make) {
    CHECK(qeft_test::throws_with(qeft::errc::invalid_argument, {"is"}, make));
  };
  refused([] { (void)permutation::identity(-1); });
  refused([] { (void)permutation::identity(index_t{1} << 31); });
  refused([] { (void)qeft::weak_last(-1, {}); });
  refused([] { (void)qeft::global_selection(-1, 0); });
  refused([] {
    volatile index_t columns = index_t{1} << 62;  // a constant makes GCC warn of what never runs
    qeft::permute_rows(permutation::identity(4), qeft::span<float>(), columns);
  });
  refused([] { qeft::permute_columns(permutation::identity(4), qeft::span<float>(), -1); });
}

TEST_CASE("weak_last and weak_last_per_head keep the robust order") {
  CHECK(qeft::weak_last(5, {1, 3}).source() == std::vector<std::int32_t>{0, 2, 4, 1, 3});
  CHECK(qeft::weak_last(3, {}).is_identity());
  CHECK(qeft::weak_last(2, {0, 1}).is_identity());
  CHECK_THROWS_WITH(qeft::weak_last(3, {2, 1}), contains("must ascend"));
  CHECK_THROWS_AS(qeft::weak_last(3, {3}), qeft::error);
  CHECK(qeft::weak_last_per_head(6, 2, {0, 4}).source() ==
        std::vector<std::int32_t>{1, 2, 0, 3, 5, 4});
  CHECK_THROWS_WITH(qeft::weak_last_per_head(6, 2, {0, 1}), contains("head 0 holds 2 of 2"));
  CHECK(qeft::repeat_heads(permutation({1, 0, 2, 3}), 2, 2).source() ==
        std::vector<std::int32_t>{1, 0, 3, 2, 4, 5, 6, 7});
  CHECK_THROWS_WITH(qeft::repeat_heads(permutation({1, 0, 2, 3}), 2, index_t{1} << 30),
                    contains("repeat_heads: size is 4294967296"));
  CHECK_THROWS_WITH(qeft::repeat_heads(permutation({1, 0, 2, 3}), 2, index_t{1} << 62),
                    contains("overflows"));
  CHECK_THROWS_WITH(qeft::weak_last_per_head(-4, 2, {}),
                    contains("weak_last_per_head: size is -4"));
  CHECK_THROWS_WITH(qeft::repeat_heads(permutation({2, 1, 0, 3}), 2, 2),
                    contains("must stay in their head"));
}

TEST_CASE("permuting then packing equals packing then permuting, byte for byte") {
  std::mt19937 rng(9);
  int cases = 0;
  for (const int bits : {2, 3, 4, 8}) {
    for (const auto zero :
         {qeft::zero_kind::symmetric, qeft::zero_kind::integer, qeft::zero_kind::scaled}) {
      for (const index_t heads : {index_t{1}, index_t{4}}) {
        for (const index_t k : {index_t{0}, index_t{4}, index_t{20}, index_t{76}}) {
          qeft::matrix_descriptor d;
          d.out_channels = 13;
          d.in_channels = 76;
          d.bits = bits;
          d.group_size = 32;
          d.zero = zero;
          d.weak = qeft::weak_kind::indexed;
          d.weak_columns = k;
          std::vector<std::int32_t> weak;
          if (heads == 1) {
            weak = random_subset(d.in_channels, k, rng);
          } else {
            for (index_t h = 0; h < heads; ++h) {
              for (const auto c : random_subset(19, k / heads, rng)) {
                weak.push_back(static_cast<std::int32_t>(h * 19 + c));
              }
            }
          }
          const auto rows = random_permutation(d.out_channels, rng);
          const auto columns = heads == 1 ? qeft::weak_last(d.in_channels, weak)
                                          : qeft::weak_last_per_head(d.in_channels, heads, weak);
          const auto w = random_weights(d.out_channels * d.in_channels, rng);
          const packed after =
              qeft::permute_columns(columns, qeft::permute_rows(rows, pack(w, d, weak)), heads);

          auto moved = w;
          qeft::permute_rows(rows, qeft::span<float>(moved), d.in_channels);
          qeft::permute_columns(columns, qeft::span<float>(moved), d.out_channels);
          const packed before = pack(moved, after.descriptor(), {});
          CHECK(same_bytes(before, after));
          if (k > 0 && k < d.in_channels) {
            CHECK(after.descriptor().weak ==
                  (heads == 1 ? qeft::weak_kind::tail : qeft::weak_kind::per_head));
          }
          ++cases;
        }
      }
    }
  }
  CHECK(cases == 96);
}

TEST_CASE("moving a quantised column after packing is refused") {
  qeft::matrix_descriptor d;
  d.out_channels = 2;
  d.in_channels = 64;
  const packed m(d);
  auto source = permutation::identity(64).source();
  std::swap(source[3], source[4]);
  CHECK_THROWS_WITH(qeft::permute_columns(permutation(source), m),
                    contains("input column 4 moves to 3"));
  CHECK_THROWS_WITH(qeft::permute_columns(permutation::identity(5), m),
                    contains("in_channels is 64"));
  CHECK_THROWS_WITH(qeft::permute_rows(permutation::identity(5), m), contains("out_channels is 2"));
}

TEST_CASE("top_k is the k largest, ties to the lower column") {
  CHECK(qeft::top_k(std::vector<double>{1, 5, 5, 2}, 2) == std::vector<std::int32_t>{1, 2});
  CHECK(qeft::top_k(std::vector<double>{5, 1, 5, 5}, 2) == std::vector<std::int32_t>{0, 2});
  CHECK(qeft::top_k(std::vector<double>{1}, 0).empty());
  CHECK_THROWS_WITH(qeft::top_k(std::vector<double>{1, NAN}, 1), contains("column 1"));
  CHECK_THROWS_WITH(qeft::top_k(std::vector<double>{1, -2}, 1), contains("not negative"));
  CHECK_THROWS_WITH(qeft::top_k(std::vector<double>{1, 2}, 3), contains("k is 3"));
  CHECK(qeft::hessian_perturbation(std::vector<double>{2, 3}, std::vector<double>{5, 7}) ==
        std::vector<double>{10, 21});
}

TEST_CASE("top_k_per_head shares channels among the query heads of a value head") {
  // 4 query heads, 2 value heads, head_dim 3.
  const std::vector<double> s{1, 0, 0, 0, 0, 9, 0, 2, 0, 1, 0, 0};
  CHECK(qeft::top_k_per_head(s, 4, 2, 4) == std::vector<std::int32_t>{2, 5, 7, 10});
  CHECK_THROWS_AS(qeft::top_k_per_head(s, 4, 2, 3), qeft::error);
  CHECK_THROWS_AS(qeft::top_k_per_head(s, 4, 3, 4), qeft::error);
}

TEST_CASE("by_sensitivity sorts robust channels and leaves the weak ones last, in order") {
  const std::vector<double> s{1, 7, 3, 7, 0, 9};
  CHECK(qeft::by_sensitivity(s, {}).source() == std::vector<std::int32_t>{5, 1, 3, 2, 0, 4});
  CHECK(qeft::by_sensitivity(s, {0, 5}).source() == std::vector<std::int32_t>{1, 3, 2, 4, 0, 5});
  CHECK(qeft::by_sensitivity(s, {0, 1, 2, 3, 4, 5}).is_identity());
  CHECK_THROWS_WITH(qeft::by_sensitivity(std::vector<double>{1, NAN}, {}), contains("column 1"));
  CHECK_THROWS_AS(qeft::by_sensitivity(s, {6}), qeft::error);
}

TEST_CASE("by_sensitivity_per_head sorts all query heads of a value head alike") {
  // 4 query heads, 2 value heads, head_dim 3; added up: 1 3 2 and 5 1 4.
  const std::vector<double> s{1, 0, 2, 0, 3, 0, 5, 0, 0, 0, 1, 4};
  CHECK(qeft::by_sensitivity_per_head(s, 4, 2, {}).source() ==
        std::vector<std::int32_t>{1, 2, 0, 4, 5, 3, 6, 8, 7, 9, 11, 10});
  CHECK(qeft::by_sensitivity_per_head(s, 4, 2, {1, 4, 6, 9}).source() ==
        std::vector<std::int32_t>{2, 0, 1, 5, 3, 4, 8, 7, 6, 11, 10, 9});
  CHECK_THROWS_WITH(qeft::by_sensitivity_per_head(s, 4, 2, {1, 5}),
                    contains("the weak columns of head 1"));
  CHECK_THROWS_AS(qeft::by_sensitivity_per_head(s, 4, 2, {12}), qeft::error);
  CHECK_THROWS_WITH(qeft::by_sensitivity_per_head(s, 4, 3, {}), contains("heads is 4"));
}

TEST_CASE("global selection follows Algorithm 1 and, on request, the published code") {
  const std::vector<double> a{4, 3, 2, 1, 0};
  const std::vector<double> b{0, 2, 3, 4, 1};
  qeft::global_selection paper(5, 2);
  paper.add(a);
  paper.add(b);
  CHECK(paper.sum() == std::vector<double>{2, 1.5, 1.5, 2, 0});
  CHECK(paper.choose() == std::vector<std::int32_t>{0, 3});
  qeft::global_selection published(5, 2, qeft::accumulation::all_columns);
  published.add(a);
  published.add(b);
  CHECK(published.sum() == std::vector<double>{2, 2.5, 2.5, 2.5, 0.5});
  CHECK(published.choose() == std::vector<std::int32_t>{1, 2});

  qeft::global_selection dead(2, 1);
  dead.add(std::vector<double>{0, 0});
  CHECK(dead.sum() == std::vector<double>{0, 0});
  CHECK_THROWS_WITH(dead.add(std::vector<double>{0}), contains("the stream has 2"));
}

TEST_CASE("a plan checks what it is told") {
  qeft::reorder_graph graph;
  const auto stream = graph.add_space("stream", 6);
  const auto value = graph.add_space("value", 4, 2);
  const auto attention = graph.add_repeated_space("attention", value, 3);
  graph.add_tensor("o", stream, attention);
  graph.add_tensor("v", value, stream);
  CHECK_THROWS_WITH(graph.add_tensor("o", stream, stream), contains("described twice"));
  CHECK_THROWS_WITH(graph.add_tensor("x", 17, stream), contains("does not exist"));
  CHECK_THROWS_AS(graph.add_space("bad", 5, 2), qeft::error);

  qeft::reorder_plan plan(graph);
  CHECK_THROWS_WITH(plan.set(stream, permutation::identity(5)), contains("must have 6"));
  CHECK_THROWS_WITH(plan.set(value, permutation({2, 1, 0, 3})), contains("leaves its head"));
  CHECK_THROWS_WITH(plan.set(attention, permutation::identity(12)), contains("follows value"));
  plan.set(value, permutation({1, 0, 2, 3}));
  CHECK(plan.columns("o")->source() ==
        std::vector<std::int32_t>{1, 0, 3, 2, 5, 4, 6, 7, 8, 9, 10, 11});
  CHECK(plan.rows("o")->is_identity());
  CHECK(plan.rows("v") == &plan.of(value));
  CHECK_THROWS_WITH(plan.rows("norm"), contains("not in the graph"));
}
