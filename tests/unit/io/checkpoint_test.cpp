// SPDX-License-Identifier: Apache-2.0
// Quantised layers, permutations and quantization_config in files: exact round trips, and nothing
// in a file is trusted.
#include "qeft/io/checkpoint.hpp"

#include <cstring>
#include <functional>
#include <map>

#include "support/cases.hpp"
#include "support/catch.hpp"
#include "support/sweep.hpp"
#include "unit/io/temporary_directory.hpp"

using namespace qeft;
using namespace qeft::io;
using namespace qeft_test;
using matrix = quantized_matrix<layout::row_packed>;

namespace {

matrix_descriptor small_descriptor() {
  matrix_descriptor d;
  d.out_channels = 3;
  d.in_channels = 70;
  d.bits = 3;
  d.group_size = 32;
  d.weak = weak_kind::tail;
  d.weak_columns = 4;
  return d;
}

const std::vector<std::int32_t> small_index = {0, 5, 6, 69};

struct small_layer {
  matrix m;
  explicit small_layer(const matrix_descriptor& d = small_descriptor()) {
    random_source random(3);
    m = pack<layout::row_packed>(random_layer(d, random));
  }
};

/// Writes tensors, lets `change` alter what would be added, and reads the layer "l" back.
using tensor_list = std::map<std::string, tensor_view>;
caught read_changed(const std::function<void(tensor_list&)>& change,
                    const matrix_descriptor& written = small_descriptor(),
                    const matrix_descriptor& expected = small_descriptor()) {
  temporary_directory dir;
  const small_layer layer(written);
  std::vector<std::int32_t> index = small_index;
  if (written.weak == weak_kind::indexed)
    index.assign(layer.m.weak_index().begin(), layer.m.weak_index().end());
  index.resize(static_cast<std::size_t>(written.weak_columns));
  {
    safetensors_writer writer;
    add_linear(writer, "l", layer.m, index);
    writer.write(dir / "a");
  }
  const safetensors_file file(dir / "a");
  tensor_list tensors(file.tensors().begin(), file.tensors().end());
  change(tensors);
  safetensors_writer writer;
  for (const auto& [name, t] : tensors) writer.add(name, t.type, t.shape, t.data);
  writer.write(dir / "b");
  return catch_error([&] { read_linear(safetensors_reader(dir / "b"), "l", expected); });
}

}  // namespace

TEST_CASE("random layers come back byte for byte, and nothing is stored twice", "[io]") {
  temporary_directory dir;
  fuzz("stored layers", 300, [&](std::uint64_t seed) {
    random_source random(seed);
    const plain_layer layer = random_case(random, 2000);
    INFO(describe(layer.d));
    const auto m = pack<layout::row_packed>(layer);
    safetensors_writer writer;
    add_linear(writer, "model.layers.0.mlp.up_proj", m, layer.weak_columns);
    const storage_bytes s = storage_of(layer.d);
    REQUIRE(writer.data_bytes() ==
            s.codes + s.scales + s.zeros + s.weak + 4 * layer.d.weak_columns);
    writer.write(dir / "model.safetensors");
    const stored_linear back =
        read_linear(safetensors_reader(dir.path()), "model.layers.0.mlp.up_proj", layer.d);
    REQUIRE(same_bytes(back.matrix, m));
    REQUIRE(back.weak_index == layer.weak_columns);
  });
}

TEST_CASE("the tensors of a layer have the documented types and shapes", "[io]") {
  temporary_directory dir;
  const small_layer layer;
  safetensors_writer writer;
  add_linear(writer, "l", layer.m, small_index);
  writer.write(dir / "a");
  const safetensors_reader reader(dir / "a");
  CHECK(reader.names() ==
        std::vector<std::string>{"l.codes", "l.scales", "l.weak", "l.weak_index", "l.zeros"});
  // 66 dense columns of 3 bits: 5 words of the 2-bit plane, 3 of the 1-bit plane; 3 groups a row.
  CHECK_NOTHROW(reader.at("l.codes", dtype::u8, {3, 32}));
  CHECK_NOTHROW(reader.at("l.scales", dtype::f16, {3, 3}));
  CHECK_NOTHROW(reader.at("l.zeros", dtype::u8, {8}));
  CHECK_NOTHROW(reader.at("l.weak", dtype::f16, {3, 4}));
  CHECK_NOTHROW(reader.at("l.weak_index", dtype::i32, {4}));
  // The tail is where the columns sit; the index says where they came from.
  const stored_linear back = read_linear(reader, "l", small_descriptor());
  CHECK(back.weak_index == small_index);
  CHECK(back.matrix.weak_index().empty());
  CHECK(back.matrix.descriptor().weak == weak_kind::tail);
}

