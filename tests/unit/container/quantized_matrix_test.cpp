// SPDX-License-Identifier: Apache-2.0
// The owner and its views: round trips, padding, relabelling, mismatches.
#include "qeft/container/quantized_matrix.hpp"

#include <algorithm>
#include <cstring>
#include <new>
#include <type_traits>
#include <vector>

#include "qeft/container/repack.hpp"
#include "qeft/reorder/permute_matrix.hpp"
#include "support/cases.hpp"
#include "support/catch.hpp"
#include "support/sweep.hpp"
#include "support/throws.hpp"

using qeft::index_t;
using qeft::matrix_descriptor;
using qeft::quantized_matrix;
using qeft::weak_kind;
using qeft::zero_kind;
using qeft::layout::row_packed;
using qeft::layout::simd_tile;
using qeft_test::codes_of;
using qeft_test::dequantized;
using qeft_test::same_bytes;
using qeft_test::throws_with;

namespace {

matrix_descriptor shape(weak_kind weak, index_t k) {
  matrix_descriptor d;
  d.out_channels = 45;
  d.in_channels = 200;
  d.group_size = 64;
  d.weak = weak;
  d.weak_columns = k;
  d.heads = weak == weak_kind::per_head ? 4 : 1;
  return d;
}

template <class Layout>
void check_all_formats() {
  qeft_test::sweep counted("formats");
  qeft_test::random_source random(3);
  for (const int bits : {2, 3, 4, 8}) {
    for (const auto zero : {zero_kind::symmetric, zero_kind::integer, zero_kind::scaled}) {
      for (const auto scalar : {qeft::scalar_kind::half, qeft::scalar_kind::bf16}) {
        for (const auto weak :
             {weak_kind::none, weak_kind::tail, weak_kind::indexed, weak_kind::per_head}) {
          matrix_descriptor d = shape(weak, weak == weak_kind::none ? 0 : 12);
          d.bits = bits;
          d.zero = zero;
          d.scalar = scalar;
          const auto layer = qeft_test::random_layer(d, random);
          const auto q = qeft_test::pack<Layout>(layer);
          CHECK(codes_of(q) == layer.codes);
          CHECK(dequantized(q) == weights_of(layer));
          bool same = true;
          for (index_t n = 0; n < d.out_channels; ++n) {
            for (index_t g = 0; g < d.groups(); ++g) {
              const auto at = static_cast<std::size_t>(n * d.groups() + g);
              const qeft::stored_params params = q.read_params(n, g);
              same =
                  same && params.scale_bits == layer.scales[at] && params.zero == layer.zeros[at];
            }
          }
          CHECK(same);
          counted.ran();
        }
      }
    }
  }
}

/// Every code, parameter and weak value with all bits set: what is still zero is padding.
template <class Layout>
void check_padding() {
  for (const int bits : {2, 3, 4, 8}) {
    matrix_descriptor d = shape(weak_kind::tail, 7);
    d.bits = bits;
    quantized_matrix<Layout> q(d);
    for (index_t n = 0; n < d.out_channels; ++n) {
      for (index_t i = 0; i < d.dense_columns(); ++i) q.write_code(n, i, 0xffU);
      for (index_t g = 0; g < d.groups(); ++g) q.write_params(n, g, 0xffff, 0xffU);
      for (index_t j = 0; j < d.weak_columns; ++j) q.write_weak(n, j, 0xffff);
    }
    const auto ones = [](qeft::span<const std::byte> bytes) {
      index_t count = 0;
      for (const std::byte b : bytes) {
        for (unsigned i = 0; i < 8; ++i) count += (std::to_integer<unsigned>(b) >> i) & 1U;
      }
      return count;
    };
    CHECK(ones(q.codes()) == d.out_channels * d.dense_columns() * bits);
    CHECK(ones(q.scales()) == d.out_channels * d.groups() * 16);
    CHECK(ones(q.zeros()) == d.out_channels * d.groups() * bits);
    CHECK(ones(q.weak()) == d.out_channels * d.weak_columns * 16);
  }
}

using half4 = qeft::quant_format<4>;

}  // namespace

