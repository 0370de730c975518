// SPDX-License-Identifier: Apache-2.0
// Adapters of small quantised models, merged and taken away again: the rows and columns of the
// original model are found by what stands in them, not by the permutations.
#include "merge.hpp"

#include <sys/resource.h>
#include <sys/wait.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <map>

#include "llama.hpp"
#include "qeft/io/checkpoint.hpp"
#include "quantize.hpp"
#include "reference_model.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/throws.hpp"
#include "unit/io/temporary_directory.hpp"

namespace {

namespace fs = std::filesystem;
namespace io = qeft::io;
using namespace qeft_llm;
using namespace qeft_test;
using nlohmann::json;
using qeft::errc;
using qeft::index_t;
using qeft::io::dtype;

const json llama = json::object();
const json qwen2 = {{"model_type", "qwen2"}, {"tie_word_embeddings", false}};  // has biases

/// The weak columns of all linears: (OC, k), rows and columns as a checkpoint stores them.
using weak_values = std::map<std::string, std::vector<float>>;

std::vector<std::string> linears_of(const model_config& config) {
  std::vector<std::string> names;
  for (index_t l = 0; l < config.num_hidden_layers; ++l) {
    for (const linear_kind kind : all_linears) names.push_back(linear_name(l, kind));
  }
  return names;
}

/// All files below a directory, by path.
std::map<std::string, std::string> contents(const fs::path& directory) {
  std::map<std::string, std::string> files;
  for (const auto& entry : fs::recursive_directory_iterator(directory)) {
    if (entry.is_regular_file()) {
      files[entry.path().lexically_relative(directory).string()] = read_all(entry.path());
    }
  }
  return files;
}

/// A full-precision model and a text, and what is made of them.
struct workplace {
  temporary_directory dir;
  reference_model model;

  explicit workplace(const json& config = llama)
      : model(write_small_model(dir / "model", config, 1)) {
    std::string letters;
    for (const int id : random_tokens(model.config, 4000, 3)) {
      letters += static_cast<char>('a' + id % 26);
    }
    write_all(dir / "text", letters);
  }

  /// RTN leaves the weak columns as they are, so that rows can be told by them.
  quantize_options rtn(const std::string& from = "model") const {
    quantize_options o;
    o.model = (dir / from).string();
    o.calibration = (dir / "text").string();
    o.layer.group_size = 32;
    o.layer.method = qeft::solver::layer_method::rtn;
    o.weak_columns = 8;
    o.samples = 6;
    o.seq_len = 64;
    o.order = column_order::sensitivity;
    o.threads = 2;
    return o;
  }
  void quantize(quantize_options o, const std::string& to) const {
    o.out = (dir / to).string();
    REQUIRE(run_quantize(o) == 0);
  }

  /// Random changes of a checkpoint's weak columns.
  weak_values tune(const std::string& checkpoint, std::uint64_t seed) const {
    random_source random(seed);
    weak_values tuned = weak_of(checkpoint);
    for (auto& [name, values] : tuned) {
      for (float& x : values) {
        if (random.chance(20)) continue;
        x = random.chance(2) ? -0.0F : x + static_cast<float>(0.05 * random.real());
      }
    }
    return tuned;
  }
  weak_values weak_of(const std::string& checkpoint) const {
    const io::safetensors_reader reader(dir / checkpoint);
    weak_values all;
    for (const std::string& name : linears_of(model.config)) {
      all[name] = io::to_floats(reader.at(name + ".weak"));
    }
    return all;
  }
  std::vector<std::int32_t> columns_of(const std::string& checkpoint,
                                       const std::string& linear) const {
    const io::safetensors_reader reader(dir / checkpoint);
    const std::string name = linear + ".weak_index";
    return io::read_i32(reader, name, reader.at(name).shape[0]);
  }

  void write_adapter(const std::string& base, const weak_values& tuned, const std::string& to) {
    const model_source source(dir / base);
    io::write_adapter(dir / to, make_adapter(source, [&](const std::string& linear) {
                        const auto found = tuned.find(linear);
                        return found == tuned.end() ? nullptr : found->second.data();
                      }));
  }
  merge_options merge(const std::string& onto, const std::vector<std::string>& adapters,
                      const std::vector<double>& weights = {}) const {
    merge_options o;
    o.model = (dir / onto).string();
    o.out = (dir / "out").string();
    for (const std::string& a : adapters) o.adapters.push_back((dir / a).string());
    o.weights = weights;
    return o;
  }
  void unmerge(const std::string& merged, const std::string& to) const {
    REQUIRE(run_unmerge({(dir / merged).string(), (dir / to).string()}) == 0);
  }

