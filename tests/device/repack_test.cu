// SPDX-License-Identifier: Apache-2.0
// Layers in other layouts and with their rows in another order, on the device: the bytes of the
// host, for random layers.
#include <numeric>

#include "device/support.cuh"
#include "qeft/container/repack.hpp"
#include "qeft/qeft.cuh"
#include "qeft/reorder/permute_matrix.hpp"

namespace {

using namespace qeft_test;
using qeft::errc;
using qeft::index_t;
using qeft::matrix_descriptor;
using qeft::on_stream;
using qeft::layout::fragment;
using qeft::layout::row_packed;
using qeft::layout::simd_tile;

/// A layout of tiles of three rows and four columns whose neighbours share words: column c of tile t
/// is in byte c of word t + c, planes together. Zero points lie between the scales.
struct odd_layout {
  using extent = qeft::layout::extent;
  static constexpr const char* name = "odd";
  static constexpr bool zeros_in_scales = true;
  static constexpr index_t rows = 3;
  template <int Bits>
  static constexpr index_t columns = 4;

  /// Words of three rows.
  QEFT_HOST_DEVICE static constexpr index_t row_words(const extent& e) {
    return 3 * (qeft::ceil_div(e.dense, 4) + 3);
  }
  template <int Bits>
  QEFT_HOST_DEVICE static constexpr index_t code_words(const extent& e) {
    return qeft::ceil_div(e.out_channels, rows) * row_words(e);
  }
  template <int Bits>
  QEFT_HOST_DEVICE static constexpr index_t tile_word(const extent& e, int /*p*/, index_t n_tile,
                                                      index_t k_tile) {
    return n_tile * row_words(e) + 3 * k_tile;
  }
  template <int Bits>
  QEFT_HOST_DEVICE static constexpr qeft::layout::tile_address locate_in_tile(int p, int r, int c) {
    return {3 * c + r, 8 * c + qeft::bit_planes<Bits>::shift(p)};
  }

