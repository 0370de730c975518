// SPDX-License-Identifier: Apache-2.0
// Adapters: deltas that give tuned columns back bit for bit, exact round trips through files, and
// nothing in a file is trusted.
#include "qeft/io/adapter.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <map>

#include "support/cases.hpp"
#include "support/catch.hpp"
#include "support/sweep.hpp"
#include "support/throws.hpp"
#include "unit/io/temporary_directory.hpp"

using namespace qeft;
using namespace qeft::io;
using namespace qeft_test;

namespace {

double number(dtype type, std::uint16_t bits) {
  return static_cast<double>(type == dtype::f16 ? to_float(half_bits{bits})
                                                : to_float(bf16_bits{bits}));
}

/// The nearest 16-bit number, the even one of two: the slow definition. Infinity stands where the
/// next number would be.
std::uint16_t nearest(dtype type, double x) {
  const unsigned infinity = type == dtype::f16 ? 0x7c00 : 0x7f80;
  const double beyond = type == dtype::f16 ? 0x1p16 : 0x1p128;
  const auto distance = [&](unsigned bits) {
    const double value = bits == infinity ? beyond : number(type, static_cast<std::uint16_t>(bits));
    return std::abs(std::abs(x) - value);
  };
  unsigned best = 0;
  for (unsigned bits = 1; bits <= infinity; ++bits) {
    const double closer = distance(bits) - distance(best);
    if (closer < 0 || (closer == 0 && bits % 2 == 0)) best = bits;
  }
  return static_cast<std::uint16_t>(best | (std::signbit(x) ? 0x8000U : 0U));
}

std::uint16_t stored(dtype type, double x) {
  std::uint16_t bits = 0;
  store_number(type, x, reinterpret_cast<std::byte*>(&bits), 0);
  return bits;
}

std::uint16_t finite_bits(random_source& random, dtype type) {
  for (;;) {
    const auto bits = static_cast<std::uint16_t>(random.bits());
    if (std::isfinite(number(type, bits))) return bits;
  }
}

/// A layer with k weak columns among random ones, and values for them after tuning.
struct tuned_layer {
  stored_linear base;
  std::vector<std::uint16_t> tuned;
  permutation rows;

  explicit tuned_layer(std::uint64_t seed, scalar_kind scalar = scalar_kind::half) {
    random_source random(seed);
    matrix_descriptor d;
    d.out_channels = random.integer(1, 40);
    d.in_channels = random.integer(20, 90);
    d.group_size = 32;
    d.scalar = scalar;
    d.weak = weak_kind::tail;
    d.weak_columns = random.integer(1, 16);
    base.matrix = quantized_matrix<layout::row_packed>(d);
    base.weak_index = shuffled(random, d.in_channels);
    base.weak_index.resize(static_cast<std::size_t>(d.weak_columns));
    std::sort(base.weak_index.begin(), base.weak_index.end());
    rows = permutation(shuffled(random, d.out_channels));
    const dtype type = dtype_of(scalar);
    for (index_t n = 0; n < d.out_channels; ++n) {
      for (index_t j = 0; j < d.weak_columns; ++j) {
        const double initial = random.chance(5) ? -0.0 : random.real();
        base.matrix.write_weak(n, j, stored(type, initial));
        const double change = random.chance(10) ? 0.0 : 0.01 * random.real();
        // Floats lead to a negative zero from near it alone, in BF16 from zero.
        const double near = type == dtype::f16 ? 0.49 : 0;
        const bool is_zero = random.chance(5) && std::abs(initial) <= near;
        tuned.push_back(stored(type, is_zero ? -0.0 : initial + change));
      }
    }
  }
  static std::vector<std::int32_t> shuffled(random_source& random, index_t n) {
    std::vector<std::int32_t> all = permutation::identity(n).source();
    for (std::size_t i = all.size(); i > 1; --i) std::swap(all[i - 1], all[random.bits() % i]);
    return all;
  }
  adapter_linear change() const { return make_adapter_linear("l", base, as_bytes(tuned), &rows); }
};

adapter some_adapter() {
  adapter a{"0123456789abcdef", "fedcba9876543210", "llama: 2 layers", {}};
  for (std::uint64_t l = 0; l < 3; ++l) {
    a.linears["model.layers." + std::to_string(l) + ".mlp.up_proj"] = tuned_layer(l).change();
  }
  return a;
}

bool same(const adapter& a, const adapter& b) {
  const auto equal = [](const auto& x, const auto& y) {
    const adapter_linear& l = x.second;
    const adapter_linear& r = y.second;
    return x.first == y.first && l.out_channels == r.out_channels &&
           l.in_channels == r.in_channels && l.columns == r.columns &&
           l.delta.size() == r.delta.size() &&
           std::memcmp(l.delta.data(), r.delta.data(), 8 * l.delta.size()) == 0;
  };
  return a.base == b.base && a.full_precision == b.full_precision &&
         a.architecture == b.architecture &&
         std::equal(a.linears.begin(), a.linears.end(), b.linears.begin(), b.linears.end(), equal);
}

using tensor_list = std::map<std::string, tensor_view>;
using metadata = std::map<std::string, std::string>;

/// Writes an adapter, lets `change` alter what is in the file, and reads it.
caught read_changed(const std::function<void(tensor_list&, metadata&)>& change) {
  temporary_directory dir;
  write_adapter(dir / "a", some_adapter());
  const safetensors_file file(dir / "a");
  tensor_list tensors(file.tensors().begin(), file.tensors().end());
  metadata entries = file.metadata();
  entries.erase(checksum_key);
  change(tensors, entries);
  safetensors_writer writer(entries);
  for (const auto& [name, t] : tensors) writer.add(name, t.type, t.shape, t.data);
  writer.write(dir / "b");
  return catch_error([&] { read_adapter(dir / "b"); });
}

}  // namespace

