// SPDX-License-Identifier: Apache-2.0
// How gemm is launched: types of outputs, epilogues, streams and graphs, several layers at once,
// and what is refused.
#include "device/product.cuh"
#include "qeft/qeft.cuh"

namespace {

using namespace qeft_test;
using qeft::errc;
using qeft::index_t;
using qeft::layer_output;
using qeft::on_stream;
using qeft::quant_format;
using qeft::layout::fragment;

/// Each format costs a set of kernels.
using one_format = qeft::format_list<quant_format<4>>;

void check_outputs() {
  const auto layer = layer_of(77, 520, 16);
  const qeft::quantized_matrix<fragment, qeft::device_memory> w(pack<fragment>(layer));
  random_source random(2);
  const auto x = random_activations<qeft::half_bits>(random, 3 * 520);
  const auto device_x = to_device(x);
  const auto y = product<quant_format<4>>(w, device_x, 3);
  check(error_of(layer, x, y) <= 1, "floats");
  check(error_of(layer, x, product<quant_format<4>, qeft::half_bits>(w, device_x, 3)) <= 1, "f16");
  check(error_of(layer, x, product<quant_format<4>, qeft::bf16_bits>(w, device_x, 3)) <= 1, "bf16");

  const auto old = to_device(y);
  check_user_epilogue(y, product<quant_format<4>>(w, device_x, 3, user_epilogue{old.data(), 77}),
                      77);

  // gemv, and formats known at run time.
  device_array<float> one(77);
  const on_stream plain;
  check(qeft::supports_gemm<one_format>(plain, w, device_x.data(), 1, one.data()).ok(),
        "supports_gemm");
  check(qeft::workspace_bytes<one_format>(plain, w, device_x.data(), 1) == 0, "workspace_bytes");
  check(qeft::gemv<one_format>(plain, w, device_x.data(), one.data()).ok(), "gemv");
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
  check(same_start(product<quant_format<4>>(w, device_x, 3, {}, stream), y), "a stream");
  device_array<float> replayed(3 * 77);
  // From an address at which activations have to be gathered first.
  std::vector<qeft::half_bits> moved(1);
  moved.insert(moved.end(), x.begin(), x.end());
  const auto askew = to_device(moved);
  device_array<std::byte> space(qeft::workspace_bytes<one_format>(plain, w, askew.data() + 1, 3));
  check(space.size() > 0, "x that is not aligned needs a workspace");
  in_graph([&](cudaStream_t captured) {
    return qeft::gemm<one_format>(on_stream{captured, {space.data(), space.size()}}, w,
                                  askew.data() + 1, 3, replayed.data());
  });
  check(to_host(replayed) == y, "a graph");
  check(cudaStreamDestroy(stream), "cudaStreamDestroy");
}

/// The same bits however many warps take the parts.
template <index_t GroupColumns>
void compare_plans(index_t group) {
  using view_type = qeft::quantized_matrix_view<quant_format<4>, qeft::weak_tail<>, fragment,
                                                qeft::device_memory>;
  using alone = qeft::block::few_tokens_product<view_type, 1, 1, GroupColumns>;
  using in_cluster = qeft::kernel::product_in_cluster<view_type, 1, 1, GroupColumns>;
  const auto layer = layer_of(20, 4128, 600, group);
  const qeft::quantized_matrix<fragment, qeft::device_memory> w(pack<fragment>(layer));
  const auto view = w.view<quant_format<4>>(qeft::weak_tail<>{{600}});
  random_source random(4);
  const auto x = to_device(random_activations<qeft::half_bits>(random, 2 * 4128));
  const auto y = product<quant_format<4>>(w, x, 2);
  const auto parts = qeft::tuning::make_parts(4, 3528, 600);
  const int count = parts.count();
  check(parts.dense > 1 && parts.weak > 1, "several parts of both kinds");
  for (int each = count; each > 1; --each) {
    const int warps = (count + each - 1) / each;
    const auto kernel =
        qeft::kernel::few_tokens<1, 1, GroupColumns, 1, view_type, float, qeft::epilogue::none>;
    bool in_clusters = false;
    check(qeft::device::detail::is_sm90a_code(kernel, in_clusters).ok(), "the kernel's code");
    const int shared =
        in_clusters ? in_cluster::shared_bytes(count, warps) : alone::shared_bytes(count, warps);
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
          "cudaFuncSetAttribute");
    device_array<float> z(2 * 20);
    kernel<<<2, 32 * warps, shared>>>(
        {{{view, x.data(), x.data() + 3528, 4128, 2, z.data(), {}, parts, each}}, {2}});
    check(cudaDeviceSynchronize(), "a plan");
    check(to_host(z) == y, "the same bits however many warps there are");
  }
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
  check(qeft::gemm<one_format>(exec, w, x.data(), 0, static_cast<float*>(nullptr)).ok(),
        "no tokens");

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
  const auto* odd_x =
      reinterpret_cast<const qeft::half_bits*>(reinterpret_cast<const std::byte*>(x.data()) + 1);
  check_refused(gemm(exec, view, odd_x, 2, y.data()), errc::invalid_argument, "x is not aligned");
  auto* odd_y = reinterpret_cast<float*>(reinterpret_cast<std::byte*>(y.data()) + 2);
  check_refused(gemm(exec, view, x.data(), 2, odd_y), errc::invalid_argument, "y is not aligned");
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