TEST_CASE("add_linear refuses a wrong weak index", "[io]") {
  const small_layer layer;
  const auto refused = [](const matrix& m, const std::vector<std::int32_t>& index) {
    safetensors_writer writer;
    return catch_error([&] { add_linear(writer, "l", m, index); });
  };
  CHECK_THAT(refused(layer.m, {1, 2, 3}).message,
             contains("l: weak_index has 3 entries, but must have 4"));
  CHECK_THAT(refused(layer.m, {1, 2, 2, 3}).message, contains("holds 2 after 2"));
  CHECK_THAT(refused(layer.m, {-1, 2, 3, 4}).message, contains("holds -1"));
  CHECK_THAT(refused(layer.m, {1, 2, 3, 70}).message, contains("holds 70"));
  matrix_descriptor d = small_descriptor();
  d.weak = weak_kind::indexed;
  const matrix indexed(d, std::vector<std::int32_t>{1, 2, 3, 4});
  CHECK(refused(indexed, {1, 2, 3, 4}).code == errc::ok);
  CHECK_THAT(refused(indexed, {1, 2, 3, 5}).message, contains("must be that of the matrix"));
}

TEST_CASE("read_linear checks every tensor of the file", "[io]") {
  REQUIRE(read_changed([](tensor_list&) {}).code == errc::ok);
  for (const char* part : {"l.codes", "l.scales", "l.zeros", "l.weak", "l.weak_index"}) {
    INFO(part);
    const std::string quoted = std::string("'") + part + "'";
    const caught missing = read_changed([&](tensor_list& t) { t.erase(part); });
    CHECK(missing.code == errc::corrupt_file);
    CHECK_THAT(missing.message, contains(quoted + " is missing"));
    const caught shape = read_changed([&](tensor_list& t) { t[part].shape.push_back(1); });
    CHECK(shape.code == errc::corrupt_file);
    CHECK_THAT(shape.message, contains(quoted + " is "));
    const caught type = read_changed([&](tensor_list& t) {
      dtype& d = t[part].type;
      d = d == dtype::u8 ? dtype::i8 : d == dtype::f16 ? dtype::bf16 : dtype::f32;
    });
    CHECK(type.code == errc::corrupt_file);
    CHECK_THAT(type.message, contains("but must be"));
  }
  const auto without = [](weak_kind weak, index_t k, zero_kind zero) {
    matrix_descriptor d = small_descriptor();
    d.weak = weak;
    d.weak_columns = k;
    d.zero = zero;
    return d;
  };
  // A part that the descriptor has no place for means that the two do not belong together.
  const auto symmetric = without(weak_kind::tail, 4, zero_kind::symmetric);
  CHECK_THAT(read_changed([](tensor_list&) {}, small_descriptor(), symmetric).message,
             contains("'l.zeros' exists, but its layer needs none"));
  const auto plain = without(weak_kind::none, 0, zero_kind::integer);
  CHECK_THAT(read_changed([](tensor_list&) {}, small_descriptor(), plain).message,
             contains("'l.weak_index' exists"));
  matrix_descriptor wider = small_descriptor();
  wider.in_channels = 71;
  wider.out_channels = 1 << 30;  // must not be allocated first
  CHECK(read_changed([](tensor_list&) {}, small_descriptor(), wider).code == errc::corrupt_file);
  matrix_descriptor five = small_descriptor();
  five.bits = 5;
  CHECK_THAT(read_changed([](tensor_list&) {}, small_descriptor(), five).message,
             contains("bits is 5"));
}

