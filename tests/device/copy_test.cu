// SPDX-License-Identifier: Apache-2.0
// Layers between host and device in the order of a stream: every byte arrives, and products read
// layers of any memory policy.
#include "device/support.cuh"
#include "qeft/qeft.cuh"

namespace {

using namespace qeft_test;
using qeft::device_memory;
using qeft::errc;
using qeft::index_t;
using qeft::matrix_descriptor;
using qeft::on_stream;
using qeft::pinned_memory;
using qeft::quantized_matrix;
using qeft::stream_memory;
using qeft::layout::fragment;
using qeft::layout::row_packed;

class stream {
 public:
  stream() { check(cudaStreamCreateWithFlags(&s_, cudaStreamNonBlocking), "cudaStreamCreate"); }
  stream(const stream&) = delete;
  stream& operator=(const stream&) = delete;
  ~stream() { static_cast<void>(cudaStreamDestroy(s_)); }
  operator cudaStream_t() const { return s_; }
  void wait() const { check(cudaStreamSynchronize(s_), "cudaStreamSynchronize"); }

 private:
  cudaStream_t s_ = nullptr;
};

/// A matrix with the descriptor of `layer` and nothing in it.
template <class Layout, class Memory>
quantized_matrix<Layout, Memory> blank(const plain_layer& layer, const Memory& memory) {
  // Another index than that of the layer, to be replaced.
  std::vector<std::int32_t> index = layer.weak_index();
  for (std::size_t j = 0; j < index.size(); ++j) index[j] = static_cast<std::int32_t>(j);
  return quantized_matrix<Layout, Memory>(layer.d, index, memory);
}

void expect(const qeft::status& s, const char* what) {
  if (!s.ok()) fail(std::string(what) + ": " + s.message());
}

/// host -> a stream's memory -> the device -> pinned -> the device -> host, each after the other.
template <class Layout>
void compare_copies(const plain_layer& layer, const stream& s) {
  const on_stream exec{s};
  const auto host = pack<Layout>(layer);
  auto first = blank<Layout>(layer, stream_memory{s});
  auto second = blank<Layout>(layer, device_memory{});
  auto pinned = blank<Layout>(layer, pinned_memory{});
  auto third = blank<Layout>(layer, stream_memory{s});
  quantized_matrix<Layout> back = blank<Layout>(layer, qeft::host_memory{});
  expect(copy(exec, host, first), "host to device");
  expect(copy(exec, first, second), "device to device");
  expect(copy(exec, second, pinned), "device to pinned");
  expect(copy(exec, pinned, third), "pinned to device");
  expect(copy(exec, third, back), "device to host");
  s.wait();
  if (!same_bytes(back, host)) fail(std::string("copies of ") + describe(layer.d));

  // Owners made of others, copied, moved and assigned.
  const quantized_matrix<Layout, stream_memory> made(host, stream_memory{s});
  auto copied = made;
  const auto moved = std::move(copied);
  third = moved;
  if (!same_bytes(quantized_matrix<Layout>(third), host)) {
    fail(std::string("owners of ") + describe(layer.d));
  }
}

void compare_random_layers(int count, std::uint64_t seed) {
  const stream s;
  for (int i = 0; i < count; ++i) {
    random_source random(seed + static_cast<std::uint64_t>(i));
    const auto layer = random_case(random, 20000);
    if (random.chance(50)) {
      compare_copies<fragment>(layer, s);
    } else {
      compare_copies<row_packed>(layer, s);
    }
  }
}

/// A layer that lives on a stream only: made, repacked, multiplied and freed without a wait.
void check_products() {
  const stream s;
  const on_stream exec{s};
  auto layer = layer_of(77, 520, 16);
  layer.d.weak = qeft::weak_kind::indexed;
  random_source random(4);
  layer = random_layer(layer.d, random);
  const auto x = random_activations<qeft::half_bits>(random, 2 * 520);
  const auto device_x = to_device(x);
  device_array<float> y(2 * 77);
  device_array<std::byte> space(4096);
  {
    const quantized_matrix<row_packed, stream_memory> rows(pack<row_packed>(layer),
                                                           stream_memory{s});
    auto w = blank<fragment>(layer, stream_memory{s});
    expect(repack(exec, rows, w), "repack");
    check(workspace_bytes(exec, w, device_x.data(), 2) <= space.size(), "workspace_bytes");
    const on_stream with_space{s, {space.data(), space.size()}};
    expect(gemm(with_space, w, device_x.data(), 2, y.data()), "gemm");
  }
  s.wait();
  check(error_of(layer, x, to_host(y)) <= 1, "a layer on a stream");
}

/// A copy between matrices of the device is part of a graph.
void check_capture() {
  const auto layer = layer_of(40, 300, 16);
  const auto host = pack<fragment>(layer);
  const quantized_matrix<fragment, device_memory> from(host);
  auto to = blank<fragment>(layer, device_memory{});
  in_graph([&](cudaStream_t s) { return copy(on_stream{s}, from, to); });
  check(same_bytes(quantized_matrix<fragment>(to), host), "a graph");
}

void check_refusals() {
  const auto layer = layer_of(40, 300, 16);
  const auto host = pack<fragment>(layer);
  const auto refused = [&](const matrix_descriptor& d, const char* word) {
    quantized_matrix<fragment, device_memory> to(d);
    check_refused(copy(on_stream{}, host, to), errc::invalid_argument, word);
  };
  matrix_descriptor d = layer.d;
  d.out_channels = 41;
  refused(d, "out_channels is 40 in from, but 41 in to");
  d = layer.d;
  d.weak = qeft::weak_kind::per_head;
  d.heads = 4;
  refused(d, "weak is tail");
  quantized_matrix<fragment, device_memory> per_head(d);
  d.heads = 2;
  refused(d, "weak is tail");
  quantized_matrix<fragment, device_memory> other(d);
  check_refused(copy(on_stream{}, per_head, other), errc::invalid_argument, "heads is 4");
  quantized_matrix<fragment, device_memory> nothing;
  check_refused(copy(on_stream{}, host, nothing), errc::invalid_argument, "out_channels");
  expect(copy(on_stream{}, quantized_matrix<fragment>(), nothing), "nothing");
  expect(copy(on_stream{}, other, other), "itself");
}

}  // namespace

int main(int argc, char** argv) {
  if (!has_device()) return 77;
  check_products();
  check_capture();
  check_refusals();
  const int count = argc > 1 ? std::atoi(argv[1]) : 200;
  const auto seed = static_cast<std::uint64_t>(argc > 2 ? std::atoi(argv[2]) : 1);
  compare_random_layers(count, seed);
  std::printf("%d random layers, %d failures\n", count, failures);
  return failures == 0 && count > 0 ? 0 : 1;
}