  check_refused(qeft::device::detail::check_capability("gemm", 7), errc::unsupported,
                "compute capability 7.x");
  device_array<qeft::bf16_bits> other(2 * 300);
  check_refused(qeft::gemm<one_format>(exec, w, other.data(), 2, y.data()), errc::unsupported,
                "x is bf16");
  const qeft::quantized_matrix<fragment, qeft::device_memory> empty;
  check_refused(qeft::gemm<one_format>(exec, empty, x.data(), 2, y.data()), errc::invalid_argument,
                "");
  qeft::matrix_descriptor eight = layer.d;
  eight.bits = 8;
  const qeft::quantized_matrix<fragment, qeft::device_memory> not_built_in(eight);
  check_refused(qeft::gemm<one_format>(exec, not_built_in, x.data(), 2, y.data()),
                errc::unsupported, "built in are");
  check(cudaGetLastError() == cudaSuccess, "a refusal leaves no error behind");
  check(cudaDeviceSynchronize(), "refusals");
  check(to_host(y) == untouched, "a refusal writes nothing");
}

using owner = qeft::quantized_matrix<fragment, qeft::device_memory>;

plain_layer random_like(random_source& random, const qeft::matrix_descriptor& like) {
  qeft::matrix_descriptor d = like;
  d.out_channels = random.integer(1, random.chance(20) ? 2000 : 200);
  return random_layer(d, random);
}

/// Three layers in one launch against one after the other.
void compare_layers(const plain_layer (&plain)[3], index_t tokens, random_source& random) {
  const qeft::matrix_descriptor& d = plain[0].d;
  const owner w[] = {owner(pack<fragment>(plain[0])), owner(pack<fragment>(plain[1])),
                     owner(pack<fragment>(plain[2]))};
  const auto x = to_device(random_activations<qeft::half_bits>(random, tokens * d.in_channels));
  const auto array_of = [&](const owner& of) {
    return device_array<float>(tokens * of.descriptor().out_channels);
  };
  device_array<float> y[] = {array_of(w[0]), array_of(w[1]), array_of(w[2])};
  const layer_output<owner, float> layers[] = {
      {w[0], y[0].data()}, {w[1], y[1].data()}, {w[2], y[2].data()}};
  device_array<std::byte> space(
      qeft::workspace_bytes<one_format>(on_stream{}, layers, x.data(), tokens));
  const on_stream exec{nullptr, {space.data(), space.size()}};
  check(qeft::supports_gemm<one_format>(exec, layers, x.data(), tokens).ok(),
        "supports_gemm of layers");
  const qeft::status s = qeft::gemm<one_format>(exec, layers, x.data(), tokens);
  const std::string what = describe(d) + ", " + std::to_string(tokens) + " tokens";
  if (!s.ok()) fail(what + ": " + s.message());
  for (int i = 0; i < 3; ++i) {
    auto alone = array_of(w[i]);
    device_array<std::byte> its_space(
        qeft::workspace_bytes<one_format>(on_stream{}, w[i], x.data(), tokens));
    const qeft::status one =
        qeft::gemm<one_format>(on_stream{nullptr, {its_space.data(), its_space.size()}}, w[i],
                               x.data(), tokens, alone.data());
    if (!one.ok()) fail(what + ": " + one.message());
    if (to_host(y[i]) != to_host(alone)) fail(what + ": other bits with layers in the launch");
  }
}

