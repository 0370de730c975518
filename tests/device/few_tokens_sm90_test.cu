// SPDX-License-Identifier: Apache-2.0
// Products with few tokens in clusters, which is what compute capability 9.0 has, against the
// definition in double and, bit for bit, against those of blocks alone. Under a simulator, which
// keeps writes and copies in order, a missing arch::fence_bulk_copies would not be noticed.
#include "device/support.cuh"
#include "qeft/qeft.cuh"

namespace {

using namespace qeft_test;
using qeft::index_t;
using qeft::on_stream;
using qeft::quant_format;
using qeft::layout::fragment;
namespace detail = qeft::device::detail;

template <class View>
using args_of = qeft::kernel::product_args<View, float, qeft::epilogue::none>;
/// For groups of any size.
template <class View>
using product_alone = qeft::block::few_tokens_product<View, 1, 2, qeft::dynamic>;

/// A kernel of a user's: blocks that share nothing.
template <class View>
__global__ void multiply_alone(const __grid_constant__ args_of<View> args) {
  using product = product_alone<View>;
  extern __shared__ uint4 shared[];
  const product of(shared, args.parts, args.parts_each);
  of.multiply(args.w, static_cast<int>(blockIdx.x),
              {args.dense_x, args.weak_x, args.stride, args.tokens});
  of.meet();
  for (unsigned at = threadIdx.x; at < product::places; at += blockDim.x) {
    const auto sums = of.sums(at);
    for (int i = 0; i < product::rows_together; ++i) {
      const index_t row = index_t{blockIdx.x} * product::rows + product::row(at, i);
      if (product::token(at) >= args.tokens || row >= args.w.out_channels) continue;
      args.y[product::token(at) * args.w.out_channels + row] = sums.of[i];
    }
  }
}

/// What computes a product.
struct alone {};
struct by_choice {};
template <int RowTiles, int TokenTiles>
struct in_clusters {};

template <class View>
qeft::status launch(alone, args_of<View> args) {
  using product = product_alone<View>;
  const auto plan = qeft::tuning::plan_warps(args.parts.count(), 1);
  args.parts_each = plan.parts_each;
  const auto kernel = multiply_alone<View>;
  const int shared = product::shared_bytes(args.parts.count(), plan.warps);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
        "cudaFuncSetAttribute");
  kernel<<<static_cast<unsigned>(qeft::ceil_div(args.w.out_channels, product::rows)),
           static_cast<unsigned>(32 * plan.warps), static_cast<std::size_t>(shared)>>>(args);
  return qeft::detail::cuda_status(cudaPeekAtLastError(), "a launch");
}
template <class View>
qeft::status launch(by_choice, const args_of<View>& args) {
  args_of<View> layers[] = {args};
  return detail::launch_few(nullptr, layers, 132);
}
template <int RowTiles, int TokenTiles, class View>
qeft::status launch(in_clusters<RowTiles, TokenTiles>, const args_of<View>& args) {
  args_of<View> layers[] = {args};
  return detail::with_group_columns(args.w, [&](auto group_columns) {
    return detail::launch_few<RowTiles, TokenTiles, group_columns>(nullptr, layers, 132);
  });
}

/// y of the first `tokens` tokens.
template <class Format, class Scalar, class How>
std::vector<float> product(How how, const qeft::quantized_matrix<fragment, qeft::device_memory>& w,
                           const device_array<Scalar>& x, index_t tokens) {
  const qeft::matrix_descriptor& d = w.descriptor();
  device_array<float> y(tokens * d.out_channels);
  qeft::visit_weak(d, w.weak_index().data(), [&](auto weak) {
    const auto view = w.template view<Format>(weak);
    const auto plan = detail::plan_activations(view, x.data());
    device_array<std::byte> space(detail::gathered_bytes(plan, tokens));
    check(cudaMemset(space.data(), 0xff, static_cast<std::size_t>(space.size())), "cudaMemset");
    const Scalar* ordered = x.data();
    if (plan.gathered) {
      auto* const to = reinterpret_cast<Scalar*>(space.data());
      const auto s = detail::launch_order(nullptr, view, plan, x.data(), tokens, to);
      if (!s.ok()) fail(describe(d) + ": " + s.message());
      ordered = to;
    }
    const qeft::status s =
        launch(how, detail::args_of(view, plan, ordered, tokens, y.data(), qeft::epilogue::none{}));
    if (!s.ok()) fail(describe(d) + ": " + s.message());
    check(cudaDeviceSynchronize(), "a product");
  });
  return to_host(y);
}

