// SPDX-License-Identifier: Apache-2.0
// Products on the device against the definition in double, for random layers; epilogues, refusals,
// graphs, and the same bits whatever stands beside a token.
#include "device/support.cuh"
#include "qeft/container/repack.hpp"
#include "qeft/qeft.cuh"

namespace {

using namespace qeft_test;
using qeft::errc;
using qeft::index_t;
using qeft::on_stream;
using qeft::quant_format;
using qeft::zero_kind;
using qeft::layout::fragment;

/// y of the first `tokens` tokens.
template <class Y, class Format, class Scalar, class Epilogue = qeft::epilogue::none>
std::vector<Y> product(const qeft::quantized_matrix<fragment, qeft::device_memory>& w,
                       const device_array<Scalar>& x, index_t tokens, const Epilogue& epilogue = {},
                       cudaStream_t stream = nullptr) {
  const qeft::matrix_descriptor& d = w.descriptor();
  device_array<Y> y(tokens * d.out_channels);
  qeft::visit_weak(d, w.weak_index().data(), [&](auto weak) {
    const auto view = w.template view<Format>(weak);
    device_array<std::byte> space(workspace_bytes(on_stream{}, view, x.data(), tokens));
    const on_stream exec{stream, {space.data(), space.size()}};
    const qeft::status s = gemm(exec, view, x.data(), tokens, y.data(), epilogue);
    if (!s.ok()) fail(describe(d) + ": " + s.message());
    check(cudaDeviceSynchronize(), "gemm");
  });
  return to_host(y);
}

template <class Y, class Format>
void compare(const plain_layer& layer, random_source& random) {
  using scalar = typename Format::scalar_type;
  const qeft::quantized_matrix<fragment, qeft::device_memory> w(pack<fragment>(layer));
  const qeft::matrix_descriptor& d = layer.d;
  const index_t most = random.integer(9, 20);
  const auto x = random_activations<scalar>(random, most * d.in_channels);
  device_array<scalar> device_x(static_cast<index_t>(x.size()));
  device_x.upload(x.data());
  const auto all = product<Y, Format>(w, device_x, most);
  if (const double e = error_of(layer, x, all); !(e <= 1)) {
    fail(describe(d) + ": error of " + std::to_string(e) + " times the bound");
  }
  for (const index_t tokens : {index_t{1}, random.integer(2, 8)}) {
    if (!same_start(product<Y, Format>(w, device_x, tokens), all)) {
      fail(describe(d) + ": other bits with " + std::to_string(tokens) + " tokens");
    }
  }
}

int compare_random_layers(int count, std::uint64_t seed) {
  int ran = 0;
  for (; ran < count; ++seed) {
    random_source random(seed);
    const auto layer = random_case(random, 40000);
    const bool ran_one =
        if_tested(layer, [&](auto format) { compare<float, decltype(format)>(layer, random); });
    if (ran_one) ++ran;
  }
  return ran;
}

/// Groups of all relations to tiles, stages, chunks and parts.
void compare_groups() {
  random_source random(3);
  for (const index_t group :
       {index_t{32}, index_t{64}, index_t{96}, index_t{128}, index_t{256}, index_t{384},
        index_t{512}, index_t{1024}, index_t{1536}, qeft::per_channel}) {
    for (const index_t ic : {511, 2600, 4127}) {
      compare<float, quant_format<4>>(layer_of(20, ic, 17, group), random);
      compare<float, quant_format<3>>(layer_of(20, ic, 17, group, 3), random);
    }
  }
}

/// Adds twice what the output already has, and reverses the channels.
struct user_epilogue {
  const float* old;
  index_t out_channels;
  QEFT_HOST_DEVICE float operator()(float value, index_t token, index_t channel) const {
    return value + 2 * old[token * out_channels + channel];
  }
  QEFT_HOST_DEVICE index_t destination(index_t channel) const { return out_channels - 1 - channel; }
};

void check_outputs() {
  const auto layer = layer_of(77, 520, 16);
  const qeft::quantized_matrix<fragment, qeft::device_memory> w(pack<fragment>(layer));
  random_source random(2);
  const auto x = random_activations<qeft::half_bits>(random, 3 * 520);
  device_array<qeft::half_bits> device_x(3 * 520);
  device_x.upload(x.data());
  const auto y = product<float, quant_format<4>>(w, device_x, 3);
  check(error_of(layer, x, y) <= 1, "floats");
  check(error_of(layer, x, product<qeft::half_bits, quant_format<4>>(w, device_x, 3)) <= 1, "f16");
  check(error_of(layer, x, product<qeft::bf16_bits, quant_format<4>>(w, device_x, 3)) <= 1, "bf16");

  device_array<float> old(3 * 77);
  old.upload(y.data());
  const auto z = product<float, quant_format<4>>(w, device_x, 3, user_epilogue{old.data(), 77});
  for (std::size_t i = 0; i < z.size(); ++i) {
    const std::size_t from = i / 77 * 77 + 76 - i % 77;
    if (z[i] != y[from] + 2 * y[from]) return fail("an epilogue of the user's");
  }

  // gemv, and formats known at run time.
  device_array<float> one(77);
  const on_stream plain;
  check(supports_gemm(plain, w, device_x.data(), 1, one.data()).ok(), "supports_gemm");
  check(workspace_bytes(plain, w, device_x.data(), 1) == 0, "workspace_bytes");
  check(gemv(plain, w, device_x.data(), one.data()).ok(), "gemv");
  check(cudaDeviceSynchronize(), "gemv");
  check(same_start(to_host(one), y), "gemv is gemm of one token");
  const auto view = w.view<quant_format<4>>(qeft::weak_tail<>{{16}});
  check(gemv(plain, view, device_x.data() + 520, one.data()).ok(), "gemv of a view");
  check(cudaDeviceSynchronize(), "gemv of a view");
  const auto second = to_host(one);
  check(std::memcmp(second.data(), y.data() + 77, 77 * sizeof(float)) == 0, "gemv of a view");

  // The same bits on another stream and in a graph.
  cudaStream_t stream = nullptr;
  check(cudaStreamCreate(&stream), "cudaStreamCreate");
  check(same_start(product<float, quant_format<4>>(w, device_x, 3, {}, stream), y), "a stream");
  device_array<float> replayed(3 * 77);
  // From an address at which activations have to be gathered first.
  device_array<qeft::half_bits> askew(3 * 520 + 1);
  std::vector<qeft::half_bits> moved(1);
  moved.insert(moved.end(), x.begin(), x.end());
  askew.upload(moved.data());
  device_array<std::byte> space(workspace_bytes(plain, w, askew.data() + 1, 3));
  check(space.size() > 0, "x that is not aligned needs a workspace");
  const on_stream captured{stream, {space.data(), space.size()}};
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal), "capture");
  check(gemm(captured, w, askew.data() + 1, 3, replayed.data()).ok(), "a capture");
  cudaGraph_t graph = nullptr;
  check(cudaStreamEndCapture(stream, &graph), "capture");
  cudaGraphExec_t executable = nullptr;
  check(cudaGraphInstantiate(&executable, graph, 0), "cudaGraphInstantiate");
  check(cudaGraphLaunch(executable, stream), "cudaGraphLaunch");
  check(cudaStreamSynchronize(stream), "a graph");
  check(to_host(replayed) == y, "a graph");
  check(cudaGraphExecDestroy(executable), "cudaGraphExecDestroy");
  check(cudaGraphDestroy(graph), "cudaGraphDestroy");
  check(cudaStreamDestroy(stream), "cudaStreamDestroy");
}