TEST_CASE("read_linear refuses NaN, infinity and a wrong index", "[io]") {
  std::vector<std::byte> bytes;
  const auto poison = [&](const char* part, std::size_t at, std::uint16_t value) {
    return [&bytes, part, at, value](tensor_list& t) {
      tensor_view& v = t.at(part);
      bytes.assign(v.data.begin(), v.data.end());
      std::memcpy(bytes.data() + 2 * at, &value, 2);
      v.data = bytes;
    };
  };
  for (const std::uint16_t bad : std::vector<std::uint16_t>{0x7e00, 0x7c00, 0xfc00, 0x7c01}) {
    for (const char* part : {"l.scales", "l.weak"}) {
      const caught e = read_changed(poison(part, 7, bad));
      CHECK(e.code == errc::not_finite);
      CHECK_THAT(e.message, contains(std::string("'") + part + "'"));
      CHECK_THAT(e.message, contains("flat index 7"));
    }
  }
  matrix_descriptor bf16 = small_descriptor();
  bf16.scalar = scalar_kind::bf16;
  bf16.zero = zero_kind::scaled;
  CHECK(read_changed(poison("l.zeros", 8, 0x7c00), bf16, bf16).code == errc::ok);
  CHECK(read_changed(poison("l.zeros", 8, 0x7f80), bf16, bf16).code == errc::not_finite);
  CHECK(read_changed(poison("l.scales", 3, 0x7b00), bf16, bf16).code == errc::ok);  // 2^119
  CHECK_THAT(read_changed(poison("l.scales", 3, 0x7b01), bf16, bf16).message,
             contains("scale 3 is"));

  for (const std::vector<std::int32_t>& index :
       {std::vector<std::int32_t>{5, 0, 6, 69}, {0, 5, 5, 69}, {-1, 5, 6, 69}, {0, 5, 6, 70}}) {
    for (const weak_kind kind : {weak_kind::tail, weak_kind::indexed}) {
      matrix_descriptor d = small_descriptor();
      d.weak = kind;
      const caught e =
          read_changed([&](tensor_list& t) { t.at("l.weak_index").data = as_bytes(index); }, d, d);
      CHECK(e.code == errc::corrupt_file);
      CHECK_THAT(e.message, contains("'l': weak_index holds"));
    }
  }
}

TEST_CASE("a checkpoint cut short is refused at every length", "[io]") {
  temporary_directory dir;
  const small_layer layer;
  safetensors_writer writer;
  add_linear(writer, "l", layer.m, small_index);
  writer.write(dir / "a");
  const std::string good = read_all(dir / "a");
  sweep counted("lengths");
  for (std::size_t n = 0; n < good.size(); ++n) {
    INFO(n << " of " << good.size() << " bytes");
    write_all(dir / "b", good.substr(0, n));
    const caught e =
        catch_error([&] { read_linear(safetensors_reader(dir / "b"), "l", small_descriptor()); });
    REQUIRE(e.code == errc::corrupt_file);
    counted.ran();
  }
}

TEST_CASE("a changed byte anywhere is an error, or changes nothing that is read", "[io]") {
  temporary_directory dir;
  const small_layer layer;
  safetensors_writer writer;
  add_linear(writer, "l", layer.m, small_index);
  writer.write(dir / "a");
  const std::string good = read_all(dir / "a");
  std::uint64_t header = 0;
  std::memcpy(&header, good.data(), 8);
  fuzz("mutations", 2000, [&](std::uint64_t seed) {
    random_source random(seed);
    std::string bytes = good;
    const std::size_t range = seed % 4 == 0 ? bytes.size() : 8 + header;
    const std::size_t at = random.bits() % range;
    bytes[at] = static_cast<char>(random.bits());
    write_all(dir / "b", bytes);
    INFO("byte " << at);
    const caught e = catch_error([&] {
      const safetensors_reader reader(dir / "b");
      const bool checked = reader.verify_checksum();
      const stored_linear back = read_linear(reader, "l", small_descriptor());
      // Without the key "qeft.checksum" the header alone has changed.
      REQUIRE((checked || at < 8 + header));
      REQUIRE(same_bytes(back.matrix, layer.m));
      REQUIRE(back.weak_index == small_index);
    });
    REQUIRE((e.code == errc::ok || e.code == errc::corrupt_file));
  });
}