TEST_CASE("numbers are rounded once, to nearest even", "[io]") {
  random_source random(1);
  for (const dtype type : {dtype::f16, dtype::bf16}) {
    std::vector<double> values = {0.0,   -0.0,   1.0,   65504,   65519.999999,
                                  65520, -1e9,   1e-9,  0x1p-25, 0x1.8p-25,
                                  3e38,  3.4e38, 1e300, -1e300,  1e-300};
    for (int i = 0; i < 60; ++i) {
      // Half-way between two neighbours, and so close to that place that a float cannot tell.
      const auto bits = static_cast<std::uint16_t>(random.bits() % 0x7b00);
      const double tie =
          (number(type, bits) + number(type, static_cast<std::uint16_t>(bits + 1))) / 2;
      for (const double x : {tie, tie * (1 + 0x1p-40), tie * (1 - 0x1p-40)}) {
        values.push_back(random.chance(50) ? x : -x);
      }
      values.push_back(std::ldexp(random.real(), static_cast<int>(random.integer(-30, 18))));
    }
    for (const double x : values) {
      INFO(to_string(type) << " " << x);
      CHECK(stored(type, x) == nearest(type, x));
    }
    CHECK(std::isnan(number(type, stored(type, NAN))));
  }
  std::byte bytes[16];
  store_number(dtype::f32, 0.1, bytes, 1);
  CHECK(number_at(dtype::f32, bytes, 1) == static_cast<double>(0.1F));
  store_number(dtype::f64, 0.1, bytes, 1);
  CHECK(number_at(dtype::f64, bytes, 1) == 0.1);
}

TEST_CASE("a delta leads from any number to any near it, bit for bit", "[io]") {
  fuzz("deltas", 300, [](std::uint64_t seed) {
    random_source random(seed);
    const dtype type = random.pick({dtype::f16, dtype::bf16});
    const auto delta = [&](std::uint16_t from, std::uint16_t to) {
      return qeft::io::detail::find_delta(type, reinterpret_cast<const std::byte*>(&from),
                                          reinterpret_cast<const std::byte*>(&to));
    };
    const auto leads = [&](std::uint16_t from, std::uint16_t to) {
      const auto d = delta(from, to);
      return d && stored(type, number(type, from) + *d) == to;
    };
    const std::uint16_t from = finite_bits(random, type);
    REQUIRE(*delta(from, from) == 0);
    for (int i = 0; i < 100; ++i) {
      const std::uint16_t a = stored(type, random.real());
      const std::uint16_t b = stored(type, random.real() * (random.chance(20) ? 1e-6 : 1));
      REQUIRE(leads(a, b));
      REQUIRE(leads(a, a));
    }
    for (const std::uint16_t zero : std::vector<std::uint16_t>{0x0000, 0x8000}) {
      REQUIRE(leads(zero, 0x0000));
      REQUIRE(leads(zero, 0x8000));
      REQUIRE(leads(zero, from));
      REQUIRE(leads(from, 0x0000));
      if (type == dtype::f16) REQUIRE(leads(from, 0x8000));
    }
  });
}

