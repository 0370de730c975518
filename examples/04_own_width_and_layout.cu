// SPDX-License-Identifier: Apache-2.0
// Codes of 5 bits and a storage layout of one's own on a GPU, without a change to the library.
#include <cmath>
#include <cstdio>
#include <vector>

#include "qeft/qeft.cuh"

/// 5 bits are stored in planes of 4 bits and 1 bit.
template <>
inline constexpr bool qeft::is_width_v<5> = true;
using five_bits = qeft::quant_format<5>;

/// Columns of 32 rows, so that lanes of a warp can read rows side by side.
struct row_blocks {
  using index_t = qeft::index_t;
  using extent = qeft::layout::extent;

  static constexpr const char* name = "row_blocks";
  static constexpr bool zeros_in_scales = false;
  static constexpr index_t rows = 32;
  template <int Bits>
  static constexpr index_t columns = 32;

  QEFT_HOST_DEVICE static constexpr index_t tiles(const extent& e) {
    return qeft::ceil_div(e.out_channels, rows);
  }
  template <int Bits>
  QEFT_HOST_DEVICE static constexpr index_t code_words(const extent& e) {
    return tiles(e) * qeft::ceil_div(e.dense, 32) * 32 * Bits;
  }
  template <int Bits>
  QEFT_HOST_DEVICE static constexpr index_t tile_word(const extent& e, int p, index_t n_tile,
                                                      index_t k_tile) {
    return (n_tile * qeft::ceil_div(e.dense, 32) + k_tile) * 32 * Bits +
           qeft::bit_planes<Bits>::shift(p) * 32;
  }
  template <int Bits>
  QEFT_HOST_DEVICE static constexpr qeft::layout::tile_address locate_in_tile(int p, int r, int c) {
    const int bit = c * qeft::bit_planes<Bits>::width(p);
    return {bit / 32 * 32 + r, bit % 32};
  }
  QEFT_HOST_DEVICE static constexpr index_t scale_count(const extent& e) {
    return tiles(e) * e.groups * 32;
  }
  QEFT_HOST_DEVICE static constexpr index_t scale_index(const extent& e, index_t n, index_t g) {
    return (n / 32 * e.groups + g) * 32 + n % 32;
  }
  template <int Bits>  // a byte each
  QEFT_HOST_DEVICE static constexpr index_t zero_words(const extent& e) {
    return scale_count(e) / 4;
  }
  template <int Bits>
  QEFT_HOST_DEVICE static constexpr qeft::code_address locate_zero(const extent& e, int p,
                                                                   index_t n, index_t g) {
    const index_t i = scale_index(e, n, g);
    return {i / 4, static_cast<int>(i % 4) * 8 + qeft::bit_planes<Bits>::shift(p)};
  }
  QEFT_HOST_DEVICE static constexpr index_t weak_count(const extent& e) {
    return tiles(e) * e.weak * 32;
  }
  QEFT_HOST_DEVICE static constexpr index_t weak_index(const extent& e, index_t n, index_t j) {
    return (n / 32 * e.weak + j) * 32 + n % 32;
  }
};

/// A layer of any width over any layout in device memory: the library's owner is for the widths that
/// descriptors know.
template <class Format, class Layout>
class owner {
  using word = std::uint32_t;
  using scalar = typename Format::scalar_type;
  template <class T>
  using array = qeft::buffer<T, qeft::device_memory>;