  /// The row of the model that a row of weak columns, quantised by RTN, was made of.
  static std::size_t original_row(const std::vector<double>& weight, std::size_t in_channels,
                                  const std::vector<std::int32_t>& columns, const float* weak) {
    std::size_t found = weight.size();
    for (std::size_t row = 0; row < weight.size() / in_channels; ++row) {
      bool equal = true;
      for (std::size_t j = 0; j < columns.size(); ++j) {
        equal = equal && weight[row * in_channels + static_cast<std::size_t>(columns[j])] ==
                             static_cast<double>(weak[j]);
      }
      if (!equal) continue;
      REQUIRE(found == weight.size());  // rows of random numbers differ
      found = row;
    }
    REQUIRE(found < weight.size());
    return found;
  }

  /// Adds factor * (tuned - checkpoint) to the dense weights of `to`, in double.
  /// @param of the model that the checkpoint was made of by RTN
  void add_dense(const std::string& checkpoint, const reference_model& of, const weak_values& tuned,
                 double factor, tensor_map& to) const {
    const weak_values initial = weak_of(checkpoint);
    for (const auto& [name, values] : tuned) {
      const std::vector<std::int32_t> columns = columns_of(checkpoint, name);
      const std::vector<double>& weight = of.tensors.at(name + ".weight");
      const std::vector<float>& before = initial.at(name);
      const std::size_t k = columns.size();
      const std::size_t rows = values.size() / k;
      const std::size_t in_channels = weight.size() / rows;
      for (std::size_t n = 0; n < rows; ++n) {
        const std::size_t row = original_row(weight, in_channels, columns, &before[n * k]);
        for (std::size_t j = 0; j < k; ++j) {
          const double rounded =
              static_cast<double>(to_float(qeft::from_float<qeft::half_bits>(values[n * k + j])));
          to.at(name + ".weight")[row * in_channels + static_cast<std::size_t>(columns[j])] +=
              factor * (rounded - static_cast<double>(before[n * k + j]));
        }
      }
    }
  }
};

/// The tuned checkpoint, written without any code of merging.
void write_tuned(const fs::path& base, const fs::path& to, const weak_values& tuned) {
  fs::copy(base, to, fs::copy_options::recursive);
  const io::safetensors_file file(base / "model.safetensors");
  auto metadata = file.metadata();
  metadata.erase(io::checksum_key);
  io::safetensors_writer writer(metadata);
  for (const auto& [name, t] : file.tensors()) {
    const bool is_weak = name.size() > 5 && name.substr(name.size() - 5) == ".weak";
    const auto values = tuned.find(name.substr(0, name.size() - (is_weak ? 5 : 0)));
    if (is_weak && values != tuned.end()) {
      writer.add(name, t.type, t.shape, io::to_bytes(t.type, values->second, name));
    } else {
      writer.add(name, t.type, t.shape, t.data);
    }
  }
  writer.write(to / "model.safetensors");
}

/// Every element of a full-precision model is the nearest of its type to `expected`.
/// @param epsilon half the distance of neighbours, relative
void check_dense(const fs::path& directory, const reference_model& model,
                 const tensor_map& expected, dtype type, double epsilon) {
  const io::safetensors_reader reader(directory);
  for (const tensor_spec& spec : expected_tensors(model.config)) {
    INFO(spec.name);
    const std::vector<float> found = io::to_floats(reader.at(spec.name, type, spec.shape));
    const std::vector<double>& wanted = expected.at(spec.name);
    REQUIRE(found.size() == wanted.size());
    double worst = 0;
    for (std::size_t i = 0; i < found.size(); ++i) {
      const double error = std::abs(static_cast<double>(found[i]) - wanted[i]);
      worst = std::max(worst, error / (std::abs(wanted[i]) * epsilon + 0x1p-25));
    }
    CHECK(worst <= 1);
  }
}

std::vector<float> logits_of(const fs::path& directory, const std::vector<int>& tokens) {
  const model_source source(directory);
  llama_model model(qeft::on_host(2), source);
  const auto rows = static_cast<index_t>(tokens.size());
  model.reset(rows);
  const std::vector<float>& normed = model.forward(tokens);
  std::vector<float> logits(tokens.size() * static_cast<std::size_t>(model.config().vocab_size));
  model.logits(normed.data(), rows, logits.data());
  return logits;
}

struct placement {
  const char* name;
  json config;
  bool reorder;
  qeft::weak_kind o_proj;
};
const std::vector<placement> placements = {
    {"indexed o_proj", llama, true, qeft::weak_kind::indexed},
    {"o_proj per head", llama, true, qeft::weak_kind::per_head},
    {"with biases", qwen2, true, qeft::weak_kind::per_head},
    {"not reordered", llama, false, qeft::weak_kind::indexed},
};

quantize_options options_of(const workplace& w, const placement& p) {
  quantize_options o = w.rtn();
  o.reorder = p.reorder;
  o.o_proj_placement = p.o_proj;
  if (!p.reorder) o.order = column_order::natural;
  return o;
}

}  // namespace

