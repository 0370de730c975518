// SPDX-License-Identifier: Apache-2.0
// Quantising whole models, and Offline Global Reordering of them.
#include "llama.hpp"

#include <algorithm>
#include <cmath>
#include <random>

#include "llama_graph.hpp"
#include "quantize.hpp"
#include "reference_model.hpp"
#include "support/catch.hpp"
#include "unit/io/temporary_directory.hpp"

namespace {

namespace fs = std::filesystem;
using namespace qeft_llm;
using namespace qeft_test;
using nlohmann::json;
using qeft::index_t;
using qeft::permutation;
using qeft::io::dtype;

const json llama = json::object();
const json qwen2 = {{"model_type", "qwen2"}, {"tie_word_embeddings", false}};  // has biases

/// Writes the model, as F32, with the other files of `from`.
void write_changed(const fs::path& from, const fs::path& to, const reference_model& model) {
  fs::copy(from, to);
  write_tensors(to, model, dtype::f32);
}

std::vector<int> tokens_of(const model_config& config, std::size_t count) {
  return random_tokens(config, count, 5);
}

/// Logits of tokens_of(config, count).
std::vector<float> run(const fs::path& directory, std::size_t count) {
  const model_source source(directory);
  llama_model model(qeft::on_host(2), source);
  const auto rows = static_cast<index_t>(count);
  model.reset(rows);
  const std::vector<float>& normed = model.forward(tokens_of(model.config(), count));
  std::vector<float> logits(count * static_cast<std::size_t>(model.config().vocab_size));
  model.logits(normed.data(), rows, logits.data());
  return logits;
}

/// ||actual - expected|| / ||expected|| over all tokens.
template <class T>
double error(const std::vector<float>& actual, const std::vector<T>& expected) {
  return worst_error(actual, expected, static_cast<index_t>(expected.size()));
}

permutation random_permutation(index_t n, index_t heads, std::mt19937& rng) {
  auto source = permutation::identity(n).source();
  const auto dim = static_cast<std::ptrdiff_t>(n / heads);
  for (std::ptrdiff_t h = 0; h < heads; ++h) {
    std::shuffle(source.begin() + h * dim, source.begin() + (h + 1) * dim, rng);
  }
  return permutation(source);
}

/// Permutes every channel space of a model at random, as Offline Global Reordering may.
void shuffle_channels(reference_model& model) {
  std::mt19937 rng(11);
  const model_config& config = model.config;
  const llama_graph g = describe(config);
  qeft::reorder_plan plan(g.graph);
  plan.set(g.stream, random_permutation(config.hidden_size, 1, rng));
  for (std::size_t l = 0; l < g.mlp.size(); ++l) {
    plan.set(g.mlp[l], random_permutation(config.intermediate_size, 1, rng));
    plan.set(g.value[l], random_permutation(config.num_key_value_heads * config.head_dim,
                                            config.num_key_value_heads, rng));
  }
  for (const tensor_spec& t : expected_tensors(config)) {
    const qeft::span<double> tensor(model.tensors.at(t.name));
    const std::string name = t.name.substr(0, t.name.rfind(".weight"));
    const index_t rows = t.shape.size() == 2 ? t.shape[0] : 1;
    if (const auto* p = plan.rows(name)) qeft::permute_rows(*p, tensor, t.shape[1]);
    if (const auto* p = plan.columns(name)) qeft::permute_columns(*p, tensor, rows);
  }
}

quantize_options tiny_quantization(const fs::path& model, const fs::path& out,
                                   const fs::path& text) {
  std::mt19937 rng(3);
  std::string letters(4000, ' ');
  for (char& c : letters) c = static_cast<char>('a' + rng() % 26);
  write_all(text, letters);
  quantize_options o;
  o.model = model.string();
  o.out = out.string();
  o.calibration = text.string();
  o.layer.group_size = 32;
  o.weak_columns = 8;
  o.samples = 6;
  o.seq_len = 64;
  o.threads = 2;
  return o;
}

}  // namespace

TEST_CASE("permuting the channel spaces of a model keeps its function") {
  for (const json& config : {llama, qwen2}) {
    const temporary_directory dir;
    reference_model model = write_small_model(dir / "model", config, 2);
    const std::vector<float> before = run(dir / "model", 40);
    CHECK(error(before, model.logits(tokens_of(model.config, 40))) < 2e-6);
    const tensor_map original = model.tensors;
    shuffle_channels(model);
    CHECK(model.tensors != original);
    write_changed(dir / "model", dir / "moved", model);
    CHECK(error(run(dir / "moved", 40), before) < 1e-5);
  }
}

TEST_CASE("a reordered quantised model computes what the one in original order computes") {
  for (const auto placement : {qeft::weak_kind::indexed, qeft::weak_kind::per_head}) {
    for (const json& config : {llama, qwen2}) {
      const temporary_directory dir;
      write_small_model(dir / "model", config, 4);
      auto o = tiny_quantization(dir / "model", dir / "reordered", dir / "text");
      o.o_proj_placement = placement;
      REQUIRE(run_quantize(o) == 0);
      const auto reordered = read_config(dir / "reordered").quantization.value();
      const auto kind = [&](const char* name) {
        return reordered.layers.at(std::string("model.layers.1.") + name).weak;
      };
      CHECK(kind("self_attn.q_proj") == qeft::weak_kind::tail);
      CHECK(kind("mlp.down_proj") == qeft::weak_kind::tail);
      CHECK(kind("self_attn.o_proj") == placement);

      // The same weak columns, left where they are.
      o.weak_columns_from = o.out;
      o.out = (dir / "original").string();
      o.o_proj_placement = qeft::weak_kind::indexed;
      o.reorder = false;
      REQUIRE(run_quantize(o) == 0);
      const auto a = run(dir / "reordered", 60);
      CHECK(error(a, run(dir / "original", 60)) < 1e-5);
      // And it is close to the full-precision model, but not the same.
      const auto full = run(dir / "model", 60);
      CHECK(error(a, full) < 0.5);
      CHECK(error(a, full) > 1e-4);
    }
  }
}

TEST_CASE("every option of quantisation gives a model that runs") {
  const temporary_directory dir;
  write_small_model(dir / "model", llama, 1);
  const auto base = tiny_quantization(dir / "model", {}, dir / "text");
  const auto full = run(dir / "model", 30);
  int count = 0;
  const auto check = [&](quantize_options o, double tolerance) {
    o.out = (dir / std::to_string(count++)).string();
    REQUIRE(run_quantize(o) == 0);
    CHECK(error(run(o.out, 30), full) < tolerance);
  };
  auto o = base;
  o.layer.method = qeft::solver::layer_method::rtn;
  o.weak_columns = 0;
  o.calibration.clear();
  check(o, 0.9);
  o = base;
  o.layer.bits = 8;
  o.layer.zero = qeft::zero_kind::symmetric;
  check(o, 0.05);
  o = base;
  o.layer.bits = 3;
  o.layer.zero = qeft::zero_kind::scaled;
  check(o, 0.9);
  o = base;
  o.layer.act_order = true;
  check(o, 0.5);
  o = base;
  o.selection = qeft::selection_metric::hessian_perturbation;
  o.layer.group_size = qeft::per_channel;
  o.reorder = false;
  check(o, 0.9);
  o = base;
  o.selection = qeft::selection_metric::gradient;
  o.accumulation = qeft::accumulation::all_columns;
  check(o, 0.5);
}
