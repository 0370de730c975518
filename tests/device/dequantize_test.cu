// SPDX-License-Identifier: Apache-2.0
// Layers as plain matrices on the device: the bits of the definition, for random layers; refusals.
#include "device/support.cuh"
#include "qeft/qeft.cuh"

namespace {

using namespace qeft_test;
using qeft::errc;
using qeft::index_t;
using qeft::on_stream;
using qeft::layout::fragment;

/// What W is when rounded to Y.
template <class Y>
std::vector<Y> expected(const plain_layer& layer) {
  std::vector<Y> w;
  for (const float x : weights_of(layer)) w.push_back(qeft::from_float<Y>(x));
  return w;
}

/// @param offset of the output from an address that is a multiple of 256 bytes
template <class Y, class Format>
void compare(const plain_layer& layer, index_t offset) {
  const qeft::quantized_matrix<fragment, qeft::device_memory> w(pack<fragment>(layer));
  const auto exact = expected<Y>(layer);
  const auto count = static_cast<index_t>(exact.size());
  device_array<Y> out(offset + count + 8);
  qeft::visit_weak(layer.d, w.weak_index().data(), [&](auto weak) {
    const auto view = w.template view<Format>(weak);
    const qeft::status s = dequantize(on_stream{}, view, out.data() + offset);
    if (!s.ok()) fail(describe(layer.d) + ": " + s.message());
  });
  check(cudaDeviceSynchronize(), "dequantize");
  const auto got = to_host(out);
  const auto is_zero = [](const Y& x) { return qeft::to_float(x) == 0.0F; };
  if (std::memcmp(got.data() + offset, exact.data(), exact.size() * sizeof(Y)) != 0) {
    fail(describe(layer.d) + ": other weights, from " + std::to_string(offset));
  }
  if (!std::all_of(got.begin(), got.begin() + offset, is_zero) ||
      !std::all_of(got.end() - 8, got.end(), is_zero)) {
    fail(describe(layer.d) + ": written beside the matrix");
  }
}

int compare_random_layers(int count, std::uint64_t seed) {
  int ran = 0;
  for (; ran < count; ++seed) {
    random_source random(seed);
    const auto layer = random_case(random, 40000);
    const index_t offset = random.chance(50) ? 0 : random.integer(1, 7);
    const bool ran_one = if_tested(layer, [&](auto format) {
      using f = decltype(format);
      switch (random.integer(0, 2)) {
        case 0:
          return compare<float, f>(layer, offset);
        case 1:
          return compare<qeft::half_bits, f>(layer, offset);
        default:
          return compare<qeft::bf16_bits, f>(layer, offset);
      }
    });
    if (ran_one) ++ran;
  }
  return ran;
}

void check_run_time_formats() {
  const auto layer = layer_of(77, 1100, 16);
  const qeft::quantized_matrix<fragment, qeft::device_memory> w(pack<fragment>(layer));
  device_array<qeft::bf16_bits> out(77 * 1100);
  in_graph([&](cudaStream_t stream) { return dequantize(on_stream{stream}, w, out.data()); });
  check(to_host(out) == expected<qeft::bf16_bits>(layer), "a graph");
}

void check_refusals() {
  const auto layer = layer_of(40, 300, 16);
  const qeft::quantized_matrix<fragment, qeft::device_memory> w(pack<fragment>(layer));
  device_array<float> out(40 * 300);
  const auto view = w.view<qeft::quant_format<4>>(qeft::weak_tail<>{{16}});
  check(supports_dequantize(on_stream{}, view, out.data()).ok(), "what is refused otherwise");
  check(supports_dequantize(on_stream{}, w, out.data()).ok(), "what is refused otherwise");
  check_refused(dequantize(on_stream{}, view, static_cast<float*>(nullptr)), errc::invalid_argument,
                "out is null");
  const auto* askew =
      reinterpret_cast<const float*>(reinterpret_cast<std::uintptr_t>(out.data()) + 2);
  check_refused(supports_dequantize(on_stream{}, view, askew), errc::invalid_argument, "aligned");
  auto broken = view;
  broken.scales += 1;
  check_refused(dequantize(on_stream{}, broken, out.data()), errc::invalid_argument, "scales");
  broken = view;
  broken.in_channels = index_t{1} << 29;
  check_refused(dequantize(on_stream{}, broken, out.data()), errc::invalid_argument, "536870912");
  broken = view;
  broken.out_channels = index_t{1} << 28;
  broken.in_channels = index_t{1} << 28;
  broken.columns_per_group = index_t{1} << 28;
  broken.groups = 1;
  check_refused(dequantize(on_stream{}, broken, out.data()), errc::invalid_argument, "2^31 - 1");
  const qeft::quantized_matrix<fragment, qeft::device_memory> empty;
  check_refused(dequantize(on_stream{}, empty, out.data()), errc::invalid_argument, "");
  qeft::matrix_descriptor eight = layer.d;
  eight.bits = 8;
  const qeft::quantized_matrix<fragment, qeft::device_memory> not_built_in(eight);
  check_refused(dequantize(on_stream{}, not_built_in, out.data()), errc::unsupported,
                "built in are");
  check(cudaDeviceSynchronize(), "refusals");
  check(to_host(out) == std::vector<float>(40 * 300, 0.0F), "a refusal writes nothing");
}

}  // namespace

int main(int argc, char** argv) {
  if (!has_device()) return 77;
  check_run_time_formats();
  check_refusals();
  // Tiles that lie across those of kernels, and one of each kind of output.
  compare<qeft::half_bits, qeft::quant_format<4>>(layer_of(33, 1027, 35), 0);
  compare<float, qeft::quant_format<4>>(layer_of(33, 1027, 35), 3);
  compare<qeft::bf16_bits, qeft::quant_format<3>>(layer_of(17, 1032, 8, 128, 3), 5);
  // Group sizes known at compile time.
  compare<qeft::half_bits, qeft::quant_format<4, 128>>(layer_of(20, 700, 16), 0);
  compare<float, qeft::quant_format<4, qeft::per_channel>>(layer_of(20, 700, 16, -1), 1);
  const int count = argc > 1 ? std::atoi(argv[1]) : 1000;
  const auto seed = static_cast<std::uint64_t>(argc > 2 ? std::atoi(argv[2]) : 1);
  const int ran = compare_random_layers(count, seed);
  std::printf("%d random layers, %d failures\n", ran, failures);
  return failures == 0 && ran == count ? 0 : 1;
}