TEST_CASE("an adapter makes the tuned model of its base, and of the full-precision model") {
  for (const placement& p : placements) {
    INFO(p.name);
    workplace w(p.config);
    w.quantize(options_of(w, p), "base");
    const weak_values tuned = w.tune("base", 5);
    w.write_adapter("base", tuned, "adapter");

    write_tuned(w.dir / "base", w.dir / "tuned", tuned);
    REQUIRE(run_merge(w.merge("base", {"adapter"})) == 0);
    CHECK(read_all(w.dir / "out/model.safetensors") == read_all(w.dir / "tuned/model.safetensors"));
    CHECK(read_all(w.dir / "out/tokenizer.json") == read_all(w.dir / "base/tokenizer.json"));
    const std::vector<int> tokens = random_tokens(w.model.config, 40, 7);
    CHECK(logits_of(w.dir / "out", tokens) == logits_of(w.dir / "tuned", tokens));
    w.unmerge("out", "undone");
    CHECK(contents(w.dir / "undone") == contents(w.dir / "base"));
    fs::remove_all(w.dir / "out");

    // RTN kept the initial columns, so that the sums are 16-bit numbers.
    reference_model dense = w.model;
    w.add_dense("base", w.model, tuned, 1, dense.tensors);
    REQUIRE(run_merge(w.merge("model", {"adapter"})) == 0);
    check_dense(w.dir / "out", dense, dense.tensors, dtype::f16, 0);
    CHECK(worst_error(logits_of(w.dir / "out", tokens), dense.logits(tokens),
                      w.model.config.vocab_size) < 2e-5);
    CHECK(worst_error(logits_of(w.dir / "out", tokens), w.model.logits(tokens),
                      w.model.config.vocab_size) > 1e-3);
    w.unmerge("out", "undone model");
    CHECK(contents(w.dir / "undone model") == contents(w.dir / "model"));
  }
}

TEST_CASE("the best quantiser's models are merged and restored bit for bit as well") {
  workplace w;
  quantize_options o = w.rtn();
  o.layer.method = qeft::solver::layer_method::optq;
  o.asymmetric = {0.5, 0.5};
  o.layer.refine_rounds = 1;
  o.o_proj_placement = qeft::weak_kind::per_head;
  w.quantize(o, "base");
  const weak_values tuned = w.tune("base", 5);
  w.write_adapter("base", tuned, "adapter");
  write_tuned(w.dir / "base", w.dir / "tuned", tuned);
  REQUIRE(run_merge(w.merge("base", {"adapter"})) == 0);
  CHECK(read_all(w.dir / "out/model.safetensors") == read_all(w.dir / "tuned/model.safetensors"));
  w.unmerge("out", "undone");
  CHECK(contents(w.dir / "undone") == contents(w.dir / "base"));
}