TEST_CASE("base + delta is the tuned layer, in the rows of the original model", "[io]") {
  fuzz("layers", 200, [](std::uint64_t seed) {
    const scalar_kind scalar = seed % 2 == 0 ? scalar_kind::half : scalar_kind::bf16;
    tuned_layer layer(seed, scalar);
    const matrix_descriptor& d = layer.base.matrix.descriptor();
    const adapter_linear change = layer.change();
    REQUIRE(change.out_channels == d.out_channels);
    REQUIRE(change.in_channels == d.in_channels);
    REQUIRE(change.columns == layer.base.weak_index);
    for (index_t n = 0; n < d.out_channels; ++n) {
      for (index_t j = 0; j < d.weak_columns; ++j) {
        const double sum = number(dtype_of(scalar), layer.base.matrix.read_weak(n, j)) +
                           change.at(layer.rows[n], j);
        REQUIRE(stored(dtype_of(scalar), sum) ==
                layer.tuned[static_cast<std::size_t>(n * d.weak_columns + j)]);
      }
    }
    layer.rows = permutation::identity(d.out_channels);
    REQUIRE(make_adapter_linear("l", layer.base, as_bytes(layer.tuned), nullptr).delta ==
            layer.change().delta);
  });
}

TEST_CASE("what no delta can say is refused by linear, row and column", "[io]") {
  tuned_layer layer(3, scalar_kind::bf16);
  const index_t k = layer.base.matrix.descriptor().weak_columns;
  const auto refused = [&](errc code, std::initializer_list<const char*> fragments) {
    return throws_with(code, fragments, [&] { layer.change(); });
  };
  const std::vector<std::uint16_t> good = layer.tuned;
  layer.tuned.back() = 0x7f80;
  CHECK(refused(errc::not_finite, {"l: tuned holds a NaN or infinity", "flat index"}));
  layer.tuned = good;
  const std::string row = "row " + std::to_string(layer.rows[0]);
  const std::string column = "column " + std::to_string(layer.base.weak_index.back());
  layer.base.matrix.write_weak(0, k - 1, stored(dtype::bf16, 0x1p100));
  layer.tuned[static_cast<std::size_t>(k - 1)] = stored(dtype::bf16, 0x1p-100);
  CHECK(refused(errc::unsupported, {"l, ", row.c_str(), column.c_str(), "7.88861e-31", "1.26765"}));
  layer.tuned = good;
  layer.tuned.pop_back();
  CHECK(refused(errc::invalid_argument, {"l: tuned has"}));
  layer.tuned = good;
  layer.rows = permutation::identity(layer.rows.size() + 1);
  CHECK(refused(errc::invalid_argument, {"l: tuned has"}));
}

TEST_CASE("adapters come back from their file byte for byte", "[io]") {
  temporary_directory dir;
  const adapter a = some_adapter();
  write_adapter(dir / "a", a);
  CHECK(same(read_adapter(dir / "a"), a));
  write_adapter(dir / "b", read_adapter(dir / "a"));
  CHECK(read_all(dir / "a") == read_all(dir / "b"));
  const safetensors_reader reader(dir / "a");
  CHECK(reader.verify_checksum());
  const auto& [name, linear] = *a.linears.begin();
  const auto k = static_cast<index_t>(linear.columns.size());
  CHECK_NOTHROW(reader.at(name + ".delta", dtype::f32, {linear.out_channels, k}));
  CHECK_NOTHROW(reader.at(name + ".columns", dtype::i32, {k}));
  CHECK(reader.names().size() == 6);

  // From 2 to 3 units of 2^-24: a float cannot say it.
  tuned_layer layer(4);
  layer.base.matrix.write_weak(0, 0, stored(dtype::f16, 2.0));
  layer.tuned[0] = 3;
  adapter fine = a;
  fine.linears["l"] = layer.change();
  CHECK(fine.linears["l"].at(layer.rows[0], 0) == 3 * 0x1p-24 - 2);
  write_adapter(dir / "a", fine);
  CHECK(same(read_adapter(dir / "a"), fine));
  CHECK(safetensors_reader(dir / "a").at("l.delta").type == dtype::f64);
  CHECK(safetensors_reader(dir / "a").at(name + ".delta").type == dtype::f32);

  adapter unknown = a;
  unknown.full_precision.clear();
  write_adapter(dir / "a", unknown);
  CHECK(same(read_adapter(dir / "a"), unknown));
}