TEST_CASE("row_packed holds every format and placement") { check_all_formats<row_packed>(); }
TEST_CASE("simd_tile holds every format and placement") { check_all_formats<simd_tile>(); }

TEST_CASE("writers never touch padding") {
  check_padding<row_packed>();
  check_padding<simd_tile>();
}

TEST_CASE("a fresh matrix is all zeros and cache-line aligned") {
  const quantized_matrix<simd_tile> q(shape(weak_kind::tail, 7));
  const auto zeros = [](qeft::span<const std::byte> bytes) {
    return !bytes.empty() && reinterpret_cast<std::uintptr_t>(bytes.data()) % 64 == 0 &&
           std::all_of(bytes.begin(), bytes.end(), [](std::byte b) { return b == std::byte{0}; });
  };
  CHECK(zeros(q.codes()));
  CHECK(zeros(q.scales()));
  CHECK(zeros(q.zeros()));
  CHECK(zeros(q.weak()));
  CHECK(quantized_matrix<>().codes().empty());
}

TEST_CASE("rewriting replaces codes, parameters and weak values") {
  matrix_descriptor d = shape(weak_kind::tail, 7);
  d.bits = 3;
  quantized_matrix<> q(d);
  for (const unsigned value : {7U, 0U, 5U, 2U}) {
    q.write_code(44, 192, value);
    q.write_params(44, 3, static_cast<std::uint16_t>(value + 100), value);
    q.write_weak(44, 6, static_cast<std::uint16_t>(value));
    const auto view = q.view<qeft::quant_format<3>>(qeft::weak_tail<>{{7}});
    CHECK(read_code(view, 44, 192) == value);
    CHECK(read_code(view, 44, 191) == 0);
    CHECK(q.read_params(44, 3).scale_bits == value + 100);
    CHECK(q.read_params(44, 3).zero == value);
    CHECK(read_params(view, 44, 3).zero == static_cast<float>(value));
    CHECK(view.weak_values[44 * 7 + 6].bits == value);
  }
}

TEST_CASE("views are trivially copyable and resolve the group size") {
  using fixed = qeft::quantized_matrix_view<qeft::quant_format<4, 64>, qeft::weak_tail<7>>;
  STATIC_REQUIRE(std::is_trivially_copyable_v<fixed>);
  STATIC_REQUIRE(std::is_trivially_copyable_v<
                 qeft::quantized_matrix_view<half4, qeft::weak_indexed<>, simd_tile>>);
  const quantized_matrix<> q(shape(weak_kind::tail, 7));
  const fixed view = q.view<qeft::quant_format<4, 64>>(qeft::weak_tail<7>{});
  CHECK(view.columns_per_group == 64);
  CHECK(view.groups == 4);
  CHECK(view.group_of(63) == 0);
  CHECK(view.group_of(64) == 1);
  CHECK(view.dense_columns() == 193);
  CHECK(view.weak_columns() == 7);

  matrix_descriptor d = shape(weak_kind::tail, 200);
  d.group_size = qeft::per_channel;
  const quantized_matrix<> weak_only(d);
  const auto empty = weak_only.view<half4>(qeft::weak_tail<>{{200}});
  CHECK(empty.groups == 0);
  CHECK(empty.columns_per_group == 1);  // never a divisor of zero
  d.weak_columns = 0;
  const quantized_matrix<> dense(d);
  CHECK(dense.view<half4>(qeft::weak_tail<>{{0}}).columns_per_group == 200);
}