TEST_CASE("several adapters with weights are one sum in double, rounded once") {
  workplace w;
  w.quantize(w.rtn(), "base");
  const weak_values first = w.tune("base", 5);
  weak_values second = w.tune("base", 6);
  second.erase("model.layers.0.mlp.up_proj");  // not tuned there
  w.write_adapter("base", first, "first");
  w.write_adapter("base", second, "second");
  CHECK(io::read_adapter(w.dir / "second").linears.size() == 13);

  // Another full-precision model, where sums are no 16-bit numbers.
  const reference_model other = write_small_model(w.dir / "other", llama, 2);
  for (const dtype type : {dtype::f16, dtype::f32}) {
    write_tensors(w.dir / "other", other, type);
    tensor_map expected = other.tensors;
    w.add_dense("base", w.model, first, 0.3, expected);
    w.add_dense("base", w.model, second, -0.7, expected);
    merge_options o = w.merge("other", {"first", "second"}, {0.3, -0.7});
    o.other_base = true;
    REQUIRE(run_merge(o) == 0);
    check_dense(w.dir / "out", other, expected, type, type == dtype::f16 ? 0x1p-11 : 0x1p-23);
    w.unmerge("out", "undone");
    CHECK(contents(w.dir / "undone") == contents(w.dir / "other"));
    fs::remove_all(w.dir / "out");
    fs::remove_all(w.dir / "undone");
  }

  REQUIRE(run_merge(w.merge("base", {"first", "second"}, {0.3, -0.7})) == 0);
  const weak_values initial = w.weak_of("base");
  const weak_values merged = w.weak_of("out");
  double worst = 0;
  for (const auto& entry : merged) {
    const std::string& name = entry.first;
    for (std::size_t i = 0; i < entry.second.size(); ++i) {
      const auto delta = [&](const weak_values& tuned) {
        const auto found = tuned.find(name);
        if (found == tuned.end()) return 0.0;
        return static_cast<double>(to_float(qeft::from_float<qeft::half_bits>(found->second[i]))) -
               static_cast<double>(initial.at(name)[i]);
      };
      const double sum =
          static_cast<double>(initial.at(name)[i]) + 0.3 * delta(first) - 0.7 * delta(second);
      worst = std::max(worst, std::abs(static_cast<double>(entry.second[i]) - sum) /
                                  (std::abs(sum) * 0x1p-11 + 0x1p-25));
    }
  }
  CHECK(worst <= 1);
  CHECK(worst > 0.9);
  w.unmerge("out", "undone");
  CHECK(contents(w.dir / "undone") == contents(w.dir / "base"));
}

TEST_CASE("an adapter fits another model that was quantised with the same columns") {
  workplace w;
  w.quantize(w.rtn(), "base");
  const reference_model other = write_small_model(w.dir / "other", llama, 2);
  quantize_options o = w.rtn("other");
  o.weak_columns_from = (w.dir / "base").string();
  w.quantize(o, "target");
  const weak_values tuned = w.tune("base", 5);
  w.write_adapter("base", tuned, "adapter");
  merge_options m = w.merge("target", {"adapter"});
  CHECK(throws_with(errc::invalid_argument, {"adapter was made of ", "--other-base"},
                    [&] { run_merge(m); }));
  CHECK_FALSE(fs::exists(m.out));
  m.other_base = true;
  REQUIRE(run_merge(m) == 0);

  // Its rows are in another order: they are told by the other model's weights.
  tensor_map expected = other.tensors;
  w.add_dense("base", w.model, tuned, 1, expected);
  const weak_values before = w.weak_of("target");
  double worst = 0;
  bool moved = false;
  for (const auto& [name, values] : w.weak_of("out")) {
    const std::vector<std::int32_t> columns = w.columns_of("target", name);
    const std::size_t k = columns.size();
    const std::vector<double>& weight = other.tensors.at(name + ".weight");
    const std::size_t in_channels = weight.size() / (values.size() / k);
    for (std::size_t n = 0; n < values.size() / k; ++n) {
      const std::size_t row =
          workplace::original_row(weight, in_channels, columns, &before.at(name)[n * k]);
      moved = moved || row != n;
      for (std::size_t j = 0; j < k; ++j) {
        const double sum =
            expected.at(name + ".weight")[row * in_channels + static_cast<std::size_t>(columns[j])];
        worst = std::max(worst, std::abs(static_cast<double>(values[n * k + j]) - sum) /
                                    (std::abs(sum) * 0x1p-11 + 0x1p-25));
      }
    }
  }
  CHECK(moved);
  CHECK(worst <= 1);
}