TEST_CASE("write_adapter refuses what breaks a rule, and keeps the old file", "[io]") {
  temporary_directory dir;
  write_adapter(dir / "a", some_adapter());
  const std::string good = read_all(dir / "a");
  const auto refused = [&](const std::function<void(adapter_linear&)>& change,
                           std::initializer_list<const char*> fragments) {
    adapter a = some_adapter();
    change(a.linears.at("model.layers.1.mlp.up_proj"));
    const bool threw =
        throws_with(errc::invalid_argument, fragments, [&] { write_adapter(dir / "a", a); });
    return threw && read_all(dir / "a") == good && dir.files().size() == 1;
  };
  const char* name = "write_adapter: model.layers.1.mlp.up_proj: ";
  CHECK(refused([](adapter_linear& l) { l.delta.pop_back(); }, {name, "delta has"}));
  CHECK(refused([](adapter_linear& l) { l.delta[0] = NAN; }, {name, "flat index 0"}));
  CHECK(refused([](adapter_linear& l) { l.columns[0] = -1; }, {name, "columns: ", "holds -1"}));
  CHECK(refused([](adapter_linear& l) { l.in_channels = 3; }, {name, "columns: "}));
  CHECK(refused([](adapter_linear& l) { l.out_channels = 0; }, {name, "its shape is 0 x"}));
}

TEST_CASE("read_adapter trusts nothing", "[io]") {
  REQUIRE(read_changed([](tensor_list&, metadata&) {}).code == errc::ok);
  const std::string name = "model.layers.1.mlp.up_proj";
  const auto refused = [](errc code, std::initializer_list<const char*> fragments,
                          const std::function<void(tensor_list&, metadata&)>& change) {
    const caught e = read_changed(change);
    if (e.code != code) std::printf("unexpected error code for: %s\n", e.message.c_str());
    return e.code == code && mentions(e.message, fragments);
  };
  for (const std::string& part : {name + ".delta", name + ".columns"}) {
    CHECK(refused(errc::corrupt_file, {part.c_str(), "is missing"},
                  [&](tensor_list& t, metadata&) { t.erase(part); }));
    CHECK(refused(errc::corrupt_file, {part.c_str(), "but must be"},
                  [&](tensor_list& t, metadata&) { t[part].shape.push_back(1); }));
    CHECK(refused(errc::corrupt_file, {part.c_str(), "but must be"},
                  [&](tensor_list& t, metadata&) { t[part].type = dtype::u32; }));
    CHECK(
        refused(errc::corrupt_file, {name.c_str(), "but must be"}, [&](tensor_list& t, metadata&) {
          t[part].data = {};
          t[part].shape = {0};
        }));
  }
  CHECK(refused(errc::corrupt_file, {"'more' is of no linear"},
                [&](tensor_list& t, metadata&) { t["more"] = t[name + ".columns"]; }));

  for (const char* key : {"base", "full_precision", "architecture", "shapes", "format_version"}) {
    CHECK(refused(errc::corrupt_file, {key, "is missing"},
                  [&](tensor_list&, metadata& m) { m.erase(key); }));
  }
  const auto with = [](const char* key, const std::string& value) {
    return [key, value](tensor_list&, metadata& m) { m[key] = value; };
  };
  CHECK(refused(errc::corrupt_file, {"is no adapter"}, with("format", "pt")));
  CHECK(refused(errc::unsupported, {"format_version is \"2\"", "reads 1"},
                with("format_version", "2")));
  CHECK(refused(errc::corrupt_file, {"shapes", "must be an object"}, with("shapes", "[]")));
  CHECK(refused(errc::corrupt_file, {"shapes", "not valid JSON"}, with("shapes", "{")));
  for (const char* shape : {"3", "[]", "[3]", "[3,-4]", "[3,4.5]", "[0,4]", "[3,4,5]", "{}",
                            "[3,1073741825]", "[3,18446744073709551615]", "[3,1e9]"}) {
    CHECK(refused(errc::corrupt_file, {"'x' is ", "[OC, IC]"},
                  with("shapes", std::string(R"({"x":)") + shape + "}")));
  }
  CHECK(refused(errc::corrupt_file, {"'x.columns' is missing"},
                with("shapes", R"({"x":[1073741824,1073741824]})")));
  CHECK(refused(errc::corrupt_file, {"is of no linear"}, with("shapes", "{}")));
}