void compare_random_layers(int count) {
  for (int i = 0; i < count; ++i) {
    random_source random(static_cast<std::uint64_t>(i));
    qeft::matrix_descriptor d;
    d.in_channels = random.integer(1, 700);
    d.group_size = random.chance(50) ? 128 : 64;
    const qeft::weak_kind kinds[] = {qeft::weak_kind::none, qeft::weak_kind::tail,
                                     qeft::weak_kind::indexed, qeft::weak_kind::per_head};
    d.weak = kinds[random.integer(0, 3)];
    if (d.weak == qeft::weak_kind::per_head) {
      d.heads = 4;
      d.in_channels = qeft::round_up(d.in_channels, 4);
      d.weak_columns = 4 * random.integer(0, d.in_channels / 4);
    } else if (d.weak != qeft::weak_kind::none) {
      d.weak_columns = random.integer(0, d.in_channels);
    }
    const plain_layer plain[] = {random_like(random, d), random_like(random, d),
                                 random_like(random, d)};
    compare_layers(plain, random.integer(1, random.chance(50) ? 16 : 80), random);
  }
}

/// So large that blocks take all parts; with 449 tokens, compute capability 9.0 takes 128 together,
/// else 64.
void compare_large_layers() {
  random_source random(6);
  const plain_layer plain[] = {layer_of(800, 104, 16), layer_of(129, 104, 16),
                               layer_of(1300, 104, 16)};
  for (const index_t tokens : {index_t{256}, index_t{449}}) compare_layers(plain, tokens, random);
}

/// Two and four layers are one launch, or one and that of add_parts.
void count_launches() {
  const owner w(pack<fragment>(layer_of(40, 512, 16)));
  const owner v(pack<fragment>(layer_of(3000, 512, 16)));
  device_array<qeft::half_bits> x(449 * 512);
  device_array<float> y[] = {device_array<float>(449 * 40), device_array<float>(449 * 40),
                             device_array<float>(449 * 3000), device_array<float>(449 * 40)};
  const layer_output<owner, float> four[] = {
      {w, y[0].data()}, {w, y[1].data()}, {v, y[2].data()}, {w, y[3].data()}};
  const layer_output<owner, float> two[] = {four[0], four[2]};
  const auto launches = [&](const auto& layers, index_t tokens) {
    device_array<std::byte> space(
        qeft::workspace_bytes<one_format>(on_stream{}, layers, x.data(), tokens));
    return in_graph([&](cudaStream_t stream) {
      const on_stream exec{stream, {space.data(), space.size()}};
      return qeft::gemm<one_format>(exec, layers, x.data(), tokens);
    });
  };
  for (const index_t tokens : {index_t{16}, index_t{449}}) {
    check(launches(two, tokens) == 1 && launches(four, tokens) == 1, "one launch");
  }
  check(launches(two, 17) == 2 && launches(four, 17) == 2, "a launch and one of add_parts");
}

void check_layers_refused() {
  const owner w(pack<fragment>(layer_of(40, 512, 16)));
  const qeft::quantized_matrix<fragment, qeft::device_memory> none;
  device_array<qeft::half_bits> x(2 * 512);
  device_array<float> y(2 * 40);
  device_array<float> z(2 * 40);
  const auto refused = [&](const owner& other, errc code, const char* word) {
    check_refused(
        qeft::gemm<one_format>(
            on_stream{}, {layer_output{w, y.data()}, layer_output{other, z.data()}}, x.data(), 2),
        code, word);
  };
  const auto like = [](index_t ic, index_t k, index_t group, int bits) {
    return owner(pack<fragment>(layer_of(24, ic, k, group, bits)));
  };
  refused(like(520, 16, 128, 4), errc::invalid_argument, "in_channels = 520");
  refused(like(512, 32, 128, 4), errc::invalid_argument, "k = 32");
  refused(like(512, 16, 64, 4), errc::invalid_argument, "columns_per_group = 64");
  refused(like(512, 16, 128, 3), errc::invalid_argument, "number of bits");
  refused(none, errc::invalid_argument, "");
  qeft::matrix_descriptor head = layer_of(24, 512, 16).d;
  head.weak = qeft::weak_kind::per_head;
  refused(owner(head), errc::invalid_argument, "placement");
  check_refused(
      qeft::gemm<one_format>(
          on_stream{}, {layer_output{w, y.data()}, layer_output{w, static_cast<float*>(nullptr)}},
          x.data(), 2),
      errc::invalid_argument, "y is null");
  check(cudaDeviceSynchronize(), "refusals");
}

}  // namespace

int main(int argc, char** argv) {
  if (!has_device()) return 77;
  check_outputs();
  compare_plans<128>(128);
  compare_plans<qeft::dynamic>(96);
  compare_plans<512>(1536);
  check_refusals();
  check_layers_refused();
  const int count = argc > 1 ? std::atoi(argv[1]) : 60;
  if (argc == 1) {
    compare_large_layers();
    count_launches();
  }
  compare_random_layers(count);
  std::printf("%d sets of layers, %d failures\n", count, failures);
  return failures == 0 ? 0 : 1;
}