TEST_CASE("a sharded model is merged shard by shard") {
  workplace w;
  w.quantize(w.rtn(), "base");
  const weak_values tuned = w.tune("base", 5);
  w.write_adapter("base", tuned, "adapter");
  fs::copy(w.dir / "model", w.dir / "shards");
  fs::remove(w.dir / "shards/model.safetensors");
  io::safetensors_writer writer;
  for (const tensor_spec& spec : expected_tensors(w.model.config)) {
    add_tensor(writer, spec, w.model.tensors.at(spec.name), dtype::f16);
  }
  writer.write_directory(w.dir / "shards", 60000);
  fs::create_directory(w.dir / "shards/additional_chat_templates");
  write_all(w.dir / "shards/additional_chat_templates/tool.jinja", "{{ messages }}");
  REQUIRE(run_merge(w.merge("shards", {"adapter"})) == 0);
  const auto before = contents(w.dir / "shards");
  auto after = contents(w.dir / "out");
  CHECK(after.at("model.safetensors.index.json") == before.at("model.safetensors.index.json"));
  CHECK(after.at("additional_chat_templates/tool.jinja") == "{{ messages }}");
  CHECK(after.size() == before.size() + 1);
  reference_model dense = w.model;
  w.add_dense("base", w.model, tuned, 1, dense.tensors);
  check_dense(w.dir / "out", dense, dense.tensors, dtype::f16, 0);
  w.unmerge("out", "undone");
  CHECK(contents(w.dir / "undone") == before);
}

TEST_CASE("columns that are not weak in the model are counted, and left out only when asked") {
  workplace w;
  w.quantize(w.rtn(), "base");
  quantize_options fewer = w.rtn();
  fewer.weak_columns = 5;
  w.quantize(fewer, "fewer");
  const weak_values tuned = w.tune("base", 5);
  w.write_adapter("base", tuned, "adapter");
  merge_options o = w.merge("fewer", {"adapter"});
  o.other_base = true;
  CHECK(throws_with(errc::invalid_argument,
                    {"42 of 112 columns are not weak", "model.layers.0.self_attn.q_proj: 3 of 8",
                     "model.layers.1.mlp.down_proj: 3 of 8", "--skip-missing"},
                    [&] { run_merge(o); }));
  CHECK_FALSE(fs::exists(o.out));
  o.skip_missing = true;
  REQUIRE(run_merge(o) == 0);
  reference_model dense = w.model;
  w.add_dense("base", w.model, tuned, 1, dense.tensors);
  const weak_values before = w.weak_of("fewer");
  for (const auto& [name, values] : w.weak_of("out")) {
    const std::vector<std::int32_t> columns = w.columns_of("fewer", name);
    const std::vector<double>& weight = w.model.tensors.at(name + ".weight");
    const std::size_t k = columns.size();
    const std::size_t in_channels = weight.size() / (values.size() / k);
    int wrong = 0;
    for (std::size_t n = 0; n < values.size() / k; ++n) {
      const std::size_t row =
          workplace::original_row(weight, in_channels, columns, &before.at(name)[n * k]);
      for (std::size_t j = 0; j < k; ++j) {
        wrong += static_cast<double>(values[n * k + j]) !=
                 dense.tensors.at(
                     name + ".weight")[row * in_channels + static_cast<std::size_t>(columns[j])];
      }
    }
    CHECK(wrong == 0);
  }
  quantize_options none = w.rtn();
  none.weak_columns = 0;
  none.order = column_order::natural;
  w.quantize(none, "none");
  o = w.merge("none", {"adapter"});
  o.other_base = true;
  o.skip_missing = true;
  o.out = (w.dir / "out2").string();
  CHECK(throws_with(errc::invalid_argument, {"change no column"}, [&] { run_merge(o); }));
}

TEST_CASE("the adapter names the models it was made of") {
  workplace w;
  w.quantize(w.rtn(), "base");
  w.write_adapter("base", w.tune("base", 5), "adapter");
  const io::adapter a = io::read_adapter(w.dir / "adapter");
  CHECK(a.base == io::weights_fingerprint(io::safetensors_reader(w.dir / "base")));
  CHECK(a.full_precision == io::weights_fingerprint(io::safetensors_reader(w.dir / "model")));
  CHECK(a.linears.size() == 14);
  const model_source base(w.dir / "base");
  const auto nothing = [](const std::string&) { return nullptr; };
  CHECK(throws_with(errc::invalid_argument, {"no weak column"},
                    [&] { make_adapter(base, nothing); }));
  const model_source full(w.dir / "model");
  CHECK(throws_with(errc::invalid_argument, {"no weak column"},
                    [&] { make_adapter(full, nothing); }));
}

