// SPDX-License-Identifier: Apache-2.0
// The functions that define the format give the same bits on the device as on the host.
#include <limits>
#include <random>

#include "device/support.cuh"
#include "qeft/qeft.cuh"

namespace {

using namespace qeft_test;

int compared = 0;

/// codes (OC, IC - k) and weights (OC, IC), one thread per column.
template <class View>
__global__ void read_all(View w, unsigned* codes, float* weights) {
  const qeft::index_t n = blockIdx.x;
  for (qeft::index_t c = threadIdx.x; c < w.in_channels; c += blockDim.x) {
    weights[n * w.in_channels + c] = dequantize(w, n, c);
    if (c < w.dense_columns()) codes[n * w.dense_columns() + c] = read_code(w, n, c);
  }
}

__global__ void convert_all(float* from_half, float* from_bf16, std::uint16_t* to_half,
                            std::uint16_t* to_bf16) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  const auto bits = static_cast<std::uint16_t>(i);
  from_half[i] = to_float(qeft::half_bits{bits});
  from_bf16[i] = to_float(qeft::bf16_bits{bits});
  const float x = qeft::detail::bits_to_float(i * 65521U);  // visits every exponent
  to_half[i] = qeft::from_float<qeft::half_bits>(x).bits;
  to_bf16[i] = qeft::from_float<qeft::bf16_bits>(x).bits;
}

template <class T>
void expect_same(const std::string& what, const std::vector<T>& device,
                 const std::vector<T>& host) {
  ++compared;
  check(device.size() == host.size() && same_start(device, host), what.c_str());
}

template <class Format, class Layout, class Weak>
void compare(const qeft::quantized_matrix<Layout>& q, const Weak& weak) {
  const auto host_view = q.template view<Format>(weak);
  std::vector<unsigned> codes;
  std::vector<float> weights;
  for (qeft::index_t n = 0; n < host_view.out_channels; ++n) {
    for (qeft::index_t i = 0; i < host_view.dense_columns(); ++i) {
      codes.push_back(read_code(host_view, n, i));
    }
    for (qeft::index_t c = 0; c < host_view.in_channels; ++c) {
      weights.push_back(dequantize(host_view, n, c));
    }
  }

  const qeft::quantized_matrix<Layout, qeft::device_memory> on_device(q);
  Weak device_weak = weak;
  if constexpr (Weak::kind == qeft::weak_kind::indexed) {
    device_weak.index = on_device.weak_index().data();
  }
  const auto view = on_device.template view<Format>(device_weak);
  device_array<unsigned> got_codes(static_cast<qeft::index_t>(codes.size()));
  device_array<float> got_weights(static_cast<qeft::index_t>(weights.size()));
  read_all<<<static_cast<unsigned>(view.out_channels), 64>>>(view, got_codes.data(),
                                                             got_weights.data());
  check(cudaGetLastError(), "read_all");
  check(cudaDeviceSynchronize(), "read_all");
  const std::string what =
      qeft::text(Layout::name, ", ", Format::bits, " bits, ", to_string(Format::zero),
                 " zeros, weak ", to_string(Weak::kind));
  expect_same(what, to_host(got_codes), codes);
  expect_same(what, to_host(got_weights), weights);

  const qeft::quantized_matrix<Layout> back(on_device);
  const auto copy = on_device;
  const qeft::quantized_matrix<Layout> back_from_copy(copy);
  ++compared;
  if (back.descriptor() != q.descriptor() || back.codes() != q.codes() ||
      back.scales() != q.scales() || back.zeros() != q.zeros() || back.weak() != q.weak() ||
      back.weak_index() != q.weak_index() || back_from_copy.codes() != q.codes()) {
    fail("back from the device, " + what);
  }
}