template <class Format>
void compare(const plain_layer& layer, random_source& random) {
  using scalar = typename Format::scalar_type;
  const qeft::quantized_matrix<fragment, qeft::device_memory> w(pack<fragment>(layer));
  const auto x = random_activations<scalar>(random, 16 * layer.d.in_channels);
  const auto device_x = to_device(x);
  const auto expected = product<Format>(alone{}, w, device_x, 16);
  const auto check_same = [&](auto how, index_t tokens) {
    const auto y = product<Format>(how, w, device_x, tokens);
    if (same_start(y, expected)) return;
    fail(describe(layer.d) + ": other bits in clusters with " + std::to_string(tokens) +
         " tokens, error of " + std::to_string(error_of(layer, x, y)) + " times the bound");
  };
  if (const double e = error_of(layer, x, expected); !(e <= 1)) {
    fail(describe(layer.d) + ": error of " + std::to_string(e) + " times the bound");
  }
  check_same(in_clusters<2, 1>{}, 1);
  check_same(by_choice{}, random.integer(1, 8));
  check_same(by_choice{}, random.integer(9, 16));
  check_same(in_clusters<2, 2>{}, 16);
}

/// With the widths and kinds of zero points that differ in how columns are taken.
using formats =
    qeft::format_list<quant_format<4>, quant_format<3>,
                      quant_format<2, qeft::dynamic, qeft::zero_kind::scaled>,
                      quant_format<8, qeft::dynamic, qeft::zero_kind::integer, qeft::bf16_bits>>;

int compare_random_layers(int count, std::uint64_t seed) {
  int ran = 0;
  for (; ran < count; ++seed) {
    random_source random(seed);
    const auto layer = random_case(random, 40000);
    const bool is_tested =
        if_tested<formats>(layer, [&](auto format) { compare<decltype(format)>(layer, random); });
    if (is_tested) ++ran;
  }
  return ran;
}

/// Clusters of all sizes; stages that are filled several times, and by several blocks; warps with
/// parts of both kinds; columns that end anywhere in a stage.
void compare_shapes() {
  random_source random(3);
  for (const index_t blocks : {1, 2, 3, 4, 6, 8, 16}) {
    compare<quant_format<4>>(layer_of(blocks * 32 - 9, 4096, 128), random);
  }
  for (const index_t group : {index_t{32}, index_t{96}, index_t{128}, qeft::per_channel}) {
    for (const index_t ic : {511, 2600, 17001}) {
      compare<quant_format<4>>(layer_of(64, ic, ic / 8, group), random);
      compare<quant_format<3>>(layer_of(64, ic, 17, group, 3), random);
    }
  }
  compare<quant_format<4>>(layer_of(64, 9000, 9000), random);
  // So many columns that each block of a cluster of eight, or four, fills stages several times: a
  // block waits for both parities.
  compare<quant_format<4>>(layer_of(256, 17001, 2125), random);
  compare<quant_format<4>>(layer_of(123, 17001, 128), random);
}

void check_choices() {
  using view = qeft::quantized_matrix_view<quant_format<4>, qeft::weak_tail<>, fragment,
                                           qeft::device_memory>;
  bool is = false;
  check(detail::is_sm90a_code(
            qeft::kernel::few_tokens<2, 1, 128, 1, view, float, qeft::epilogue::none>, is)
                .ok() &&
            is,
        "a kernel with clusters");
  check(detail::is_sm90a_code(multiply_alone<view>, is).ok() && !is, "a kernel without clusters");
  using qeft::tuning::few_tokens_cluster;
  check(few_tokens_cluster(128, 132) == 8 && few_tokens_cluster(36, 132) == 4 &&
            few_tokens_cluster(2, 132) == 2 && few_tokens_cluster(125, 132) == 1,
        "blocks of a cluster");
  check(few_tokens_cluster(128, 7) == 4 && few_tokens_cluster(128, 1) == 1, "small devices");
}

}  // namespace

int main(int argc, char** argv) {
  if (!has_device()) return 77;
  int major = 0;
  int minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0), "the device");
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, 0), "the device");
  if (major != 9 || minor != 0) {
    std::printf("skipped: compute capability %d.%d, not 9.0\n", major, minor);
    return 77;
  }
  check_choices();
  if (argc == 1) compare_shapes();
  const int count = argc > 1 ? std::atoi(argv[1]) : 60;
  const auto seed = static_cast<std::uint64_t>(argc > 2 ? std::atoi(argv[2]) : 1);
  const int ran = compare_random_layers(count, seed);
  std::printf("%d random layers, %d failures\n", ran, failures);
  return failures == 0 && ran == count ? 0 : 1;
}