TEST_CASE("an adapter of another base is an error unless it is asked for") {
  workplace w;
  w.quantize(w.rtn(), "base");
  w.write_adapter("base", w.tune("base", 5), "adapter");
  write_small_model(w.dir / "other", llama, 2);
  const std::string other = io::weights_fingerprint(io::safetensors_reader(w.dir / "other"));
  io::adapter a = io::read_adapter(w.dir / "adapter");
  const merge_options o = w.merge("other", {"adapter"});
  CHECK(throws_with(errc::invalid_argument,
                    {"adapter was made of ", a.full_precision.c_str(), "other is ", other.c_str(),
                     "--other-base"},
                    [&] { run_merge(o); }));
  CHECK_FALSE(fs::exists(o.out));
  // Where it is not known of what, there is nothing to refuse.
  a.full_precision.clear();
  io::write_adapter(w.dir / "unnamed", a);
  CHECK(run_merge(w.merge("other", {"unnamed"})) == 0);
  fs::remove_all(o.out);
  merge_options both = w.merge("other", {"unnamed", "adapter"});
  CHECK(throws_with(errc::invalid_argument, {"adapter was made of "}, [&] { run_merge(both); }));
}

TEST_CASE("a model that was quantised behind a merge names the adapters of both merges") {
  workplace w;
  w.quantize(w.rtn(), "base");
  w.write_adapter("base", w.tune("base", 5), "first");
  REQUIRE(run_merge(w.merge("model", {"first"})) == 0);
  w.quantize(w.rtn("out"), "again");
  fs::remove_all(w.dir / "out");
  w.write_adapter("again", w.tune("again", 6), "second");
  REQUIRE(run_merge(w.merge("again", {"second"}, {0.5})) == 0);
  const json all = json::parse(read_all(w.dir / "out/config.json")).at("qeft_adapters");
  REQUIRE(all.size() == 2);
  CHECK(all[0].at("file") == "first");
  CHECK(all[1].at("file") == "second");
  CHECK(all[1].at("weight") == 0.5);
  w.unmerge("out", "undone");
  CHECK(contents(w.dir / "undone") == contents(w.dir / "again"));
}

TEST_CASE("what does not fit is refused by name, and nothing is left") {
  workplace w;
  w.quantize(w.rtn(), "base");
  w.write_adapter("base", w.tune("base", 5), "adapter");
  const auto refused = [&](const merge_options& o, errc code,
                           std::initializer_list<const char*> fragments) {
    const bool threw = throws_with(code, fragments, [&] { run_merge(o); });
    const auto left = w.dir.files();
    return threw && std::none_of(left.begin(), left.end(),
                                 [](const std::string& name) { return name.rfind("out", 0) == 0; });
  };
  const auto bad = errc::invalid_argument;
  CHECK(refused(w.merge("base", {}), bad, {"--adapter is missing"}));
  CHECK(
      refused(w.merge("base", {"adapter"}, {1, 2}), bad, {"--weight is given 2 times", "1 adap"}));
  CHECK(refused(w.merge("base", {"adapter"}, {NAN}), bad, {"--weight is nan"}));
  CHECK(refused(w.merge("base", {"adapter"}, {1e9}), errc::not_finite,
                {"model.layers.0.self_attn.q_proj, row 0, column ", "must be finite in F16"}));
  CHECK(refused(w.merge("model", {"adapter"}, {1e9}), errc::not_finite,
                {"model.layers.0.self_attn.q_proj, row 0, column ", "must be finite in F16"}));
  CHECK(refused(w.merge("base", {"none"}), errc::io_error, {"none"}));
  CHECK(refused(w.merge("base", {"text"}), errc::corrupt_file, {"text"}));
  CHECK(refused(w.merge("base", {"base"}), errc::io_error, {"is a directory"}));
  CHECK(
      refused(w.merge("base", {"model/model.safetensors"}), errc::corrupt_file, {"is no adapter"}));
  write_small_model(w.dir / "mha", {{"num_key_value_heads", 6}}, 1);
  CHECK(refused(w.merge("mha", {"adapter"}), bad, {"adapter is for llama", "6 heads on 2 of 16"}));

  io::adapter a = io::read_adapter(w.dir / "adapter");
  auto up = a.linears.extract("model.layers.1.mlp.up_proj");
  up.key() = "model.layers.7.mlp.up_proj";
  a.linears.insert(std::move(up));
  io::write_adapter(w.dir / "renamed", a);
  CHECK(refused(w.merge("base", {"renamed"}), bad, {"renamed changes model.layers.7.mlp.up_proj"}));
  a = io::read_adapter(w.dir / "adapter");
  a.linears.at("model.layers.1.mlp.up_proj").in_channels = 97;
  io::write_adapter(w.dir / "wide", a);
  CHECK(refused(w.merge("model", {"wide"}), bad, {"up_proj of 160 x 97"}));

  merge_options o = w.merge("base", {"adapter"});
  o.out = (w.dir / "base").string();
  CHECK(refused(o, errc::io_error, {"must not exist yet"}));

  // A disk that fills up.
  struct rlimit old {};
  ::getrlimit(RLIMIT_FSIZE, &old);
  struct rlimit small = old;
  small.rlim_cur = 32768;
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  ::setrlimit(RLIMIT_FSIZE, &small);
  const bool full = refused(w.merge("base", {"adapter"}), errc::io_error, {"cannot write"});
  ::setrlimit(RLIMIT_FSIZE, &old);
  std::signal(SIGXFSZ, handler);
  CHECK(full);

  REQUIRE(run_merge(w.merge("base", {"adapter"})) == 0);
  o = w.merge("out", {"adapter"});
  o.out = (w.dir / "again").string();
  CHECK(throws_with(bad, {"is merged already", "unmerge"}, [&] { run_merge(o); }));
}

