// SPDX-License-Identifier: Apache-2.0
// The model runner against a plain forward pass in double, and Offline Global Reordering of models.
#include "llama.hpp"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <random>

#include "hf_model.hpp"
#include "llama_graph.hpp"
#include "quantize.hpp"
#include "support/catch.hpp"
#include "tiny_model.hpp"

namespace {

using namespace qeft_llm;
using namespace qeft_test;
using qeft::index_t;
using qeft::permutation;

std::vector<int> some_tokens(int count) {
  std::mt19937 rng(5);
  std::vector<int> tokens;
  for (int i = 0; i < count; ++i) tokens.push_back(static_cast<int>(rng() % 256));
  return tokens;
}

/// Logits of every position, in calls of `step` tokens.
std::vector<float> run(const std::filesystem::path& directory, const std::vector<int>& tokens,
                       std::size_t step, int threads = 2) {
  const qeft::on_host exec(threads);
  const model_source source(directory);
  llama_model model(exec, source);
  model.reset(static_cast<index_t>(tokens.size()));
  const auto vocabulary = static_cast<std::size_t>(model.config().vocab_size);
  std::vector<float> logits;
  for (std::size_t t = 0; t < tokens.size(); t += step) {
    const std::size_t end = std::min(tokens.size(), t + step);
    const auto& x = model.forward({tokens.begin() + static_cast<std::ptrdiff_t>(t),
                                   tokens.begin() + static_cast<std::ptrdiff_t>(end)});
    logits.resize(end * vocabulary);
    model.logits(x.data(), static_cast<index_t>(end - t), logits.data() + t * vocabulary);
  }
  return logits;
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
void shuffle_channels(const model_config& config, tensor_map& tensors) {
  std::mt19937 rng(11);
  const llama_graph g = describe(config);
  qeft::reorder_plan plan(g.graph);
  plan.set(g.stream, random_permutation(config.hidden_size, 1, rng));
  for (std::size_t l = 0; l < g.mlp.size(); ++l) {
    plan.set(g.mlp[l], random_permutation(config.intermediate_size, 1, rng));
    plan.set(g.value[l], random_permutation(config.num_key_value_heads * config.head_dim,
                                            config.num_key_value_heads, rng));
  }
  for (const tensor_spec& t : expected_tensors(config)) {
    auto& values = tensors.at(t.name);
    const std::string suffix = ".weight";
    const bool is_weight = t.name.size() > suffix.size() &&
                           t.name.compare(t.name.size() - suffix.size(), suffix.size(), suffix) == 0;
    const std::string name =
        is_weight ? t.name.substr(0, t.name.size() - suffix.size()) : t.name;
    const index_t rows = t.shape.size() == 2 ? t.shape[0] : 1;
    if (const auto* p = plan.rows(name)) {
      qeft::permute_rows(*p, qeft::span<float>(values), t.shape[1]);
    }
    if (const auto* p = plan.columns(name)) {
      qeft::permute_columns(*p, qeft::span<float>(values), rows);
    }
  }
}

quantize_options tiny_quantization(const std::filesystem::path& model,
                                   const std::filesystem::path& out,
                                   const std::filesystem::path& text) {
  std::ofstream file(text);
  std::mt19937 rng(3);
  for (int i = 0; i < 4000; ++i) file << static_cast<char>('a' + rng() % 26);
  file.close();
  quantize_options o;
  o.model = model.string();
  o.out = out.string();
  o.calibration = text.string();
  o.group_size = 32;
  o.weak_columns = 8;
  o.samples = 6;
  o.seq_len = 64;
  o.threads = 2;
  return o;
}

}  // namespace

TEST_CASE("the runner equals a plain forward pass in double") {
  for (const bool tied : {true, false}) {
    for (const bool biases : {false, true}) {
      const scratch_directory dir;
      write_tiny_model(dir.path(), {tied, biases, 1});
      const auto tokens = some_tokens(75);
      const auto expected =
          reference_logits(read_config(dir.path()), read_tensors(dir.path()), tokens);
      CHECK(relative_error(run(dir.path(), tokens, tokens.size()), expected) < 2e-6);
      CHECK(relative_error(run(dir.path(), tokens, 1), expected) < 2e-6);
      CHECK(relative_error(run(dir.path(), tokens, 33), expected) < 2e-6);
    }
  }
}

TEST_CASE("results do not depend on the number of threads") {
  const scratch_directory dir;
  write_tiny_model(dir.path(), {});
  const auto tokens = some_tokens(50);
  const auto one = run(dir.path(), tokens, 50, 1);
  for (const int threads : {2, 3, 5}) CHECK(run(dir.path(), tokens, 50, threads) == one);
}

TEST_CASE("permuting the channel spaces of a model keeps its function") {
  for (const bool biases : {false, true}) {
    const scratch_directory dir;
    const scratch_directory moved;
    write_tiny_model(dir.path(), {!biases, biases, 2});
    auto tensors = read_tensors(dir.path());
    const auto tokens = some_tokens(40);
    const auto before = run(dir.path(), tokens, 40);
    const auto original = tensors;
    shuffle_channels(read_config(dir.path()), tensors);
    CHECK(tensors != original);
    write_tensors(dir.path(), moved.path(), tensors);
    CHECK(relative_error(run(moved.path(), tokens, 40), before) < 1e-5);
  }
}

TEST_CASE("sequences that do not fit and unknown tokens are refused") {
  const scratch_directory dir;
  write_tiny_model(dir.path(), {});
  const qeft::on_host exec;
  llama_model model(exec, model_source(dir.path()));
  CHECK_THROWS_WITH(model.reset(129), contains("max_position_embeddings is 128"));
  CHECK_THROWS_AS(model.reset(0), qeft::error);
  model.reset(3);
  CHECK_THROWS_WITH(model.forward({1, 2, 3, 4}), contains("room for 3"));
  CHECK_THROWS_WITH(model.forward({256}), contains("n is 256"));
  CHECK_THROWS_AS(model.forward({-1}), qeft::error);
}

TEST_CASE("a reordered quantised model computes what the one in original order computes") {
  for (const auto placement : {qeft::weak_kind::indexed, qeft::weak_kind::per_head}) {
    for (const bool biases : {false, true}) {
      const scratch_directory dir;
      write_tiny_model(dir.path() / "model", {!biases, biases, 4});
      auto o = tiny_quantization(dir.path() / "model", dir.path() / "reordered",
                                 dir.path() / "text");
      o.o_proj_placement = placement;
      REQUIRE(run_quantize(o) == 0);
      const auto reordered = read_config(dir.path() / "reordered").quantization.value();
      const auto kind = [&](const char* name) {
        return reordered.layers.at(std::string("model.layers.1.") + name).weak;
      };
      CHECK(kind("self_attn.q_proj") == qeft::weak_kind::tail);
      CHECK(kind("mlp.down_proj") == qeft::weak_kind::tail);
      CHECK(kind("self_attn.o_proj") == placement);

      // The same weak columns, left where they are.
      o.weak_columns_from = o.out;
      o.out = (dir.path() / "original").string();
      o.o_proj_placement = qeft::weak_kind::indexed;
      o.reorder = false;
      if (placement == qeft::weak_kind::per_head) o.weak_columns = 12;
      if (placement == qeft::weak_kind::per_head) continue;  // k of o_proj differs from the others
      REQUIRE(run_quantize(o) == 0);
      const auto tokens = some_tokens(60);
      const auto a = run(dir.path() / "reordered", tokens, 60);
      const auto b = run(dir.path() / "original", tokens, 60);
      CHECK(relative_error(a, b) < 1e-5);
      // And it is close to the full-precision model, but not the same.
      const auto full = run(dir.path() / "model", tokens, 60);
      CHECK(relative_error(a, full) < 0.5);
      CHECK(relative_error(a, full) > 1e-4);
    }
  }
}

TEST_CASE("quantising leaves nothing behind when it fails") {
  const scratch_directory dir;
  write_tiny_model(dir.path() / "model", {});
  auto o = tiny_quantization(dir.path() / "model", dir.path() / "out", dir.path() / "text");
  o.bits = 5;
  CHECK_THROWS_WITH(run_quantize(o), contains("bits is 5"));
  o.bits = 4;
  o.group_size = 48;
  CHECK_THROWS_WITH(run_quantize(o), contains("group_size is 48"));
  o.group_size = 32;
  o.weak_columns = 97;
  CHECK_THROWS_WITH(run_quantize(o), contains("--weak-columns is 97"));
  o.weak_columns = 8;
  o.samples = 1000;
  CHECK_THROWS_WITH(run_quantize(o), contains("1000 windows of 64 tokens need 64000"));
  o.samples = 6;
  CHECK_FALSE(std::filesystem::exists(dir.path() / "out"));
  CHECK_FALSE(std::filesystem::exists(dir.path() / "out.partial"));

  auto tensors = read_tensors(dir.path() / "model");
  tensors.at("model.layers.1.mlp.up_proj.weight")[7] = NAN;
  write_tensors(dir.path() / "model", dir.path() / "nan", tensors);
  o.model = (dir.path() / "nan").string();
  CHECK_THROWS_WITH(run_quantize(o), contains("model.layers.1.mlp.up_proj.weight"));
  CHECK_FALSE(std::filesystem::exists(dir.path() / "out"));
  CHECK_FALSE(std::filesystem::exists(dir.path() / "out.partial"));

  o.model = (dir.path() / "model").string();
  o.out = (dir.path() / "text" / "below-a-file").string();
  CHECK_THROWS_AS(run_quantize(o), qeft::error);
  o.out = (dir.path() / "model").string();
  CHECK_THROWS_WITH(run_quantize(o), contains("exists already"));
}

TEST_CASE("every option of quantisation gives a model that runs") {
  const scratch_directory dir;
  write_tiny_model(dir.path() / "model", {});
  const auto base = tiny_quantization(dir.path() / "model", {}, dir.path() / "text");
  const auto full = run(dir.path() / "model", some_tokens(30), 30);
  int count = 0;
  const auto check = [&](quantize_options o, double tolerance) {
    o.out = (dir.path() / std::to_string(count++)).string();
    REQUIRE(run_quantize(o) == 0);
    CHECK(relative_error(run(o.out, some_tokens(30), 30), full) < tolerance);
  };
  auto o = base;
  o.method = quantize_method::rtn;
  o.weak_columns = 0;
  o.calibration.clear();
  check(o, 0.9);
  o = base;
  o.bits = 8;
  o.zero = qeft::zero_kind::symmetric;
  check(o, 0.05);
  o = base;
  o.bits = 3;
  o.zero = qeft::zero_kind::scaled;
  check(o, 0.9);
  o = base;
  o.act_order = true;
  check(o, 0.5);
  o = base;
  o.selection = column_selection::hessian_perturbation;
  o.group_size = qeft::per_channel;
  o.reorder = false;
  check(o, 0.9);
  o = base;
  o.selection = column_selection::gradient;
  o.accumulation = score_accumulation::reference;
  check(o, 0.5);
}
