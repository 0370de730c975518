// SPDX-License-Identifier: Apache-2.0
// 2,000 random layers: packing, both layouts, repacking and permuting rows against plain arrays.
#include <algorithm>
#include <numeric>

#include "qeft/container/repack.hpp"
#include "qeft/reorder/permute_matrix.hpp"
#include "support/cases.hpp"
#include "support/catch.hpp"
#include "support/sweep.hpp"

using qeft::index_t;
using qeft::layout::row_packed;
using qeft::layout::simd_tile;
using qeft_test::codes_of;
using qeft_test::dequantized;
using qeft_test::plain_layer;
using qeft_test::random_source;
using qeft_test::same_bytes;

namespace {

qeft::permutation random_permutation(index_t size, random_source& random) {
  std::vector<std::int32_t> source(static_cast<std::size_t>(size));
  std::iota(source.begin(), source.end(), 0);
  for (index_t i = size - 1; i > 0; --i) {
    std::swap(source[static_cast<std::size_t>(i)],
              source[static_cast<std::size_t>(random.integer(0, i))]);
  }
  return qeft::permutation(std::move(source));
}

/// The plain layer with its rows permuted.
plain_layer permuted(const qeft::permutation& p, const plain_layer& layer) {
  plain_layer result = layer;
  const auto rows = [&](auto& data, index_t columns) {
    const auto old = data;
    for (index_t n = 0; n < p.size(); ++n) {
      std::copy_n(old.begin() + p[n] * columns, columns, data.begin() + n * columns);
    }
  };
  rows(result.codes, layer.d.dense_columns());
  rows(result.scales, layer.d.groups());
  rows(result.zeros, layer.d.groups());
  rows(result.weak, layer.d.weak_columns);
  return result;
}

}  // namespace

TEST_CASE("random layers: pack, unpack, repack and permute equal the definition") {
  const qeft::on_host exec(2);
  qeft_test::fuzz("layers", 2000, [&](std::uint64_t seed) {
    random_source random(seed);
    const plain_layer layer = qeft_test::random_case(random, 30000);
    INFO(qeft_test::describe(layer.d));
    const std::vector<float> weights = weights_of(layer);
    const auto rows = qeft_test::pack<row_packed>(layer);
    const auto tiles = qeft_test::pack<simd_tile>(layer);

    CHECK(codes_of(rows) == layer.codes);
    CHECK(codes_of(tiles) == layer.codes);
    CHECK(dequantized(rows) == weights);
    CHECK(dequantized(tiles) == weights);

    CHECK(same_bytes(qeft::repack<simd_tile>(exec, rows), tiles));
    CHECK(same_bytes(qeft::repack<row_packed>(exec, tiles), rows));

    const qeft::permutation p = random_permutation(layer.d.out_channels, random);
    CHECK(same_bytes(qeft::permute_rows(p, rows), qeft_test::pack<row_packed>(permuted(p, layer))));

    CHECK(rows.codes().size() + rows.scales().size() + rows.zeros().size() + rows.weak().size() +
              4 * static_cast<index_t>(rows.weak_index().size()) ==
          qeft::storage_of(layer.d).total());
  });
}

TEST_CASE("random cases reach the corners") {
  // If random_case stopped producing these, the fuzz test would lose its worth in silence.
  int none = 0, all = 0, ragged = 0, wide = 0, tall = 0, heads = 0, odd = 0, per_channel = 0;
  for (std::uint64_t seed = 1; seed <= 2000; ++seed) {
    random_source random(seed);
    const qeft::matrix_descriptor d = qeft_test::random_case(random, 100).d;
    none += d.weak_columns == 0 ? 1 : 0;
    all += d.weak_columns == d.in_channels ? 1 : 0;
    ragged += d.group_size > 0 && d.groups() > 1 && d.dense_columns() % d.group_size != 0 ? 1 : 0;
    wide += d.in_channels == 29568 ? 1 : 0;
    tall += d.out_channels == 29568 ? 1 : 0;
    heads += d.heads > 1 && d.weak_columns > 0 ? 1 : 0;
    odd += d.in_channels % 2 == 1 && d.out_channels % 2 == 1 ? 1 : 0;
    per_channel += d.group_size == qeft::per_channel && d.in_channels > 32 ? 1 : 0;
  }
  CHECK(none > 100);
  CHECK(all > 100);
  CHECK(ragged > 100);
  CHECK(wide > 50);
  CHECK(tall > 50);
  CHECK(heads > 50);
  CHECK(odd > 100);
  CHECK(per_channel > 50);
}