TEST_CASE("unmerge gives the base or an error") {
  workplace w;
  w.quantize(w.rtn(), "base");
  w.write_adapter("base", w.tune("base", 5), "adapter");
  REQUIRE(run_merge(w.merge("base", {"adapter"})) == 0);
  const auto refused = [&](const std::string& model, errc code,
                           std::initializer_list<const char*> fragments) {
    const unmerge_options o = {(w.dir / model).string(), (w.dir / "undone").string()};
    return throws_with(code, fragments, [&] { run_unmerge(o); }) && !fs::exists(o.out);
  };
  CHECK(refused("base", errc::invalid_argument, {"before_merge.qeft", "did not write it"}));
  CHECK(refused("none", errc::invalid_argument, {"before_merge.qeft"}));

  const auto damaged = [&](const std::string& file, std::size_t from_end) {
    fs::remove_all(w.dir / "damaged");
    fs::copy(w.dir / "out", w.dir / "damaged");
    std::string bytes = read_all(w.dir / "damaged" / file);
    bytes[bytes.size() - from_end] ^= 1;
    write_all(w.dir / "damaged" / file, bytes);
  };
  damaged("before_merge.qeft", 1);
  CHECK(refused("damaged", errc::corrupt_file, {"before_merge.qeft", "is damaged"}));
  damaged("model.safetensors", 1);
  CHECK(refused("damaged", errc::corrupt_file, {"it changed since it was merged"}));

  // Columns that are not there, of tensors that are not there.
  const io::safetensors_file kept(w.dir / "out/before_merge.qeft");
  const std::string base = kept.metadata().at("base");
  const auto rewritten = [&](const std::string& changed, const std::string& name, dtype type,
                             const std::vector<index_t>& shape) {
    io::safetensors_writer writer(std::map<std::string, std::string>{
        {"format", "qeft.before_merge"}, {"format_version", "1"}, {"base", base}});
    for (const auto& [tensor, t] : kept.tensors()) {
      if (tensor != changed) {
        writer.add(tensor, t.type, t.shape, t.data);
      } else {
        writer.add(name, type, shape,
                   std::vector<std::byte>(static_cast<std::size_t>(*io::byte_size(type, shape)),
                                          std::byte{0x7f}));
      }
    }
    writer.write(w.dir / "damaged/before_merge.qeft");
  };
  const std::string up = "model.layers.1.mlp.up_proj.weak";
  for (const dtype type : {dtype::bf16, dtype::f32}) {
    rewritten(up + ".before", up + ".before", type, {160, 8});
    CHECK(refused("damaged", errc::corrupt_file, {up.c_str(), "columns of a F16 [160, 8]"}));
  }
  for (const std::vector<index_t>& shape : std::vector<std::vector<index_t>>{{}, {8}, {161, 8}}) {
    rewritten(up + ".before", up + ".before", dtype::f16, shape);
    CHECK(refused("damaged", errc::corrupt_file, {up.c_str(), "columns of a F16 [160, 8]"}));
  }
  rewritten(up + ".before", up + ".before", dtype::f16, {160, 9});
  CHECK(refused("damaged", errc::corrupt_file, {"up_proj.weak.columns", "but must be I32 [9]"}));
  rewritten(up + ".before", "other.before", dtype::f16, {160, 8});
  CHECK(refused("damaged", errc::corrupt_file, {"'other' is missing"}));
  rewritten(up + ".columns", up + ".columns", dtype::i32, {8});
  CHECK(refused("damaged", errc::corrupt_file, {"up_proj.weak.columns", "holds 2139062143"}));
  // The weights are restored, and then there is no config.json to go with them.
  fs::remove_all(w.dir / "damaged");
  fs::copy(w.dir / "out", w.dir / "damaged");
  rewritten("config.json", "config", dtype::u8, {8});
  CHECK(refused("damaged", errc::corrupt_file, {"before_merge.qeft", "'config.json' is missing"}));
}