 public:
  /// @param code_of, zero_of, scale_of, weak_of of a row and a column or group
  template <class Code, class Zero, class Scale, class Weak>
  owner(const qeft::layout::extent& e, qeft::index_t columns_per_group, const Code& code_of,
        const Zero& zero_of, const Scale& scale_of, const Weak& weak_of)
      : e_(e), columns_per_group_(columns_per_group) {
    constexpr int bits = Format::bits;
    qeft::buffer<word> codes(Layout::template code_words<bits>(e));
    qeft::buffer<word> zeros(Layout::template zero_words<bits>(e));
    qeft::buffer<scalar> scales(Layout::scale_count(e));
    qeft::buffer<scalar> weak(Layout::weak_count(e));
    for (qeft::index_t n = 0; n < e.out_channels; ++n) {
      for (qeft::index_t i = 0; i < e.dense; ++i) {
        qeft::scatter_code<bits>(codes.data(), code_of(n, i),
                                 qeft::layout::code_place<Layout, bits>{e, n, i});
      }
      for (qeft::index_t g = 0; g < e.groups; ++g) {
        qeft::scatter_code<bits>(zeros.data(), zero_of(n, g),
                                 qeft::layout::zero_place<Layout, bits>{e, n, g});
        scales.data()[Layout::scale_index(e, n, g)] = qeft::from_float<scalar>(scale_of(n, g));
      }
      for (qeft::index_t j = 0; j < e.weak; ++j) {
        weak.data()[Layout::weak_index(e, n, j)] = qeft::from_float<scalar>(weak_of(n, j));
      }
    }
    codes_ = array<word>(codes, {});
    zeros_ = array<word>(zeros, {});
    scales_ = array<scalar>(scales, {});
    weak_ = array<scalar>(weak, {});
  }
  qeft::quantized_matrix_view<Format, qeft::weak_tail<>, Layout, qeft::device_memory> view() const {
    return {e_.out_channels,
            e_.dense + e_.weak,
            e_.groups,
            columns_per_group_,
            qeft::weak_tail<>{{e_.weak}},
            codes_.data(),
            scales_.data(),
            zeros_.data(),
            weak_.data()};
  }

 private:
  qeft::layout::extent e_;
  qeft::index_t columns_per_group_;
  array<word> codes_, zeros_;
  array<scalar> scales_, weak_;
};

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("skipped: no CUDA device\n");
    return 77;
  }
  using qeft::index_t;
  const index_t oc = 75;
  const index_t weak = 5;
  const index_t ic = 300 + weak;
  const index_t tokens = 3;
  const qeft::layout::extent e{oc, 300, 3, weak};
  const auto code = [](index_t n, index_t i) { return static_cast<unsigned>(7 * n + 5 * i) % 32U; };
  const auto zero = [](index_t n, index_t g) { return static_cast<unsigned>(n + 11 * g) % 32U; };
  const auto scale = [](index_t n, index_t g) { return 0.0625F * static_cast<float>(n % 3 + g); };
  const auto value = [](index_t n, index_t j) { return static_cast<float>(n - 16 * j); };
  const owner<five_bits, qeft::layout::fragment> fast(e, 128, code, zero, scale, value);
  const owner<five_bits, row_blocks> own(e, 128, code, zero, scale, value);

  std::vector<qeft::half_bits> x(static_cast<std::size_t>(tokens * ic));
  for (std::size_t i = 0; i < x.size(); ++i) {
    x[i] = qeft::from_float<qeft::half_bits>(static_cast<float>(i % 9) - 4.0F);
  }
  qeft::buffer<qeft::half_bits, qeft::device_memory> device_x(tokens * ic);
  device_x.upload(x.data());
  const auto product = [&](const auto& view) {
    qeft::buffer<float, qeft::device_memory> y(tokens * oc);
    qeft::buffer<std::byte, qeft::device_memory> space(
        workspace_bytes(qeft::on_stream{}, view, device_x.data(), tokens));
    const qeft::on_stream exec{nullptr, {space.data(), space.size()}};
    qeft::gemm(exec, view, device_x.data(), tokens, y.data()).throw_if_error();
    std::vector<float> host(static_cast<std::size_t>(tokens * oc));
    y.download(host.data());  // waits for the product
    return host;
  };
  const auto y = product(fast.view());
  const auto again = product(own.view());

  int wrong = 0;
  for (index_t t = 0; t < tokens; ++t) {
    for (index_t n = 0; n < oc; ++n) {
      double sum = 0;
      for (index_t c = 0; c < ic; ++c) {
        const double w =
            c < 300 ? static_cast<double>(scale(n, c / 128)) *
                          (static_cast<double>(code(n, c)) - static_cast<double>(zero(n, c / 128)))
                    : static_cast<double>(value(n, c - 300));
        sum += w * static_cast<double>(qeft::to_float(x[static_cast<std::size_t>(t * ic + c)]));
      }
      const auto i = static_cast<std::size_t>(t * oc + n);
      if (std::abs(static_cast<double>(y[i]) - sum) > 1e-3) ++wrong;
      if (std::abs(static_cast<double>(again[i]) - sum) > 1e-3) ++wrong;
    }
  }
  std::printf("%d of %zu outputs differ from the definition\n", wrong, 2 * y.size());
  return wrong == 0 ? 0 : 1;
}