template <class Format, class Layout>
void compare_placements() {
  const std::vector<std::int32_t> index = {0, 3, 4, 31, 50, 77, 98, 99};
  const qeft::index_t k = 8;
  std::mt19937 random(1);
  for (const auto kind : {qeft::weak_kind::none, qeft::weak_kind::tail, qeft::weak_kind::indexed,
                          qeft::weak_kind::per_head}) {
    qeft::matrix_descriptor d;
    d.out_channels = 37;
    d.in_channels = 100;
    d.bits = Format::bits;
    d.group_size = 32;
    d.zero = Format::zero;
    d.scalar = qeft::scalar_kind_of<typename Format::scalar_type>::value;
    d.weak = kind;
    d.weak_columns = kind == qeft::weak_kind::none ? 0 : k;
    d.heads = kind == qeft::weak_kind::per_head ? 4 : 1;
    qeft::quantized_matrix<Layout> q(
        d, kind == qeft::weak_kind::indexed ? index : std::vector<std::int32_t>{});
    const auto scalar = [&] {
      const float x = static_cast<float>(random() % 2001U) * 0.001F - 1.0F;
      return qeft::from_float<typename Format::scalar_type>(x).bits;
    };
    for (qeft::index_t n = 0; n < d.out_channels; ++n) {
      for (qeft::index_t i = 0; i < d.dense_columns(); ++i) {
        q.write_code(n, i, static_cast<unsigned>(random()));
      }
      for (qeft::index_t g = 0; g < d.groups(); ++g) {
        q.write_params(
            n, g, scalar(),
            Format::zero == qeft::zero_kind::scaled ? scalar() : static_cast<unsigned>(random()));
      }
      for (qeft::index_t j = 0; j < d.weak_columns; ++j) q.write_weak(n, j, scalar());
    }
    switch (kind) {
      case qeft::weak_kind::none:
        compare<Format>(q, qeft::weak_none{});
        break;
      case qeft::weak_kind::tail:
        compare<Format>(q, qeft::weak_tail<>{{k}});
        compare<Format>(q, qeft::weak_tail<8>{});
        break;
      case qeft::weak_kind::indexed:
        compare<Format>(q, qeft::weak_indexed<>{{k}, index.data()});
        break;
      case qeft::weak_kind::per_head:
        compare<Format>(q, qeft::weak_per_head<>{{k}, 4});
        break;
    }
  }
}

template <class Format>
void compare_layouts() {
  compare_placements<Format, qeft::layout::row_packed>();
  compare_placements<Format, qeft::layout::simd_tile>();
  compare_placements<Format, qeft::layout::fragment>();
}

/// Every NaN is as good as another: a device has one, the host keeps the payload.
std::vector<float> one_nan(std::vector<float> v) {
  for (float& x : v) x = x == x ? x : std::numeric_limits<float>::quiet_NaN();
  return v;
}
std::vector<std::uint16_t> one_nan(std::vector<std::uint16_t> halves) {
  for (std::uint16_t& h : halves) h = (h & 0x7fffU) > 0x7c00U ? std::uint16_t{0x7e00} : h;
  return halves;
}

void compare_conversions() {
  constexpr std::size_t count = 65536;
  std::vector<float> from_half(count), from_bf16(count);
  std::vector<std::uint16_t> to_half(count), to_bf16(count);
  for (unsigned i = 0; i < count; ++i) {
    const auto bits = static_cast<std::uint16_t>(i);
    from_half[i] = to_float(qeft::half_bits{bits});
    from_bf16[i] = to_float(qeft::bf16_bits{bits});
    const float x = qeft::detail::bits_to_float(i * 65521U);
    to_half[i] = qeft::from_float<qeft::half_bits>(x).bits;
    to_bf16[i] = qeft::from_float<qeft::bf16_bits>(x).bits;
  }
  device_array<float> d_from_half(count), d_from_bf16(count);
  device_array<std::uint16_t> d_to_half(count), d_to_bf16(count);
  convert_all<<<count / 256, 256>>>(d_from_half.data(), d_from_bf16.data(), d_to_half.data(),
                                    d_to_bf16.data());
  check(cudaGetLastError(), "convert_all");
  check(cudaDeviceSynchronize(), "convert_all");
  expect_same("half to float", one_nan(to_host(d_from_half)), one_nan(from_half));
  expect_same("bf16 to float", to_host(d_from_bf16), from_bf16);
  expect_same("float to half", one_nan(to_host(d_to_half)), one_nan(to_half));
  expect_same("float to bf16", to_host(d_to_bf16), to_bf16);
}

}  // namespace

int main() {
  if (!has_device()) return 77;
  using qeft::quant_format;
  using qeft::zero_kind;
  compare_conversions();
  compare_layouts<quant_format<4>>();
  compare_layouts<quant_format<3>>();
  compare_layouts<quant_format<3, 32, zero_kind::symmetric>>();
  compare_layouts<quant_format<4, 32, zero_kind::scaled, qeft::bf16_bits>>();
  std::printf("%d comparisons, %d failed\n", compared, failures);
  return failures == 0 && compared == 4 + 4 * 3 * 5 * 3 ? 0 : 1;
}
