// SPDX-License-Identifier: Apache-2.0
// What happens to a layer between file and kernel: packing, unpacking, repacking, permuting.
// `of_read` counts the bytes read and written: packed ones, and unpacked codes of a byte each.
#include "qeft/container/pack.hpp"
#include "qeft/container/repack.hpp"
#include "qeft/layout/simd_tile.hpp"
#include "qeft/reorder/permute_matrix.hpp"
#include "support/main.hpp"

namespace {

using namespace qeft_bench;
using qeft::layout::row_packed;
using qeft::layout::simd_tile;

enum class direction { pack, unpack };

/// The codes of a layer, row by row.
template <int Bits>
void convert_rows(benchmark::State& state, const shape& s, direction way) {
  const auto d = describe(s, Bits, 128, 16);
  const qeft::layout::extent e = d.extent();
  std::vector<std::uint8_t> codes(static_cast<std::size_t>(e.out_channels * e.dense));
  for (std::size_t i = 0; i < codes.size(); ++i) {
    codes[i] = static_cast<std::uint8_t>((i * 37 / 5) & ((1U << Bits) - 1U));
  }
  std::vector<std::uint8_t> back(codes.size());
  const index_t row = row_packed::row_words<Bits>(e);
  std::vector<std::uint32_t> words(static_cast<std::size_t>(row_packed::code_words<Bits>(e)));
  const auto pack = [&] {
    for (index_t n = 0; n < e.out_channels; ++n) {
      qeft::pack_array<Bits>(codes.data() + n * e.dense, e.dense, words.data() + n * row);
    }
  };
  const auto unpack = [&] {
    for (index_t n = 0; n < e.out_channels; ++n) {
      qeft::unpack_array<Bits>(words.data() + n * row, e.dense, back.data() + n * e.dense);
    }
  };
  pack();
  rate measured(state);
  for (auto _ : state) {
    way == direction::pack ? pack() : unpack();
    benchmark::ClobberMemory();
  }
  measured.bytes(machines().front(), e.out_channels * e.dense + 4 * row * e.out_channels);
  unpack();
  if (back != codes) throw std::runtime_error("wrong result");
}

template <int Bits>
void add_conversions(const std::string& name, const shape& s) {
  add(name + "pack/1t",
      [=](benchmark::State& state) { convert_rows<Bits>(state, s, direction::pack); });
  add(name + "unpack/1t",
      [=](benchmark::State& state) { convert_rows<Bits>(state, s, direction::unpack); });
}

template <class Matrix>
void require_equal(const Matrix& a, const Matrix& b) {
  if (!(a.codes() == b.codes() && a.scales() == b.scales() && a.zeros() == b.zeros() &&
        a.weak() == b.weak())) {
    throw std::runtime_error("wrong result");
  }
}

template <class To, class From>
void repack(benchmark::State& state, const machine& m, const qeft::matrix_descriptor& d) {
  const auto from = qeft::repack<From>(m.exec, random_matrix(d));
  rate measured(state);
  for (auto _ : state) {
    const auto to = qeft::repack<To>(m.exec, from);
    benchmark::DoNotOptimize(to.codes().data());
  }
  measured.bytes(m, qeft::storage_of<To>(d).total() + qeft::storage_of<From>(d).total());
  const auto back = qeft::repack<From>(m.exec, qeft::repack<To>(m.exec, from));
  require_equal(back, from);
}

void permute(benchmark::State& state, const qeft::matrix_descriptor& d) {
  const auto w = random_matrix(d);
  std::vector<std::int32_t> reversed(static_cast<std::size_t>(d.out_channels));
  for (std::size_t i = 0; i < reversed.size(); ++i) {
    reversed[i] = static_cast<std::int32_t>(reversed.size() - 1 - i);
  }
  const qeft::permutation p(reversed);
  rate measured(state);
  for (auto _ : state) {
    const auto to = qeft::permute_rows(p, w);
    benchmark::DoNotOptimize(to.codes().data());
  }
  measured.bytes(machines().front(), 2 * qeft::storage_of(d).total());
  require_equal(qeft::permute_rows(p, qeft::permute_rows(p, w)), w);
}

}  // namespace

int main(int argc, char** argv) {
  return run(argc, argv, [] {
    for (const shape& s : shapes) {
      const std::string name = s.name;
      add_conversions<4>(name + "/4bit/", s);
      add_conversions<3>(name + "/3bit/", s);
      for (const int bits : {4, 3}) {
        const auto d = describe(s, bits, 128, 16);
        const std::string full = name + "/" + std::to_string(bits) + "bit/";
        add(full + "permute_rows/1t", [=](benchmark::State& state) { permute(state, d); });
        for (const machine& m : machines()) {
          add(full + "repack/" + threads_of(m),
              [=, &m](benchmark::State& state) { repack<simd_tile, row_packed>(state, m, d); });
        }
      }
    }
  });
}