  QEFT_HOST_DEVICE static constexpr index_t scale_count(const extent& e) {
    return 2 * e.out_channels * e.groups;
  }
  QEFT_HOST_DEVICE static constexpr index_t scale_index(const extent& e, index_t n, index_t g) {
    return 2 * (g * e.out_channels + n);
  }
  QEFT_HOST_DEVICE static constexpr index_t zero_index(const extent& e, index_t n, index_t g) {
    return scale_index(e, n, g) + 1;
  }
  template <int Bits>
  QEFT_HOST_DEVICE static constexpr qeft::code_address locate_zero(const extent& e, int p,
                                                                   index_t n, index_t g) {
    return {scale_index(e, n, g) / 2, 16 + qeft::bit_planes<Bits>::shift(p)};
  }
  QEFT_HOST_DEVICE static constexpr index_t weak_count(const extent& e) {
    return e.out_channels * e.weak;
  }
  QEFT_HOST_DEVICE static constexpr index_t weak_index(const extent& e, index_t n, index_t j) {
    return j * e.out_channels + n;
  }
};

template <class Layout>
using on_device = qeft::quantized_matrix<Layout, qeft::device_memory>;

/// A matrix that holds something else before, with an index of its own.
template <class Layout>
on_device<Layout> used_matrix(const matrix_descriptor& d) {
  std::vector<std::int32_t> index(
      d.weak == qeft::weak_kind::indexed ? static_cast<std::size_t>(d.weak_columns) : 0);
  std::iota(index.begin(), index.end(), 0);
  on_device<Layout> w(d, index);
  for (const auto part : {w.codes(), w.scales(), w.zeros(), w.weak()}) {
    if (part.empty()) continue;
    check(cudaMemset(part.data(), 0x5a, static_cast<std::size_t>(part.size())), "cudaMemset");
  }
  return w;
}

template <class Layout>
void expect_same(const on_device<Layout>& got, const qeft::quantized_matrix<Layout>& expected,
                 const char* what) {
  check(cudaDeviceSynchronize(), what);
  if (!same_bytes(qeft::quantized_matrix<Layout>(got), expected)) {
    fail(std::string(what) + " to " + Layout::name + ", " + describe(expected.descriptor()));
  }
}

template <class From, class To>
void compare(const qeft::quantized_matrix<row_packed>& rows, const qeft::permutation& p) {
  const qeft::on_host host(1);
  const on_device<From> from(qeft::repack<From>(host, rows));
  auto to = used_matrix<To>(rows.descriptor());
  if (const auto s = repack(on_stream{}, from, to); !s.ok()) fail("repack: " + s.message());
  expect_same(to, qeft::repack<To>(host, rows), "repack");

  const auto source = to_device(p.source());
  auto permuted = used_matrix<To>(rows.descriptor());
  if (const auto s = permute_rows(on_stream{}, source.data(), from, permuted); !s.ok()) {
    fail("permute_rows: " + s.message());
  }
  expect_same(permuted, qeft::repack<To>(host, permute_rows(p, rows)), "permute_rows");
}

qeft::permutation random_permutation(index_t size, random_source& random) {
  std::vector<std::int32_t> source(static_cast<std::size_t>(size));
  std::iota(source.begin(), source.end(), 0);
  for (index_t i = size - 1; i > 0; --i) {
    std::swap(source[static_cast<std::size_t>(i)],
              source[static_cast<std::size_t>(random.integer(0, i))]);
  }
  return qeft::permutation(std::move(source));
}

void compare_random_layers(int count, std::uint64_t seed) {
  for (int i = 0; i < count; ++i, ++seed) {
    random_source random(seed);
    const auto rows = pack<row_packed>(random_case(random, 20000));
    const auto p = random_permutation(rows.descriptor().out_channels, random);
    switch (random.integer(0, 5)) {
      case 0:
        compare<fragment, row_packed>(rows, p);
        break;
      case 1:
        compare<fragment, fragment>(rows, p);
        break;
      case 2:
        compare<row_packed, odd_layout>(rows, p);
        break;
      case 3:
        compare<odd_layout, fragment>(rows, p);
        break;
      case 4:
        compare<simd_tile, row_packed>(rows, p);
        break;
      default:
        compare<row_packed, fragment>(rows, p);
    }
  }
}

void check_capture() {
  auto layer = layer_of(40, 300, 16);
  layer.d.weak = qeft::weak_kind::indexed;
  random_source random(6);
  layer = random_layer(layer.d, random);
  const auto rows = pack<row_packed>(layer);
  const auto p = random_permutation(40, random);
  const on_device<row_packed> from(rows);
  const auto source = to_device(p.source());
  auto to = used_matrix<fragment>(layer.d);
  in_graph([&](cudaStream_t s) { return permute_rows(on_stream{s}, source.data(), from, to); });
  expect_same(to, qeft::repack<fragment>(qeft::on_host(1), permute_rows(p, rows)), "a graph");
}

void check_refusals() {
  const auto layer = layer_of(40, 300, 16);
  const on_device<row_packed> from(pack<row_packed>(layer));
  matrix_descriptor d = layer.d;
  const auto refused = [&](const char* word) {
    on_device<fragment> to(d);
    check_refused(repack(on_stream{}, from, to), errc::invalid_argument, word);
    d = layer.d;
  };
  d.out_channels = 41;
  refused("out_channels is 40 in from, but 41");
  d.in_channels = 301;
  refused("in_channels");
  d.bits = 3;
  refused("bits is 4");
  d.group_size = 64;
  refused("group_size");
  d.zero = qeft::zero_kind::scaled;
  refused("zero is integer");
  d.scalar = qeft::scalar_kind::bf16;
  refused("scalar is f16");
  d.weak = qeft::weak_kind::per_head;
  refused("weak is tail");
  d.weak_columns = 15;
  refused("weak_columns is 16");

  on_device<row_packed> to(layer.d);
  check_refused(permute_rows(on_stream{}, nullptr, from, to), errc::invalid_argument, "null");
  check_refused(repack(on_stream{}, to, to), errc::invalid_argument, "one matrix");
  check(supports_repack(on_stream{}, from, to).ok(), "supports_repack");
  const on_device<row_packed> empty;
  on_device<fragment> nothing;
  check(repack(on_stream{}, empty, nothing).ok(), "an empty matrix");
  check(permute_rows(on_stream{}, nullptr, empty, nothing).ok(), "an empty matrix");
}

}  // namespace

int main(int argc, char** argv) {
  if (!has_device()) return 77;
  check_capture();
  check_refusals();
  const int count = argc > 1 ? std::atoi(argv[1]) : 400;
  const auto seed = static_cast<std::uint64_t>(argc > 2 ? std::atoi(argv[2]) : 1);
  compare_random_layers(count, seed);
  std::printf("%d random layers, %d failures\n", count, failures);
  return failures == 0 && count > 0 ? 0 : 1;
}