TEST_CASE("a view of the wrong type is refused") {
  using qeft::errc;
  const quantized_matrix<> q(shape(weak_kind::tail, 7));
  const auto refuse = [&](std::initializer_list<const char*> text, const auto& make) {
    CHECK(throws_with(errc::invalid_argument, text, make));
  };
  refuse({"Format is 3-bit/integer/f16/g=any"},
         [&] { (void)q.view<qeft::quant_format<3>>(qeft::weak_tail<>{{7}}); });
  refuse({"Format is 4-bit/integer/f16/g=128"},
         [&] { (void)q.view<qeft::quant_format<4, 128>>(qeft::weak_tail<>{{7}}); });
  refuse({"4-bit/scaled"}, [&] {
    (void)q.view<qeft::quant_format<4, 64, zero_kind::scaled>>(qeft::weak_tail<>{{7}});
  });
  refuse({"bf16"}, [&] {
    (void)q.view<qeft::quant_format<4, 64, zero_kind::integer, qeft::bf16_bits>>(
        qeft::weak_tail<>{{7}});
  });
  refuse({"Weak is none with k = 0", "the matrix has tail with k = 7"},
         [&] { (void)q.view<half4>(qeft::weak_none{}); });
  refuse({"Weak is tail with k = 8"}, [&] { (void)q.view<half4>(qeft::weak_tail<8>{}); });
  refuse({"Weak is per_head"}, [&] { (void)q.view<half4>(qeft::weak_per_head<>{{7}, 1}); });

  matrix_descriptor heads = shape(weak_kind::per_head, 0);
  heads.in_channels = 64;
  heads.weak_columns = 8;
  heads.heads = 4;
  const quantized_matrix<> p(heads);
  refuse({"heads = 2", "heads = 4"}, [&] { (void)p.view<half4>(qeft::weak_per_head<>{{8}, 2}); });
  const quantized_matrix<> i(shape(weak_kind::indexed, 2), std::vector<std::int32_t>{3, 5});
  const std::int32_t same[] = {3, 5};
  const std::int32_t other[] = {3, 6};
  CHECK(i.view<half4>(qeft::weak_indexed<>{{2}, same}).weak_columns() == 2);
  refuse({"holds 6 at 1", "column 5"}, [&] {
    (void)i.view<half4>(qeft::weak_indexed<>{{2}, other});
  });
  refuse({"is null", "column 3"}, [&] { (void)i.view<half4>(qeft::weak_indexed<>{{2}, nullptr}); });
}

TEST_CASE("the weak index must ascend, fit and belong to indexed") {
  using qeft::errc;
  const auto make = [](weak_kind kind, index_t k, std::vector<std::int32_t> index) {
    return [=] { (void)quantized_matrix<>(shape(kind, k), index); };
  };
  CHECK(throws_with(errc::invalid_argument, {"has 2 entries, but must have 3"},
                    make(weak_kind::indexed, 3, {1, 2})));
  CHECK(throws_with(errc::invalid_argument, {"has 1 entries, but must have 0"},
                    make(weak_kind::tail, 1, {199})));
  CHECK(throws_with(errc::invalid_argument, {"holds 5 after 5", "must ascend"},
                    make(weak_kind::indexed, 3, {1, 5, 5})));
  CHECK(throws_with(errc::invalid_argument, {"holds 4 after 5"},
                    make(weak_kind::indexed, 2, {5, 4})));
  CHECK(throws_with(errc::invalid_argument, {"holds -1"}, make(weak_kind::indexed, 1, {-1})));
  CHECK(throws_with(errc::invalid_argument, {"holds 200", "below in_channels = 200"},
                    make(weak_kind::indexed, 1, {200})));
  CHECK(throws_with(errc::invalid_argument, {"bits is 5"}, [] {
    matrix_descriptor d = shape(weak_kind::none, 0);
    d.bits = 5;
    (void)quantized_matrix<>(d);
  }));
  const std::vector<std::int32_t> ends = {0, 199};
  CHECK(quantized_matrix<>(shape(weak_kind::indexed, 2), ends).weak_index() == ends);
}

TEST_CASE("repack gives the same bytes for any number of threads and undoes itself") {
  qeft_test::random_source random(8);
  for (const int bits : {2, 3, 4, 8}) {
    matrix_descriptor d = shape(weak_kind::indexed, 5);
    d.out_channels = 131;
    d.bits = bits;
    const auto layer = qeft_test::random_layer(d, random);
    const auto rows = qeft_test::pack<row_packed>(layer);
    const auto tiles = qeft_test::pack<simd_tile>(layer);
    for (const int threads : {1, 2, 5}) {
      const qeft::on_host exec(threads);
      CHECK(same_bytes(qeft::repack<simd_tile>(exec, rows), tiles));
      CHECK(same_bytes(qeft::repack<row_packed>(exec, tiles), rows));
      CHECK(same_bytes(qeft::repack<row_packed>(exec, rows), rows));
      CHECK(same_bytes(qeft::repack<simd_tile>(exec, tiles), tiles));
    }
  }
}