void check_refusals() {
  const auto layer = layer_of(40, 300, 16);
  const qeft::quantized_matrix<fragment, qeft::device_memory> w(pack<fragment>(layer));
  device_array<qeft::half_bits> x(2 * 300);
  device_array<float> y(2 * 40);
  const auto view = w.view<quant_format<4>>(qeft::weak_tail<>{{16}});
  const index_t bytes = workspace_bytes(on_stream{}, view, x.data(), 2);
  check(bytes > 0, "IC = 300 needs a workspace");
  device_array<std::byte> space(bytes);
  const on_stream exec{nullptr, {space.data(), bytes}};
  check(gemm(exec, view, x.data(), 2, y.data()).ok(), "what is refused otherwise");
  check(gemm(exec, w, x.data(), 0, static_cast<float*>(nullptr)).ok(), "no tokens");

  // An error of the caller's from before is neither ours nor swallowed.
  void* too_much = nullptr;
  check(cudaMalloc(&too_much, std::size_t{1} << 50) != cudaSuccess, "2^50 bytes");
  check(gemm(exec, view, x.data(), 2, y.data()).ok(), "an error from before");
  check(cudaGetLastError() != cudaSuccess, "an error from before is left");

  check(cudaMemset(y.data(), 0x55, 2 * 40 * sizeof(float)), "cudaMemset");
  const auto untouched = to_host(y);
  const on_stream nowhere{nullptr, {static_cast<std::byte*>(nullptr), bytes}};
  check_refused(gemm(nowhere, view, x.data(), 2, y.data()), errc::invalid_argument, "workspace");
  const on_stream small{nullptr, {space.data(), bytes - 1}};
  check_refused(gemm(small, view, x.data(), 2, y.data()), errc::invalid_argument, "workspace");
  const on_stream askew{nullptr, {space.data() + 16, bytes}};
  check_refused(gemm(askew, view, x.data(), 2, y.data()), errc::invalid_argument, "alignment");
  check_refused(gemm(exec, view, x.data(), -1, y.data()), errc::invalid_argument, "tokens is -1");
  const qeft::half_bits* no_x = nullptr;
  check_refused(gemm(exec, view, no_x, 2, y.data()), errc::invalid_argument, "x is null");
  check_refused(gemm(exec, view, x.data(), 2, static_cast<float*>(nullptr)), errc::invalid_argument,
                "y is null");
  auto broken = view;
  broken.codes += 1;
  check_refused(gemm(exec, broken, x.data(), 2, y.data()), errc::invalid_argument, "codes");
  broken = view;
  broken.weak_values = nullptr;
  check_refused(gemm(exec, broken, x.data(), 2, y.data()), errc::invalid_argument, "weak_values");
  broken = view;
  broken.groups = 2;
  check_refused(gemm(exec, broken, x.data(), 2, y.data()), errc::invalid_argument, "groups = 2");
  broken = view;
  broken.weak.k = 301;
  check_refused(gemm(exec, broken, x.data(), 2, y.data()), errc::invalid_argument, "301");

  device_array<qeft::bf16_bits> other(2 * 300);
  check_refused(gemm(exec, w, other.data(), 2, y.data()), errc::unsupported, "x is bf16");
  const qeft::quantized_matrix<fragment, qeft::device_memory> empty;
  check_refused(gemm(exec, empty, x.data(), 2, y.data()), errc::invalid_argument, "");
  qeft::matrix_descriptor eight = layer.d;
  eight.bits = 8;
  const qeft::quantized_matrix<fragment, qeft::device_memory> not_built_in(eight);
  check_refused(gemm(exec, not_built_in, x.data(), 2, y.data()), errc::unsupported, "built in are");
  check(cudaGetLastError() == cudaSuccess, "a refusal leaves no error behind");
  check(cudaDeviceSynchronize(), "refusals");
  check(to_host(y) == untouched, "a refusal writes nothing");
}

}  // namespace

int main(int argc, char** argv) {
  if (!has_device()) return 77;
  check_outputs();
  check_refusals();
  compare_groups();
  const int count = argc > 1 ? std::atoi(argv[1]) : 200;
  const auto seed = static_cast<std::uint64_t>(argc > 2 ? std::atoi(argv[2]) : 1);
  const int ran = compare_random_layers(count, seed);
  std::printf("%d random layers, %d failures\n", ran, failures);
  return failures == 0 && ran == count ? 0 : 1;
}