TEST_CASE("permutations are stored and checked", "[io]") {
  temporary_directory dir;
  const permutation p(std::vector<std::int32_t>{2, 0, 1, 3});
  safetensors_writer writer;
  add_permutation(writer, "stream", p);
  add_i32(writer, "qeft.permutation.bad", {0, 1, 1, 3});
  writer.write(dir / "a");
  const safetensors_reader reader(dir / "a");
  CHECK(read_permutation(reader, "stream", 4) == p);
  CHECK(read_permutation(reader, "absent", 3).is_identity());
  CHECK(read_permutation(reader, "absent", 3).size() == 3);
  CHECK(catch_error([&] { read_permutation(reader, "stream", 5); }).code == errc::corrupt_file);
  const caught e = catch_error([&] { read_permutation(reader, "bad", 4); });
  CHECK(e.code == errc::corrupt_file);
  CHECK_THAT(e.message, contains("'qeft.permutation.bad'"));
  CHECK_THAT(e.message, contains("which occurs twice"));
}

namespace {

quantization_config some_config() {
  quantization_config q;
  q.defaults.weak = weak_kind::tail;
  q.defaults.weak_columns = 16;
  matrix_descriptor d = q.defaults;
  d.out_channels = 192;
  d.in_channels = 576;
  q.layers["model.layers.0.self_attn.k_proj"] = d;
  d.weak = weak_kind::per_head;
  d.weak_columns = 18;
  d.heads = 9;
  q.layers["model.layers.0.self_attn.o_proj"] = d;
  d = {};
  d.out_channels = 5;
  d.in_channels = 7;
  d.bits = 2;
  d.group_size = per_channel;
  d.zero = zero_kind::symmetric;
  d.scalar = scalar_kind::bf16;
  q.layers["other"] = d;
  q.provenance = {{"method", "optq"}, {"seed", 7}};
  return q;
}

}  // namespace

TEST_CASE("quantization_config comes back from its JSON", "[io]") {
  const quantization_config q = some_config();
  const nlohmann::json j = to_json(q);
  CHECK(j.at("quant_method") == "qeft");
  CHECK(j.at("format_version") == checkpoint_format_version);
  CHECK(j.at("bits") == 4);
  CHECK(j.at("weak") == "tail");
  // Layers that follow the default hold their shape alone.
  CHECK(j.at("layers").at("model.layers.0.self_attn.k_proj") ==
        nlohmann::json({{"out_channels", 192}, {"in_channels", 576}}));
  const auto back =
      quantization_config_from_json(parse_json(j.dump(), "config.json"), "config.json");
  CHECK(back.layers == q.layers);
  CHECK(back.provenance == q.provenance);
  CHECK(to_json(back) == j);
  CHECK(back.find("other") != nullptr);
  CHECK(back.find("lm_head") == nullptr);
}

