// SPDX-License-Identifier: Apache-2.0
// Columns of activations gathered and scattered on the device, for random sizes and addresses.
#include <numeric>

#include "device/support.cuh"
#include "qeft/qeft.cuh"

namespace {

using namespace qeft_test;
using qeft::errc;
using qeft::index_t;
using qeft::on_stream;

/// The first `count` entries of a permutation of [0, columns).
std::vector<std::int32_t> random_index(index_t columns, index_t count, random_source& random) {
  std::vector<std::int32_t> index(static_cast<std::size_t>(columns));
  std::iota(index.begin(), index.end(), 0);
  for (index_t i = 0; i < count; ++i) {
    std::swap(index[static_cast<std::size_t>(i)],
              index[static_cast<std::size_t>(random.integer(i, columns - 1))]);
  }
  index.resize(static_cast<std::size_t>(count));
  return index;
}

/// Arrays begin `offset` elements behind an aligned address.
template <class T>
void compare(index_t tokens, index_t columns, index_t count, index_t offset,
             random_source& random) {
  const auto index = random_index(columns, count, random);
  std::vector<std::int32_t> stored_index(static_cast<std::size_t>(offset), -1);
  stored_index.insert(stored_index.end(), index.begin(), index.end());
  const auto device_index = to_device(stored_index);
  const qeft::span<const std::int32_t> on_device{device_index.data() + offset, count};
  std::vector<T> x(static_cast<std::size_t>(offset + tokens * columns));
  for (T& v : x) v = static_cast<T>(random.bits());
  const auto device_x = to_device(x);

  std::vector<T> gathered(static_cast<std::size_t>(offset + tokens * count));
  std::vector<T> scattered(x.size());
  for (index_t t = 0; t < tokens; ++t) {
    for (index_t i = 0; i < count; ++i) {
      const index_t column = index[static_cast<std::size_t>(i)];
      const T value = x[static_cast<std::size_t>(offset + t * columns + column)];
      gathered[static_cast<std::size_t>(offset + t * count + i)] = value;
      scattered[static_cast<std::size_t>(offset + t * columns + column)] = value;
    }
  }

  device_array<T> out(static_cast<index_t>(gathered.size()));
  const qeft::status g = gather(on_stream{}, device_x.data() + offset, tokens, columns, on_device,
                                out.data() + offset);
  device_array<T> back(static_cast<index_t>(scattered.size()));
  const qeft::status s =
      scatter(on_stream{}, out.data() + offset, tokens, columns, on_device, back.data() + offset);
  if (!g.ok() || !s.ok()) fail("gather, scatter: " + g.message() + s.message());
  check(cudaDeviceSynchronize(), "gather");
  const std::string what = std::to_string(tokens) + " x " + std::to_string(count) + " of " +
                           std::to_string(columns) + " columns from " + std::to_string(offset);
  if (to_host(out) != gathered) fail("gather of " + what);
  if (to_host(back) != scattered) fail("scatter of " + what);
}

void check_capture() {
  const auto index = to_device(std::vector<std::int32_t>{2, 0, 1});
  const auto x = to_device(std::vector<float>{10, 11, 12, 20, 21, 22});
  device_array<float> y(6), z(6);
  const qeft::span<const std::int32_t> all{index.data(), 3};
  in_graph([&](cudaStream_t s) {
    const qeft::status first = gather(on_stream{s}, x.data(), 2, 3, all, y.data());
    return first.ok() ? scatter(on_stream{s}, y.data(), 2, 3, all, z.data()) : first;
  });
  check(to_host(y) == std::vector<float>{12, 10, 11, 22, 20, 21}, "gather in a graph");
  check(to_host(z) == to_host(x), "scatter in a graph");
}

void check_refusals() {
  device_array<float> x(64), out(64);
  device_array<std::int32_t> index(16);
  const float* no_x = nullptr;
  const auto refused = [&](const float* from, index_t tokens, index_t columns,
                           const std::int32_t* places, index_t count, const char* word) {
    const qeft::span<const std::int32_t> list{places, count};
    check_refused(gather(on_stream{}, from, tokens, columns, list, out.data()),
                  errc::invalid_argument, word);
    check_refused(scatter(on_stream{}, from, tokens, columns, list, out.data()),
                  errc::invalid_argument, word);
  };
  refused(x.data(), -1, 16, index.data(), 16, "tokens is -1");
  refused(x.data(), 4, -16, index.data(), 16, "columns -16");
  refused(x.data(), 4, index_t{1} << 31, index.data(), 16, "columns 2147483648");
  refused(x.data(), 4, 0, index.data(), 16, "columns is 0");
  refused(no_x, 4, 16, index.data(), 16, "x is null");
  refused(x.data(), 4, 16, nullptr, 16, "index is null");
  const qeft::span<const std::int32_t> all{index.data(), 16};
  check_refused(gather(on_stream{}, x.data(), 4, 16, all, static_cast<float*>(nullptr)),
                errc::invalid_argument, "out is null");
  const qeft::span<const std::int32_t> nothing;
  check(gather(on_stream{}, no_x, 4, 16, nothing, out.data()).ok(), "no columns");
  check(scatter(on_stream{}, no_x, 0, 16, all, out.data()).ok(), "no tokens");
  check(supports_gather(on_stream{}, x.data(), 4, 16, all, out.data()).ok(), "supports_gather");
  check(supports_scatter(on_stream{}, x.data(), 4, 16, all, out.data()).ok(), "supports_scatter");
}

}  // namespace

int main(int argc, char** argv) {
  if (!has_device()) return 77;
  check_capture();
  check_refusals();
  const int count = argc > 1 ? std::atoi(argv[1]) : 1000;
  const auto seed = static_cast<std::uint64_t>(argc > 2 ? std::atoi(argv[2]) : 1);
  for (int i = 0; i < count; ++i) {
    random_source random(seed + static_cast<std::uint64_t>(i));
    const index_t tokens = random.integer(0, 20);
    const index_t columns = random.chance(50) ? 8 * random.integer(1, 60) : random.integer(1, 500);
    const index_t chosen = random.chance(50) ? columns : random.integer(0, columns);
    const index_t offset = random.chance(60) ? 0 : random.integer(1, 9);
    if (random.chance(50)) {
      compare<std::uint16_t>(tokens, columns, chosen, offset, random);
    } else {
      compare<std::uint32_t>(tokens, columns, chosen, offset, random);
    }
  }
  random_source random(seed);
  compare<std::uint16_t>(300000, 3, 3, 0, random);  // more tokens than blocks
  std::printf("%d random sizes, %d failures\n", count, failures);
  return failures == 0 && count > 0 ? 0 : 1;
}
