// SPDX-License-Identifier: Apache-2.0
// Weak-column policies are bijections between input columns and the two dense blocks.
#include "qeft/format/weak_columns.hpp"

#include <algorithm>
#include <vector>

#include "support/catch.hpp"
#include "support/sweep.hpp"

using qeft::index_t;

namespace {

/// The definition: a mark per column; both blocks number their columns in ascending order.
template <class Weak>
void check_bijection(const Weak& weak, const std::vector<bool>& is_weak) {
  const auto columns = static_cast<index_t>(is_weak.size());
  const auto k = static_cast<index_t>(std::count(is_weak.begin(), is_weak.end(), true));
  REQUIRE(weak.count() == k);
  index_t i = 0;
  index_t j = 0;
  bool same = true;
  for (index_t c = 0; c < columns; ++c) {
    const qeft::column_location at = weak.locate(c, columns);
    if (is_weak[static_cast<std::size_t>(c)]) {
      same = same && at.is_weak && at.index == j && weak.weak_column(j, columns) == c;
      ++j;
    } else {
      same = same && !at.is_weak && at.index == i && weak.dense_column(i, columns) == c;
      ++i;
    }
  }
  CHECK(same);
}

std::vector<bool> tail_marks(index_t columns, index_t k) {
  std::vector<bool> marks(static_cast<std::size_t>(columns), false);
  for (index_t c = columns - k; c < columns; ++c) marks[static_cast<std::size_t>(c)] = true;
  return marks;
}

std::vector<bool> head_marks(index_t columns, index_t k, index_t heads) {
  std::vector<bool> marks;
  for (index_t h = 0; h < heads; ++h) {
    const auto head = tail_marks(columns / heads, k / heads);
    marks.insert(marks.end(), head.begin(), head.end());
  }
  return marks;
}

std::vector<std::int32_t> index_of(const std::vector<bool>& marks) {
  std::vector<std::int32_t> index;
  for (std::size_t c = 0; c < marks.size(); ++c) {
    if (marks[c]) index.push_back(static_cast<std::int32_t>(c));
  }
  return index;
}

template <index_t K>
void check_static(index_t columns, index_t heads) {
  const auto tail = tail_marks(columns, K);
  check_bijection(qeft::weak_tail<K>{}, tail);
  const auto index = index_of(tail);
  check_bijection(qeft::weak_indexed<K>{{}, index.data()}, tail);
  check_bijection(qeft::weak_per_head<K>{{}, heads}, head_marks(columns, K, heads));
}

}  // namespace

TEST_CASE("dynamic weak-column policies are bijections") {
  qeft_test::random_source random(11);
  qeft_test::sweep counted("input channels and k");
  for (const index_t columns : {1, 2, 3, 17, 64, 576, 1000}) {
    check_bijection(qeft::weak_none{}, tail_marks(columns, 0));
    for (const index_t k :
         {index_t{0}, index_t{1}, index_t{2}, columns / 3, columns - 1, columns}) {
      if (k < 0 || k > columns) continue;
      check_bijection(qeft::weak_tail<>{{k}}, tail_marks(columns, k));
      check_bijection(qeft::weak_per_head<>{{k}, 1}, tail_marks(columns, k));
      for (int round = 0; round < 5; ++round) {
        std::vector<bool> marks = tail_marks(columns, k);
        for (index_t c = columns - 1; c > 0; --c) {  // Fisher-Yates
          const auto other = static_cast<std::size_t>(random.integer(0, c));
          const bool mark = marks[static_cast<std::size_t>(c)];
          marks[static_cast<std::size_t>(c)] = marks[other];
          marks[other] = mark;
        }
        const auto index = index_of(marks);
        check_bijection(qeft::weak_indexed<>{{k}, index.data()}, marks);
      }
      counted.ran();
    }
  }
}

TEST_CASE("weak columns per head are the tail of each head") {
  qeft_test::sweep counted("heads");
  for (const index_t heads : {1, 2, 3, 9, 32}) {
    for (const index_t head_dim : {1, 4, 64, 65}) {
      for (const index_t per : {index_t{0}, index_t{1}, head_dim / 2, head_dim}) {
        const index_t columns = heads * head_dim;
        check_bijection(qeft::weak_per_head<>{{per * heads}, heads},
                        head_marks(columns, per * heads, heads));
        counted.ran();
      }
    }
  }
}

TEST_CASE("static weak-column policies are bijections") {
  check_static<0>(64, 4);
  check_static<4>(64, 4);
  check_static<16>(576, 8);
  check_static<64>(64, 4);
  STATIC_REQUIRE(sizeof(qeft::weak_tail<16>) == 1);  // k costs nothing when it is static
}

TEST_CASE("what is a weak-column policy") {
  STATIC_REQUIRE(qeft::is_weak_policy_v<qeft::weak_none>);
  STATIC_REQUIRE(qeft::is_weak_policy_v<qeft::weak_tail<3>>);
  STATIC_REQUIRE(qeft::is_weak_policy_v<qeft::weak_indexed<>>);
  STATIC_REQUIRE(qeft::is_weak_policy_v<qeft::weak_per_head<>>);
  STATIC_REQUIRE_FALSE(qeft::is_weak_policy_v<int>);
}