TEST_CASE("a broken quantization_config is refused by layer, key and value", "[io]") {
  struct bad_case {
    const char* pointer;
    nlohmann::json value;
    errc code;
    const char* message;
  };
  const char* k_proj = "/layers/model.layers.0.self_attn.k_proj";
  const std::vector<bad_case> cases = {
      {"/quant_method", "gptq", errc::unsupported, "quant_method is \"gptq\""},
      {"/quant_method", 4, errc::corrupt_file, "quant_method is 4, but must be a string"},
      {"/format_version", 2, errc::unsupported, "format_version is 2, but this program reads"},
      {"/format_version", 0, errc::corrupt_file, "format_version is 0"},
      {"/format_version", nullptr, errc::corrupt_file, "format_version is missing"},
      {"/bits", 5, errc::corrupt_file, "bits is 5"},
      {"/bits", 4.5, errc::corrupt_file, "bits is 4.5"},
      {"/group_size", 48, errc::corrupt_file, "group_size is 48"},
      {"/group_size", -2, errc::corrupt_file, "group_size is -2"},
      {"/zero", "float", errc::corrupt_file,
       "zero is \"float\", but must be one of symmetric, integer, scaled"},
      {"/scalar", 16, errc::corrupt_file, "scalar is 16"},
      {"/weak", "head", errc::corrupt_file, "weak is \"head\""},
      {"/weak_columns", -1, errc::corrupt_file, "weak_columns is -1"},
      {"/heads", 0, errc::corrupt_file, "heads is 0"},
      {"/layers", nullptr, errc::corrupt_file, "layers is missing"},
      {"/layers", 3, errc::corrupt_file, "layers: must be an object"},
      {k_proj, 3, errc::corrupt_file, "k_proj: must be an object"},
      {"/layers/other/out_channels", -5, errc::corrupt_file, "other: out_channels is -5"},
      {"/layers/other/out_channels", nullptr, errc::corrupt_file, "out_channels is missing"},
      {"/layers/other/in_channels", 1LL << 40, errc::corrupt_file, "in_channels is 1099511627776"},
      {"/layers/other/weak_columns", 8, errc::corrupt_file, "weak_columns is 8"},
      {"/layers/other/weak_columns", 3, errc::corrupt_file, "0 when weak is none"},
      {"/layers/model.layers.0.self_attn.o_proj/heads", 7, errc::corrupt_file,
       "o_proj: matrix_descriptor: heads is 7"},
  };
  for (const bad_case& c : cases) {
    nlohmann::json j = to_json(some_config());
    j[nlohmann::json::json_pointer(c.pointer)] = c.value;
    INFO(c.pointer << " = " << c.value);
    const caught e = catch_error([&] { quantization_config_from_json(j, "config.json"); });
    CHECK(e.code == c.code);
    CHECK_THAT(e.message, contains(c.message));
    CHECK_THAT(e.message, contains("config.json: quantization_config"));
  }
}

TEST_CASE("mutated JSON of a quantization_config never does worse than an error", "[io]") {
  const std::string good = to_json(some_config()).dump();
  int refused = 0;
  fuzz("mutations of JSON", 2000, [&](std::uint64_t seed) {
    random_source random(seed);
    std::string text = good;
    text[random.bits() % text.size()] = static_cast<char>(random.integer(32, 126));
    const caught e = catch_error([&] {
      const auto q = quantization_config_from_json(parse_json(text, "x"), "x");
      for (const auto& [name, d] : q.layers) REQUIRE(validate(d).ok());
    });
    refused += e.code == errc::ok ? 0 : 1;
    REQUIRE((e.code == errc::ok || e.code == errc::corrupt_file || e.code == errc::unsupported));
  });
  CHECK(refused > 1000);
}

TEST_CASE("a format edited by hand is refused, whatever the sizes", "[io]") {
  temporary_directory dir;
  const small_layer layer;
  safetensors_writer writer;
  add_linear(writer, "l", layer.m, small_index);
  writer.write(dir / "a");
  matrix_descriptor edited = small_descriptor();
  REQUIRE(edited.weak == qeft::weak_kind::tail);
  edited.weak = qeft::weak_kind::indexed;
  const safetensors_reader reader(dir / "a");
  const caught e = catch_error([&] { read_linear(reader, "l", edited); });
  CHECK(e.code == errc::corrupt_file);
  CHECK_THAT(e.message, contains("layer 'l' was written as"));
  CHECK_THAT(e.message, contains("\"weak\":\"indexed\""));
}

TEST_CASE("a matrix that was moved from is refused", "[io]") {
  safetensors_writer writer;
  const matrix empty;
  CHECK(catch_error([&] { add_linear(writer, "l", empty, {}); }).code == errc::invalid_argument);
}

TEST_CASE("read_linear finds the layer in the quantization_config", "[io]") {
  temporary_directory dir;
  const small_layer layer;
  safetensors_writer writer;
  add_linear(writer, "l", layer.m, small_index);
  writer.write(dir / "a");
  const safetensors_reader reader(dir / "a");
  quantization_config q;
  q.layers["l"] = small_descriptor();
  CHECK(same_bytes(read_linear(reader, "l", q).matrix, layer.m));
  CHECK_THAT(catch_error([&] { read_linear(reader, "m", q); }).message,
             contains("lists no layer 'm'"));
}