namespace {

struct outcome {
  int status;
  std::string text;
};

/// Runs `qeft-llm ARGUMENTS` in a shell.
outcome run(const std::string& arguments) {
  const std::string command = "exec 2>&1 </dev/null; '" QEFT_LLM "' " + arguments;
  std::FILE* pipe = ::popen(command.c_str(), "r");
  REQUIRE(pipe != nullptr);
  outcome result{-1, {}};
  char buffer[4096];
  while (const std::size_t n = std::fread(buffer, 1, sizeof buffer, pipe)) {
    result.text.append(buffer, n);
  }
  const int status = ::pclose(pipe);
  if (WIFEXITED(status)) result.status = WEXITSTATUS(status);
  return result;
}

}  // namespace

TEST_CASE("the commands say what they did") {
  workplace w;
  w.quantize(w.rtn(), "base");
  quantize_options fewer = w.rtn();
  fewer.weak_columns = 5;
  w.quantize(fewer, "fewer");
  w.write_adapter("base", w.tune("base", 5), "first");
  w.write_adapter("base", w.tune("base", 6), "second");
  const auto at = [&](const std::string& name) { return "'" + (w.dir / name).string() + "'"; };
  const std::string two =
      " --adapter " + at("first") + " --weight 0.5 --adapter " + at("second") + " --weight -0.25 ";

  const outcome merged = run("merge --json --model " + at("base") + two + " --out " + at("out"));
  INFO(merged.text);
  REQUIRE(merged.status == 0);  // nothing on stderr
  const json said = json::parse(merged.text);
  CHECK(said.at("fingerprint") == io::weights_fingerprint(io::safetensors_reader(w.dir / "out")));
  CHECK(said.at("columns") == 2 * 14 * 8);
  CHECK(said.at("missing") == 0);
  CHECK(said.at("same_base") == true);
  CHECK(said.at("layers").size() == 14);
  const std::string base = io::read_adapter(w.dir / "first").base;
  const json adapters = {{{"file", "first"}, {"weight", 0.5}, {"base", base}},
                         {{"file", "second"}, {"weight", -0.25}, {"base", base}}};
  CHECK(said.at("adapters") == adapters);
  CHECK(json::parse(read_all(w.dir / "out/config.json")).at("qeft_adapters") == adapters);
  CHECK(json::parse(run("inspect --json " + at("out")).text).at("adapters") == adapters);
  CHECK(mentions(run("inspect " + at("out")).text,
                 {"merged adapter: ", "\"first\"", "\"weight\":-0.25"}));
  CHECK(json::parse(run("inspect --json " + at("base")).text).at("adapters").empty());
  CHECK(run("unmerge --model " + at("out") + " --out " + at("undone")).text.empty());
  CHECK(contents(w.dir / "undone") == contents(w.dir / "base"));

  const std::string common = "merge --adapter " + at("first") + " --model ";
  const outcome refused = run(common + at("fewer") + " --out " + at("out2"));
  CHECK(refused.status == 1);
  CHECK(mentions(refused.text, {"was made of", base.c_str(), "--other-base"}));
  const std::string onto_fewer = common + at("fewer") + " --other-base --out " + at("out2");
  const outcome missing = run(onto_fewer);
  CHECK(missing.status == 1);
  CHECK(mentions(missing.text, {"was made of", "42 of 112 columns are not weak"}));
  const outcome skipped = run(onto_fewer + " --skip-missing --json");
  CHECK(skipped.status == 0);
  CHECK(mentions(skipped.text, {base.c_str(), "it is added all the same", "left out: 42 of 112",
                                "model.layers.1.self_attn.o_proj: 3 of 8", "\"same_base\":false"}));
  CHECK(run(common + at("model") + " --out " + at("out3")).text.empty());
  CHECK(run("merge --model " + at("base") + " --out " + at("out4")).status != 0);
}
