// SPDX-License-Identifier: Apache-2.0
// Weak columns chosen on the device: the bits of the host, with ties and zeros; refusals.
#include "device/support.cuh"
#include "qeft/device/selection.cuh"

namespace {

using namespace qeft_test;
using qeft::errc;
using qeft::index_t;
using qeft::on_stream;
using qeft::top_k;
using qeft::top_k_per_head;
using qeft::weak_last;
using qeft::weak_last_per_head;

/// An executor with a workspace for so many columns.
class executor {
 public:
  explicit executor(index_t columns)
      : space_(qeft::selection_workspace_bytes(on_stream{}, columns)),
        exec_{nullptr, {space_.data(), space_.size()}} {
    if (space_.size() > 0) {  // what was there before does not matter
      check(cudaMemset(space_.data(), 0x7f, static_cast<std::size_t>(space_.size())), "cudaMemset");
    }
  }
  operator const on_stream&() const { return exec_; }

 private:
  device_array<std::byte> space_;
  on_stream exec_;
};

void expect(const qeft::status& s, const std::string& what) {
  if (!s.ok()) fail(what + ": " + s.message());
}

/// Sensitivities, of which many are equal or 0, and some -0.
std::vector<double> random_sensitivities(index_t columns, random_source& random) {
  const auto kinds = random.integer(1, 4);
  std::vector<double> s(static_cast<std::size_t>(columns));
  for (double& x : s) {
    switch (random.integer(1, kinds)) {
      case 1:
        x = std::abs(random.real()) * std::pow(10.0, random.real() * 10);
        break;
      case 2:
        x = static_cast<double>(random.integer(0, 5));
        break;
      case 3:
        x = 0.0;
        break;
      default:
        x = -0.0;
    }
  }
  return s;
}

/// Scalars that are not zero anywhere but where the host's are, compared by their bytes.
template <class T>
void expect_same(const device_array<T>& got, const std::vector<T>& expected,
                 const std::string& what) {
  check(cudaDeviceSynchronize(), what.c_str());
  const auto host = to_host(got);
  if (host.size() != expected.size() ||
      std::memcmp(host.data(), expected.data(), host.size() * sizeof(T)) != 0) {
    fail(what);
  }
}

void compare_top_k(random_source& random, index_t most) {
  const index_t columns = random.integer(0, most);
  const index_t k = random.pick<index_t>({0, columns, random.integer(0, columns)});
  const auto s = random_sensitivities(columns, random);
  const std::string what = std::to_string(k) + " of " + std::to_string(columns) + " columns";
  const auto device_s = to_device(s);
  const executor exec(columns);
  device_array<std::int32_t> chosen(k);
  expect(top_k(exec, device_s.data(), columns, k, chosen.data()), "top_k");
  const auto expected = qeft::top_k(s, k);
  expect_same(chosen, expected, "top_k: " + what);

  device_array<std::int32_t> source(columns);
  expect(weak_last(exec, columns, {chosen.data(), k}, source.data()), "weak_last");
  expect_same(source, qeft::weak_last(columns, expected).source(), "weak_last: " + what);
}

void compare_top_k_per_head(random_source& random) {
  const index_t value_heads = random.integer(1, 9);
  const index_t heads = value_heads * random.integer(1, 4);
  const index_t head_dim = random.integer(1, 150);
  const index_t columns = heads * head_dim;
  const index_t k = heads * random.pick<index_t>({0, head_dim, random.integer(0, head_dim)});
  const auto s = random_sensitivities(columns, random);
  const auto device_s = to_device(s);
  const executor exec(columns);
  device_array<std::int32_t> chosen(k);
  expect(top_k_per_head(exec, device_s.data(), columns, heads, value_heads, k, chosen.data()),
         "top_k_per_head");
  const std::string what = std::to_string(k) + " of " + std::to_string(columns) + " columns in " +
                           std::to_string(heads) + " heads that share " +
                           std::to_string(value_heads);
  const auto expected = qeft::top_k_per_head(s, heads, value_heads, k);
  expect_same(chosen, expected, what);

  device_array<std::int32_t> source(columns);
  expect(weak_last_per_head(exec, columns, heads, {chosen.data(), k}, source.data()),
         "weak_last_per_head");
  expect_same(source, qeft::weak_last_per_head(columns, heads, expected).source(),
              "weak_last_per_head: " + what);
}

void compare_global_selection(random_source& random) {
  const index_t columns = random.integer(1, 3000);
  const index_t k = random.pick<index_t>({0, columns, random.integer(0, columns)});
  const auto which = random.pick({qeft::accumulation::top_k, qeft::accumulation::all_columns});
  qeft::global_selection host(columns, k, which);
  device_array<double> sum(columns);
  const executor exec(columns);
  for (int layer = 0; layer < 3; ++layer) {
    auto s = random_sensitivities(columns, random);
    if (random.chance(10)) s.assign(s.size(), 0.0);
    host.add(s);
    const auto device_s = to_device(s);
    expect(add_to_selection(exec, device_s.data(), columns, k, which, sum.data()),
           "add_to_selection");
    check(cudaDeviceSynchronize(), "add_to_selection");
  }
  expect_same(sum, host.sum(), "the global sum of " + std::to_string(columns) + " columns");
  device_array<std::int32_t> chosen(k);
  expect(top_k(exec, sum.data(), columns, k, chosen.data()), "top_k");
  expect_same(chosen, host.choose(), "the global choice of " + std::to_string(k) + " columns");
}

/// Two samples against the sums of solver::diagonal_accumulator, spelled out.
template <class X>
void compare_squares(random_source& random) {
  const index_t columns = random.integer(1, 400);
  std::vector<double> sum(static_cast<std::size_t>(columns), 0.0);
  device_array<double> device_sum(columns);
  index_t all_tokens = 0;
  for (int sample = 0; sample < 2; ++sample) {
    const index_t tokens = random.integer(0, 50);
    std::vector<X> x;
    if constexpr (std::is_same_v<X, float>) {
      for (index_t i = 0; i < tokens * columns; ++i) {
        x.push_back(static_cast<float>(random.real() * 1e3));
      }
    } else {
      x = random_activations<X>(random, tokens * columns);
    }
    for (std::size_t i = 0; i < x.size(); ++i) {
      const auto v = static_cast<double>(qeft::to_float(x[i]));
      sum[i % static_cast<std::size_t>(columns)] += v * v;
    }
    const auto device_x = to_device(x);
    expect(add_column_squares(on_stream{}, device_x.data(), tokens, columns, device_sum.data()),
           "add_column_squares");
    check(cudaDeviceSynchronize(), "add_column_squares");
    all_tokens += tokens;
  }
  expect_same(device_sum, sum, "squares of " + std::to_string(columns) + " columns");
  for (double& v : sum) v *= all_tokens == 0 ? 0.0 : 2.0 / static_cast<double>(all_tokens);
  expect(hessian_diagonal(on_stream{}, device_sum.data(), columns, all_tokens, device_sum.data()),
         "hessian_diagonal");
  expect_same(device_sum, sum, "the diagonal of " + std::to_string(columns) + " columns");
}

void check_refusals() {
  device_array<double> s(100), sum(100);
  device_array<std::int32_t> chosen(100);
  const executor exec(100);
  const auto refused = [&](const qeft::status& status, const char* word) {
    check_refused(status, errc::invalid_argument, word);
  };
  refused(top_k(exec, s.data(), 100, 101, chosen.data()), "k is 101");
  refused(top_k(exec, s.data(), 100, -1, chosen.data()), "k is -1");
  refused(top_k(exec, s.data(), -1, 0, chosen.data()), "columns is -1");
  refused(top_k(exec, s.data(), (index_t{1} << 30) + 1, 0, chosen.data()), "2^30");
  refused(top_k(exec, nullptr, 100, 1, chosen.data()), "sensitivity is null");
  refused(top_k(exec, s.data(), 100, 1, nullptr), "chosen is null");
  refused(top_k(on_stream{}, s.data(), 100, 1, chosen.data()), "selection_workspace_bytes");
  const on_stream& good = exec;
  const on_stream askew{nullptr, {good.workspace.data() + 8, good.workspace.size()}};
  refused(top_k(askew, s.data(), 100, 1, chosen.data()), "alignment");
  refused(top_k_per_head(exec, s.data(), 100, 3, 1, 3, chosen.data()), "heads is 3");
  refused(top_k_per_head(exec, s.data(), 100, 4, 3, 4, chosen.data()), "value_heads = 3");
  refused(top_k_per_head(exec, s.data(), 100, 4, 2, 6, chosen.data()), "k = 6");
  refused(top_k_per_head(exec, s.data(), 100, 0, 1, 0, chosen.data()), "heads is 0");
  refused(add_to_selection(exec, s.data(), 100, 1, qeft::accumulation::top_k, nullptr),
          "sum is null");
  refused(weak_last(exec, 100, {chosen.data(), 101}, chosen.data()), "k is 101");
  refused(weak_last(exec, 100, {nullptr, 2}, chosen.data()), "weak is null");
  refused(weak_last(exec, 100, {chosen.data(), 2}, nullptr), "source is null");
  refused(weak_last_per_head(exec, 100, 0, {chosen.data(), 4}, chosen.data()), "heads is 0");
  refused(weak_last_per_head(exec, 100, 3, {chosen.data(), 3}, chosen.data()), "heads is 3");
  refused(weak_last_per_head(exec, 100, 4, {chosen.data(), 6}, chosen.data()), "the 6 weak ones");
  refused(add_column_squares(on_stream{}, static_cast<float*>(nullptr), 1, 100, sum.data()),
          "x is null");
  refused(add_column_squares(on_stream{}, static_cast<float*>(nullptr), -1, 100, sum.data()),
          "tokens is -1");
  refused(hessian_diagonal(on_stream{}, sum.data(), 100, -2, sum.data()), "tokens is -2");

  // CUB would take an error of the caller's for its own: it is left, and named.
  void* too_much = nullptr;
  check(cudaMalloc(&too_much, std::size_t{1} << 50) != cudaSuccess, "2^50 bytes");
  check_refused(top_k(exec, s.data(), 100, 1, chosen.data()), errc::device_error, "earlier");
  check(cudaGetLastError() != cudaSuccess, "an error from before is left");
  expect(top_k(exec, s.data(), 100, 1, chosen.data()), "what is refused otherwise");
  check(cudaGetLastError() == cudaSuccess, "a refusal leaves no error behind");
  check(cudaDeviceSynchronize(), "refusals");
}

/// The whole choice in a graph.
void check_capture() {
  random_source random(5);
  const auto s = random_sensitivities(20000, random);
  const auto device_s = to_device(s);
  device_array<std::int32_t> chosen(128);
  const executor space(20000);
  in_graph([&](cudaStream_t stream) {
    const on_stream exec{stream, static_cast<const on_stream&>(space).workspace};
    return top_k(exec, device_s.data(), 20000, 128, chosen.data());
  });
  expect_same(chosen, qeft::top_k(s, 128), "a graph");
}

}  // namespace

int main(int argc, char** argv) {
  if (!has_device()) return 77;
  check_refusals();
  check_capture();
  const int count = argc > 1 ? std::atoi(argv[1]) : 60;
  const auto seed = static_cast<std::uint64_t>(argc > 2 ? std::atoi(argv[2]) : 1);
  for (int i = 0; i < count; ++i) {
    random_source random(seed + static_cast<std::uint64_t>(i));
    compare_top_k(random, random.chance(10) ? 20000 : 2000);
    compare_top_k_per_head(random);
    compare_global_selection(random);
    compare_squares<float>(random);
    compare_squares<qeft::half_bits>(random);
    compare_squares<qeft::bf16_bits>(random);
  }
  std::printf("%d random choices, %d failures\n", count, failures);
  return failures == 0 && count > 0 ? 0 : 1;
}
