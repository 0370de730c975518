// SPDX-License-Identifier: Apache-2.0
// Gradients on the device against their definitions in double, for random layers; gradients and
// scales at the ends of FP16's range, refusals, graphs, and the same bits whatever stands beside a
// token.
#include "device/support.cuh"
#include "qeft/container/repack.hpp"
#include "qeft/qeft.cuh"

namespace {

using namespace qeft_test;
using qeft::errc;
using qeft::half_bits;
using qeft::index_t;
using qeft::on_stream;
using qeft::quant_format;
using qeft::zero_kind;
using qeft::layout::fragment;
using device_matrix = qeft::quantized_matrix<fragment, qeft::device_memory>;

std::size_t at(index_t i) { return static_cast<std::size_t>(i); }

/// body(view) with the layer's placement of weak columns.
template <class Format, class Body>
void with_view(const device_matrix& w, const Body& body) {
  qeft::visit_weak(w.descriptor(), w.weak_index().data(),
                   [&](auto weak) { body(w.template view<Format>(weak)); });
}
void check_done(const device_matrix& w, const qeft::status& s, const char* what) {
  if (!s.ok()) fail(describe(w.descriptor()) + ": " + s.message());
  check(cudaDeviceSynchronize(), what);
}

/// dX of `tokens` tokens.
template <class X, class Format, class Scalar>
std::vector<X> input_gradient_of(const device_matrix& w, const Scalar* dy, index_t tokens) {
  device_array<X> dx(tokens * w.descriptor().in_channels);
  with_view<Format>(w, [&](const auto& view) {
    device_array<std::byte> space(input_gradient_workspace_bytes(on_stream{}, view, dy, tokens));
    const on_stream exec{nullptr, {space.data(), space.size()}};
    check_done(w, input_gradient(exec, view, dy, tokens, dx.data()), "input_gradient");
  });
  return to_host(dx);
}

/// The largest error of dX = dY W. @param dy (tokens, OC)  @param dx (tokens, IC)
template <class Scalar, class X>
double input_gradient_error(const plain_layer& layer, const std::vector<Scalar>& dy,
                            const std::vector<X>& dx) {
  const auto w = weights_of(layer);
  const index_t ic = layer.d.in_channels;
  const index_t oc = layer.d.out_channels;
  double worst = 0;
  std::vector<double> sum(at(ic));
  std::vector<double> magnitude(at(ic));
  for (index_t t = 0; t < static_cast<index_t>(dx.size()) / ic; ++t) {
    std::fill(sum.begin(), sum.end(), 0.0);
    std::fill(magnitude.begin(), magnitude.end(), 0.0);
    for (index_t n = 0; n < oc; ++n) {
      const auto g = static_cast<double>(to_float(dy[at(t * oc + n)]));
      for (index_t c = 0; c < ic; ++c) {
        const double term = g * static_cast<double>(w[at(n * ic + c)]);
        sum[at(c)] += term;
        magnitude[at(c)] += std::abs(term);
      }
    }
    for (index_t c = 0; c < ic; ++c) {
      worst = std::max(worst, error_of(dx[at(t * ic + c)], sum[at(c)], magnitude[at(c)]));
    }
  }
  return worst;
}

void check_error(const plain_layer& layer, double error, const char* what) {
  if (!(error <= 1)) {
    fail(describe(layer.d) + ": " + what + " " + std::to_string(error) + " times the bound");
  }
}

template <class Format>
void compare_input_gradient(const plain_layer& layer, const device_matrix& w,
                            const std::vector<typename Format::scalar_type>& dy, index_t tokens) {
  const index_t oc = layer.d.out_channels;
  const auto device_dy = to_device(dy);
  const auto dx = input_gradient_of<float, Format>(w, device_dy.data(), tokens);
  check_error(layer, input_gradient_error(layer, dy, dx), "input_gradient");
  // A token by itself, and another place and alignment.
  const index_t first = tokens / 2;
  const auto part =
      input_gradient_of<float, Format>(w, device_dy.data() + first * oc, (tokens + 3) / 4);
  if (std::memcmp(part.data(), dx.data() + first * layer.d.in_channels,
                  part.size() * sizeof(float)) != 0) {
    fail(describe(layer.d) + ": input_gradient has other bits beside other tokens");
  }
}

template <class Format>
void compare_weak_gradient(const plain_layer& layer, const device_matrix& w,
                           const std::vector<typename Format::scalar_type>& dy, index_t tokens,
                           random_source& random) {
  using scalar = typename Format::scalar_type;
  const index_t k = layer.d.weak_columns;
  const index_t ic = layer.d.in_channels;
  const index_t oc = layer.d.out_channels;
  const auto x = random_activations<scalar>(random, tokens * ic);
  const auto device_x = to_device(x);
  const auto device_dy = to_device(dy);
  device_array<scalar> x_weak(tokens * k);
  device_array<float> dw(oc * k);
  with_view<Format>(w, [&](const auto& view) {
    const on_stream exec;
    check_done(w, gather_weak(exec, view, device_x.data(), tokens, x_weak.data()), "gather_weak");
    check_done(w, weak_gradient(exec, view, device_dy.data(), x_weak.data(), tokens, dw.data()),
               "weak_gradient");
  });
  const auto gathered = to_host(x_weak);
  for (index_t i = 0; i < tokens * k; ++i) {
    if (gathered[at(i)] != x[at(i / k * ic + layer.weak_columns[at(i % k)])]) {
      return fail(describe(layer.d) + ": gather_weak");
    }
  }
  const auto once = to_host(dw);
  double worst = 0;
  for (index_t i = 0; i < oc * k; ++i) {
    double sum = 0;
    double magnitude = 0;
    for (index_t t = 0; t < tokens; ++t) {
      const double term = static_cast<double>(to_float(dy[at(t * oc + i / k)])) *
                          static_cast<double>(to_float(gathered[at(t * k + i % k)]));
      sum += term;
      magnitude += std::abs(term);
    }
    worst = std::max(worst, error_of(once[at(i)], sum, magnitude));
  }
  check_error(layer, worst, "weak_gradient");
  with_view<Format>(w, [&](const auto& view) {
    check_done(
        w,
        weak_gradient(on_stream{}, view, device_dy.data(), x_weak.data(), tokens, dw.data(), true),
        "weak_gradient");
  });
  const auto twice = to_host(dw);
  for (std::size_t i = 0; i < once.size(); ++i) {
    if (twice[i] != 2 * once[i]) return fail(describe(layer.d) + ": accumulated gradients");
  }
}

template <class Format>
void compare(const plain_layer& layer, index_t tokens, random_source& random) {
  const device_matrix w(pack<fragment>(layer));
  const auto dy =
      random_activations<typename Format::scalar_type>(random, tokens * layer.d.out_channels);
  compare_input_gradient<Format>(layer, w, dy, tokens);
  compare_weak_gradient<Format>(layer, w, dy, tokens, random);
}

int compare_random_layers(int count, std::uint64_t seed) {
  int ran = 0;
  for (; ran < count; ++seed) {
    random_source random(seed);
    const auto layer = random_case(random, 20000);
    const index_t tokens = random.pick({random.integer(1, 16), random.integer(1, 80)});
    if (if_tested(layer, [&](auto format) { compare<decltype(format)>(layer, tokens, random); })) {
      ++ran;
    }
  }
  return ran;
}

/// Groups of all relations to tiles of columns, and rows and tokens to stages.
void compare_groups() {
  random_source random(3);
  using scaled =
      quant_format<8, qeft::dynamic, zero_kind::scaled, qeft::bf16_bits>;  // of tested_formats
  for (const index_t group : {index_t{32}, index_t{96}, index_t{128}, qeft::per_channel}) {
    compare<quant_format<4>>(layer_of(20, 700, 17, group), 5, random);
    compare<quant_format<3>>(layer_of(20, 700, 17, group, 3), 5, random);
  }
  compare<quant_format<4>>(layer_of(528, 300, 48), 66, random);
  compare<quant_format<8>>(layer_of(272, 140, 140, 64, 8), 70, random);
  compare<quant_format<3>>(layer_of(513, 200, 70, 64, 3), 130, random);
  // So large that blocks take all runs of rows; a quarter of the tokens is taken run by run.
  compare<quant_format<4>>(layer_of(1100, 1100, 40), 700, random);
  auto d = layer_of(100, 300, 16, 32, 8).d;
  d.zero = scaled::zero;
  d.scalar = qeft::scalar_kind::bf16;
  compare<scaled>(random_layer(d, random), 9, random);
  // The same with weak columns anywhere and three runs.
  d.out_channels = 2100;
  d.in_channels = 48;
  d.weak = qeft::weak_kind::indexed;
  const auto layer = random_layer(d, random);
  const device_matrix w(pack<fragment>(layer));
  with_view<scaled>(w, [](const auto& view) {
    using qeft::device::detail::plan_input_gradient;
    check(plan_input_gradient(view, 1010).runs.count == 3, "three runs");
    check(plan_input_gradient(view, 1010).run_sums > 0 &&
              plan_input_gradient(view, 4040).run_sums == 0,
          "run by run, and not");
  });
  compare_input_gradient<scaled>(layer, w, random_activations<qeft::bf16_bits>(random, 4040 * 2100),
                                 4040);
}

std::vector<half_bits> times(std::vector<half_bits> x, float factor) {
  for (auto& v : x) v = qeft::from_float<half_bits>(qeft::to_float(v) * factor);
  return x;
}

/// Sizes of gradients and scales at which products leave FP16's range, or their last bits do.
void compare_ranges() {
  random_source random(4);
  for (const float scale : {0x1p-12F, 0x1p-6F, 1.0F, 64.0F, 4096.0F}) {
    auto layer = layer_of(150, 200, 16, 32);
    for (auto& s : layer.scales) {
      s = qeft::from_float<half_bits>(scale * qeft::to_float(half_bits{s})).bits;
    }
    const device_matrix w(pack<fragment>(layer));
    const auto dy = random_activations<half_bits>(random, 9 * 150);
    for (const float size : {1e-6F, 1e-3F, 1.0F, 1000.0F}) {  // the largest are 60 times as large
      compare_input_gradient<quant_format<4>>(layer, w, times(dy, size), 9);
    }
  }
  // The largest scales in one row, then none but zeros.
  auto layer = layer_of(60, 200, 16, 32);
  const auto dy = random_activations<half_bits>(random, 3 * 60);
  const index_t groups = layer.d.groups();
  for (index_t i = 0; i < 60 * groups; ++i) {
    if (i / groups != 9) layer.scales[at(i)] = qeft::from_float<half_bits>(1e-5F).bits;
  }
  const device_matrix one_row(pack<fragment>(layer));
  compare_input_gradient<quant_format<4>>(layer, one_row, dy, 3);
  std::fill(layer.scales.begin(), layer.scales.end(), std::uint16_t{0});
  const device_matrix zero(pack<fragment>(layer));
  compare_input_gradient<quant_format<4>>(layer, zero, dy, 3);
}

/// Zeros, infinities and NaN concern their own token.
void check_special_values() {
  const auto layer = layer_of(60, 200, 16);
  const device_matrix w(pack<fragment>(layer));
  random_source random(5);
  auto dy = random_activations<half_bits>(random, 5 * 60);
  const auto before = input_gradient_of<float, quant_format<4>>(w, to_device(dy).data(), 5);
  dy[60 + 7] = qeft::from_float<half_bits>(INFINITY);
  dy[2 * 60 + 59] = qeft::from_float<half_bits>(NAN);
  std::fill_n(dy.begin() + 3 * 60, 60, half_bits{});
  const auto after = input_gradient_of<float, quant_format<4>>(w, to_device(dy).data(), 5);
  for (std::size_t i = 0; i < 200; ++i) {
    check(after[i] == before[i] && after[800 + i] == before[800 + i], "neighbours of infinities");
    check(!std::isfinite(after[200 + i]), "an infinity");
    check(std::isnan(after[400 + i]), "NaN");
    check(after[600 + i] == 0.0F, "a token without gradients");
  }
}

void check_outputs() {
  const auto layer = layer_of(77, 520, 16);
  const device_matrix w(pack<fragment>(layer));
  random_source random(2);
  const auto dy = random_activations<half_bits>(random, 3 * 77);
  const auto device_dy = to_device(dy);
  const auto dx = input_gradient_of<float, quant_format<4>>(w, device_dy.data(), 3);
  const auto halves = input_gradient_of<half_bits, quant_format<4>>(w, device_dy.data(), 3);
  const auto bf16 = input_gradient_of<qeft::bf16_bits, quant_format<4>>(w, device_dy.data(), 3);
  for (std::size_t i = 0; i < dx.size(); ++i) {
    check(halves[i] == qeft::from_float<half_bits>(dx[i]), "f16");
    check(bf16[i] == qeft::from_float<qeft::bf16_bits>(dx[i]), "bf16");
  }

  // Formats known at run time, on another stream and in a graph.
  device_array<std::byte> space(
      input_gradient_workspace_bytes(on_stream{}, w, device_dy.data(), 3));
  device_array<float> replayed(3 * 520);
  device_array<half_bits> x(3 * 520);
  device_array<half_bits> x_weak(3 * 16);
  device_array<float> dw(77 * 16);
  const on_stream exec{nullptr, {space.data(), space.size()}};
  check(supports_input_gradient(exec, w, device_dy.data(), 3, replayed.data()).ok(), "supports");
  check(supports_gather_weak(exec, w, x.data(), 3, x_weak.data()).ok(), "supports");
  check(supports_weak_gradient(exec, w, device_dy.data(), x_weak.data(), 3, dw.data()).ok(),
        "supports");
  in_graph([&](cudaStream_t stream) {
    const on_stream captured{stream, exec.workspace};
    check(gather_weak(captured, w, x.data(), 3, x_weak.data()).ok(), "gather_weak");
    check(weak_gradient(captured, w, device_dy.data(), x_weak.data(), 3, dw.data()).ok(),
          "weak_gradient");
    return input_gradient(captured, w, device_dy.data(), 3, replayed.data());
  });
  check(to_host(replayed) == dx, "a graph");
}

void check_refusals() {
  const auto layer = layer_of(40, 300, 16);
  const device_matrix w(pack<fragment>(layer));
  device_array<half_bits> dy(2 * 40);
  device_array<float> dx(2 * 300);
  device_array<half_bits> x_weak(2 * 16);
  device_array<float> dw(40 * 16);
  const auto view = w.view<quant_format<4>>(qeft::weak_tail<>{{16}});
  const index_t bytes = input_gradient_workspace_bytes(on_stream{}, view, dy.data(), 2);
  device_array<std::byte> space(bytes);
  const on_stream exec{nullptr, {space.data(), bytes}};
  check(cudaMemset(dx.data(), 0x55, 2 * 300 * sizeof(float)), "cudaMemset");
  const auto untouched = to_host(dx);
  const auto bad = errc::invalid_argument;

  check(input_gradient(exec, view, dy.data(), 0, static_cast<float*>(nullptr)).ok(), "no tokens");
  const on_stream tight{nullptr, {space.data(), bytes - 1}};
  check_refused(input_gradient(tight, view, dy.data(), 2, dx.data()), bad, "workspace");
  check_refused(input_gradient(exec, view, dy.data(), -1, dx.data()), bad, "tokens is -1");
  const half_bits* none = nullptr;
  check_refused(input_gradient(exec, view, none, 2, dx.data()), bad, "dy is null");
  check_refused(input_gradient(exec, view, dy.data(), 2, static_cast<float*>(nullptr)), bad,
                "dx is null");
  const auto* askew =
      reinterpret_cast<const half_bits*>(reinterpret_cast<const std::byte*>(dy.data()) + 1);
  check_refused(input_gradient(exec, view, askew, 2, dx.data()), bad, "dy is not aligned");
  check_refused(gather_weak(exec, view, askew, 2, x_weak.data()), bad, "x is not aligned");
  auto broken = view;
  broken.codes += 1;
  check_refused(input_gradient(exec, broken, dy.data(), 2, dx.data()), bad, "codes");
  device_array<qeft::bf16_bits> other(2 * 40);
  check_refused(input_gradient(exec, w, other.data(), 2, dx.data()), errc::unsupported, "bf16");
  qeft::matrix_descriptor eight = layer.d;
  eight.bits = 8;
  const device_matrix not_built_in(eight);
  check_refused(input_gradient(exec, not_built_in, dy.data(), 2, dx.data()), errc::unsupported,
                "built in are");

  check_refused(gather_weak(exec, view, none, 2, x_weak.data()), bad, "x is null");
  check_refused(gather_weak(exec, view, dy.data(), 70000, x_weak.data()), bad, "tokens is 70000");
  check_refused(weak_gradient(exec, view, none, x_weak.data(), 2, dw.data()), bad, "dy is null");
  check_refused(weak_gradient(exec, view, dy.data(), none, 2, dw.data()), bad, "x_weak is null");
  check_refused(weak_gradient(exec, view, dy.data(), x_weak.data(), 2, nullptr), bad, "dw is null");
  // A sum over no tokens is zero.
  check(cudaMemset(dw.data(), 0x55, 40 * 16 * sizeof(float)), "cudaMemset");
  check(weak_gradient(exec, view, none, none, 0, dw.data()).ok(), "no tokens");
  check(cudaDeviceSynchronize(), "refusals");
  check(to_host(dw) == std::vector<float>(40 * 16), "no tokens");
  check(cudaGetLastError() == cudaSuccess, "a refusal leaves no error behind");
  check(to_host(dx) == untouched, "a refusal writes nothing");
}

/// For counters: one launch of each kernel.
void run_once(index_t oc, index_t ic, index_t k, index_t tokens) {
  random_source random(6);
  compare<quant_format<4>>(layer_of(oc, ic, k), tokens, random);
}

}  // namespace

int main(int argc, char** argv) {
  if (!has_device()) return 77;
  if (argc > 4) {
    run_once(std::atoi(argv[1]), std::atoi(argv[2]), std::atoi(argv[3]), std::atoi(argv[4]));
    std::printf("%d failures\n", failures);
    return failures == 0 ? 0 : 1;
  }
  check_outputs();
  check_special_values();
  check_refusals();
  if (argc == 1) {
    compare_ranges();
    compare_groups();
  }
  const int count = argc > 1 ? std::atoi(argv[1]) : 60;
  const auto seed = static_cast<std::uint64_t>(argc > 2 ? std::atoi(argv[2]) : 1);
  const int ran = compare_random_layers(count, seed);
  std::printf("%d random layers, %d failures\n", ran, failures);
  return failures == 0 && ran == count ? 0 : 1;
}