namespace {

/// A bump allocator that counts what is alive, as a user would pass to an owner.
struct arena {
  std::vector<std::byte> bytes = std::vector<std::byte>(1 << 20);
  std::size_t used = 0;
  int alive = 0;
};
struct arena_memory {
  using space = qeft::host_memory;
  arena* from;
  void* allocate(std::size_t size) {
    used_up(size);
    const auto base = reinterpret_cast<std::uintptr_t>(from->bytes.data());
    const std::uintptr_t at = (base + from->used + 63) / 64 * 64;
    from->used = at - base + size;
    ++from->alive;
    return reinterpret_cast<void*>(at);
  }
  void deallocate(void*, std::size_t) noexcept { --from->alive; }
  void used_up(std::size_t size) const {
    if (from->used + size + 64 > from->bytes.size()) throw std::bad_alloc();
  }
};

/// It clears and copies itself, as a policy for a device does, and fails at it.
struct failing_memory : arena_memory {
  using space = qeft::device_memory;
  void clear(void*, std::size_t) { throw std::runtime_error("clear"); }
  void upload(void*, const void*, std::size_t) { throw std::runtime_error("upload"); }
};

}  // namespace

TEST_CASE("an owner takes its memory, index included, from the policy it is given") {
  qeft_test::random_source random(11);
  const auto layer = qeft_test::random_layer(shape(weak_kind::indexed, 5), random);
  arena a;
  {
    using owner = quantized_matrix<simd_tile, arena_memory>;
    const std::vector<std::int32_t> index = layer.weak_index();
    owner q(layer.d, index, arena_memory{&a});
    CHECK(a.alive == 5);
    const std::byte* begin = a.bytes.data();
    const std::byte* end = begin + a.bytes.size();
    for (const auto part : {q.codes(), q.scales(), q.zeros(), q.weak()}) {
      CHECK(part.data() >= begin);
      CHECK(part.data() + part.size() <= end);
    }
    CHECK(reinterpret_cast<const std::byte*>(q.weak_index().data()) >= begin);
    CHECK(q.weak_index() == index);
    std::memset(a.bytes.data() + a.used, 0xff,
                a.bytes.size() - a.used);  // fresh bytes are not zero
    const owner copy = q;
    CHECK(a.alive == 10);
    CHECK(copy.codes() == q.codes());
    CHECK(copy.codes().data() != q.codes().data());
    const owner fresh(layer.d, index, arena_memory{&a});
    CHECK(std::all_of(fresh.codes().begin(), fresh.codes().end(),
                      [](std::byte b) { return b == std::byte{0}; }));
  }
  CHECK(a.alive == 0);
}

TEST_CASE("what a policy allocated is freed when it throws later") {
  arena a;
  CHECK_THROWS_WITH((qeft::buffer<float, failing_memory>(3, failing_memory{{&a}})),
                    qeft_test::contains("clear"));
  const qeft::buffer<float> host(3);
  CHECK_THROWS_WITH((qeft::buffer<float, failing_memory>(host, failing_memory{{&a}})),
                    qeft_test::contains("upload"));
  CHECK(a.used > 0);
  CHECK(a.alive == 0);
}

TEST_CASE("an owner that was moved from is empty") {
  qeft_test::random_source random(12);
  const auto layer = qeft_test::random_layer(shape(weak_kind::indexed, 5), random);
  auto q = qeft_test::pack<row_packed>(layer);
  const auto taken = std::move(q);
  CHECK(codes_of(taken) == layer.codes);
  CHECK(q.descriptor() == matrix_descriptor{});  // NOLINT: that is the point
  CHECK(q.codes().empty());
  CHECK(q.weak_index().empty());
  const qeft::on_host exec(1);
  CHECK(qeft::repack<simd_tile>(exec, q).codes().empty());
  CHECK(qeft::permute_rows(qeft::permutation(), q).codes().empty());
  CHECK(qeft::permute_columns(qeft::permutation(), q).codes().empty());
  int views = 0;
  q.visit([&](const auto& view) { views += view.out_channels == 0 ? 1 : 100; });
  CHECK(views == 1);
}