TEST_CASE("read_adapter refuses NaN and columns that are not there", "[io]") {
  const std::string name = "model.layers.1.mlp.up_proj";
  std::vector<float> delta;
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    const caught e = read_changed([&](tensor_list& t, metadata&) {
      tensor_view& v = t.at(name + ".delta");
      delta = to_floats(v);
      delta[1] = bad;
      v.data = as_bytes(delta);
    });
    CHECK(e.code == errc::corrupt_file);
    CHECK(mentions(e.message, {"up_proj': delta holds", "flat index 1"}));
  }
  std::vector<std::int32_t> columns;
  for (const std::int32_t bad : {-1, 90, std::numeric_limits<std::int32_t>::max()}) {
    const caught e = read_changed([&](tensor_list& t, metadata&) {
      tensor_view& v = t.at(name + ".columns");
      columns.assign(static_cast<std::size_t>(v.shape[0]), bad);
      v.data = as_bytes(columns);
    });
    CHECK(e.code == errc::corrupt_file);
    CHECK(mentions(e.message, {"linear 'model.layers.1.mlp.up_proj': columns: "}));
  }
}

TEST_CASE("a cut or changed adapter is an error, or the same adapter", "[io]") {
  temporary_directory dir;
  const adapter a = some_adapter();
  write_adapter(dir / "a", a);
  const std::string good = read_all(dir / "a");
  std::uint64_t header = 0;
  std::memcpy(&header, good.data(), 8);
  sweep counted("lengths");
  for (std::size_t n = 0; n < good.size(); n += n < 8 + header ? 1 : 37) {
    write_all(dir / "b", good.substr(0, n));
    INFO(n << " of " << good.size() << " bytes");
    REQUIRE(catch_error([&] { read_adapter(dir / "b"); }).code == errc::corrupt_file);
    counted.ran();
  }
  fuzz("mutations", 2000, [&](std::uint64_t seed) {
    random_source random(seed);
    std::string bytes = good;
    const std::size_t range = seed % 4 == 0 ? bytes.size() : 8 + header;
    const std::size_t at = random.bits() % range;
    bytes[at] = static_cast<char>(random.bits());
    write_all(dir / "b", bytes);
    INFO("byte " << at);
    const caught e = catch_error([&] {
      const adapter back = read_adapter(dir / "b");
      // Metadata have no checksum: fingerprints, the architecture and IC may read differently.
      for (const auto& [name, linear] : back.linears) {
        REQUIRE(linear.columns == a.linears.at(name).columns);
        REQUIRE(linear.delta == a.linears.at(name).delta);
      }
      REQUIRE(back.linears.size() == a.linears.size());
    });
    REQUIRE((e.code == errc::ok || e.code == errc::corrupt_file || e.code == errc::unsupported));
  });
  CHECK(catch_error([&] { read_adapter(dir.path()); }).code == errc::io_error);
  CHECK(catch_error([&] { read_adapter(dir / "none"); }).code == errc::io_error);
  const std::string other = R"({"__metadata__":{"format":"qeft.adapter","format_version":"1"}})";
  write_all(dir / "b", safetensors_bytes(other, ""));
  CHECK(mentions(catch_error([&] { read_adapter(dir / "b"); }).message, {"has no checksum"}));
}

TEST_CASE("a fingerprint is of the weights, not of their files", "[io]") {
  temporary_directory dir;
  std::vector<float> x = {1, 2, 3, 4};
  const std::vector<float> y = {5, 6};
  int made = 0;
  const auto fingerprint = [&](const std::string& first, std::vector<index_t> shape,
                               index_t shard_bytes, bool reversed, const metadata& entries) {
    safetensors_writer writer(entries);
    const auto add = [&](bool is_first) {
      if (is_first) {
        writer.add(first, dtype::f32, shape, as_bytes(x));
      } else {
        writer.add("y", dtype::f32, {2}, as_bytes(y));
      }
    };
    add(!reversed);
    add(reversed);
    const auto directory = dir / std::to_string(made++);
    std::filesystem::create_directory(directory);
    writer.write_directory(directory, shard_bytes);
    return weights_fingerprint(safetensors_reader(directory));
  };
  const std::string whole = fingerprint("x", {2, 2}, 1000, false, {});
  CHECK(whole.size() == 16);
  CHECK(fingerprint("x", {2, 2}, 16, false, {}) == whole);
  CHECK(fingerprint("x", {2, 2}, 16, true, {{"by", "another"}}) == whole);
  CHECK(fingerprint("z", {2, 2}, 1000, false, {}) != whole);
  CHECK(fingerprint("x", {4}, 1000, false, {}) != whole);
  x[3] = 4.0000005F;
  CHECK(fingerprint("x", {2, 2}, 1000, false, {}) != whole);
}
