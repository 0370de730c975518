// SPDX-License-Identifier: Apache-2.0
// The decoder against a forward pass in double, and against `transformers` where
// compare_transformers.py has left its results.
#include "llama.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>
#include <utility>
#include <vector>

#include "checkpoint_model.hpp"
#include "elementwise.hpp"
#include "qeft/io/checkpoint.hpp"
#include "qeft/io/convert.hpp"
#include "qeft/io/safetensors.hpp"
#include "support/cases.hpp"
#include "support/catch.hpp"
#include "support/skip.hpp"
#include "support/sweep.hpp"
#include "unit/io/temporary_directory.hpp"

using namespace qeft_llm;
using namespace qeft_test;
using nlohmann::json;
using qeft::errc;
using qeft::index_t;
using qeft::io::dtype;

namespace {

/// Logits of tokens that are appended in pieces of these sizes.
std::vector<float> logits_in_pieces(llama_model model, const std::vector<int>& tokens,
                                    const std::vector<index_t>& pieces) {
  model.reset(static_cast<index_t>(tokens.size()));
  const index_t vocabulary = model.config().vocab_size;
  std::vector<float> all(tokens.size() * static_cast<std::size_t>(vocabulary));
  index_t done = 0;
  for (const index_t n : pieces) {
    const std::vector<float>& normed =
        model.forward({tokens.begin() + done, tokens.begin() + done + n});
    model.logits(normed.data(), n, all.data() + done * vocabulary);
    done += n;
  }
  REQUIRE(done == static_cast<index_t>(tokens.size()));
  return all;
}

/// Of a sequence in one piece, token by token, and in uneven pieces.
double worst_error_of(const checkpoint_model& m) {
  const std::vector<int> tokens = m.tokens(70);
  const std::vector<double> expected = m.logits(tokens);
  const std::vector<index_t> cuts[] = {{70}, std::vector<index_t>(70, 1), {33, 33, 4}};
  double worst = 0;
  for (const std::vector<index_t>& pieces : cuts) {
    const std::vector<float> logits = logits_in_pieces(m.model(), tokens, pieces);
    worst = std::max(worst, worst_error(logits, expected, m.config.vocab_size));
  }
  return worst;
}

}  // namespace

TEST_CASE("the decoder computes what its definition says", "[llm]") {
  const json variants[] = {
      json::object(),
      {{"attention_bias", true}, {"mlp_bias", true}},
      {{"tie_word_embeddings", false}},
      {{"num_key_value_heads", 6}},
      {{"num_key_value_heads", 1}, {"head_dim", 40}, {"num_attention_heads", 2}},
      {{"model_type", "qwen2"}},
      {{"model_type", "qwen2"},
       {"tie_word_embeddings", false},
       {"hidden_size", 96},
       {"intermediate_size", 160},
       {"head_dim", 16},
       {"vocab_size", 256}},
      {{"model_type", "mistral"}, {"sliding_window", 35}},
      {{"model_type", "qwen2"},
       {"use_sliding_window", true},
       {"sliding_window", 20},
       {"max_window_layers", 1}},
      {{"model_type", "qwen2"},
       {"use_sliding_window", true},
       {"sliding_window", 9},
       {"layer_types", {"sliding_attention", "full_attention", "sliding_attention"}}},
      {{"rope_scaling", {{"rope_type", "linear"}, {"factor", 4.0}}}},
      // One pair of a head keeps its frequency, one is on the ramp, two are divided.
      {{"rope_theta", 1000.0},
       {"rope_scaling",
        {{"rope_type", "llama3"},
         {"factor", 8.0},
         {"low_freq_factor", 1.0},
         {"high_freq_factor", 4.0},
         {"original_max_position_embeddings", 64}}}},
  };
  for (const json& changes : variants) {
    CAPTURE(changes.dump());
    CHECK(worst_error_of(checkpoint_model(tiny_config(changes), 1)) < 2e-6);
  }
}

TEST_CASE("quantised layers of every placement run in the decoder", "[llm]") {
  const auto format = [](int bits, qeft::weak_kind weak, index_t k, index_t heads = 1) {
    qeft::matrix_descriptor d;
    d.bits = bits;
    d.group_size = 32;
    d.weak = weak;
    d.weak_columns = k;
    d.heads = heads;
    return d;
  };
  const checkpoint_model m(
      tiny_config(), 5,
      {{linear_name(0, linear_kind::q), format(4, qeft::weak_kind::tail, 8)},
       {linear_name(0, linear_kind::o), format(4, qeft::weak_kind::indexed, 5)},
       {linear_name(1, linear_kind::o), format(3, qeft::weak_kind::per_head, 12, 6)},
       {linear_name(1, linear_kind::v), format(8, qeft::weak_kind::none, 0)},
       {linear_name(2, linear_kind::gate), format(2, qeft::weak_kind::tail, 48)},
       {linear_name(2, linear_kind::down), format(3, qeft::weak_kind::indexed, 16)}});
  CHECK(worst_error_of(m) < 2e-6);
}

TEST_CASE("a sequence gives the same bits however it is cut and however many threads", "[llm]") {
  for (const index_t window : {0, 21}) {
    const checkpoint_model m(
        tiny_config({{"model_type", "mistral"},
                     {"sliding_window", window == 0 ? json(nullptr) : json(window)},
                     {"head_dim", 40}}),
        3);
    const std::vector<int> tokens = m.tokens(70);
    const std::vector<float> whole = logits_in_pieces(m.model(1), tokens, {70});
    const auto same = [&](int threads, const std::vector<index_t>& pieces) {
      return logits_in_pieces(m.model(threads), tokens, pieces) == whole;
    };
    CHECK(same(1, std::vector<index_t>(70, 1)));
    CHECK(same(1, {1, 40, 3, 26}));
    CHECK(same(2, {70}));
    CHECK(same(3, {37, 33}));
    CHECK(same(5, {50, 20}));
  }
}

TEST_CASE("the tap sees the input of every linear", "[llm]") {
  const checkpoint_model m(tiny_config(), 7);
  llama_model model = m.model();
  model.reset(9);
  std::map<linear_kind, int> seen;
  model.forward(m.tokens(9), [&](linear_kind kind, const float* x, index_t count) {
    ++seen[kind];
    CHECK(count == 9);
    const index_t channels = shape_of(m.config, kind).in_channels;
    CHECK(std::any_of(x, x + count * channels, [](float v) { return v != 0; }));
  });
  for (const linear_kind kind : all_linears) CHECK(seen[kind] == 3);
}

TEST_CASE("sequences that do not fit and unknown tokens are refused", "[llm]") {
  llama_model model = checkpoint_model(tiny_config(), 7).model();
  CHECK_THROWS_WITH(model.reset(129), contains("max_position_embeddings is 128"));
  CHECK_THROWS_AS(model.reset(0), qeft::error);
  model.reset(3);
  CHECK_THROWS_WITH(model.forward({1, 2, 3, 4}), contains("room for 3"));
  CHECK_THROWS_WITH(model.forward({101}), contains("n is 101"));
  CHECK_THROWS_AS(model.forward({-1}), qeft::error);
}

TEST_CASE("F32 tensors become FP16 or BF16, by which loses less, and the loss is counted",
          "[llm]") {
  const auto read = [](std::vector<float> x, rounding_summary& summary) {
    const auto columns = static_cast<index_t>(x.size()) / 2;
    const qeft::io::tensor_view t{"w", dtype::f32, {2, columns}, qeft::io::as_bytes(x)};
    return full_precision("w", t, 2, columns, &summary).descriptor().scalar;
  };
  using qeft::scalar_kind;
  rounding_summary exact;
  CHECK(read({1, 65504, 0x1p-24F, 0.5F}, exact) == scalar_kind::half);
  CHECK(read({1, 65536, 0, 0.5F}, exact) == scalar_kind::bf16);
  CHECK(read({0x1p-30F, -0x1p-33F, 0x1.02p-60F, 0}, exact) == scalar_kind::bf16);
  CHECK(exact.tensors == 0);

  rounding_summary usual;
  CHECK(read({0.1F, 0.2F, 0.3F, 0.4F}, usual) == scalar_kind::half);
  CHECK(usual.tensors == 1);
  CHECK(usual.worst == "w");
  CHECK((usual.error > 0 && usual.error < 0x1p-11));
  // One row, or one column, that FP16 would lose counts as much as the rest.
  for (const std::vector<float>& x :
       {std::vector<float>{0.1F, 0.2F, 0.1e-8F, 0.2e-8F}, {0.1F, 0.2e-8F, 0.3F, 0.4e-8F}}) {
    rounding_summary lossy;
    CHECK(read(x, lossy) == scalar_kind::bf16);
    CHECK((lossy.error > 0x1p-11 && lossy.error < 0x1p-8));
  }

  const auto message = [&](std::vector<float> x) {
    rounding_summary unused;
    return catch_error([&] { read(x, unused); }).message;
  };
  CHECK(message({1, 2, 1, std::nanf("")}) == "tensor w, element 3: not finite");
  CHECK_THAT(message({1, 3.4e38F}),
             contains("tensor w, element 1: 339") && contains("overflows FP16 and BF16"));
}

TEST_CASE("logits that are not finite are an error that names where they come from", "[llm]") {
  const auto message = [](const std::string& tensor) {
    const temporary_directory dir;
    reference_model m = write_small_model(dir.path(), json::object(), 3);
    for (double& x : m.tensors.at(tensor)) x = 3e38;
    write_tensors(dir.path(), m, dtype::f32);
    llama_model model(qeft::on_host(1), model_source(dir.path()));
    model.reset(4);
    const std::vector<float> normed = model.forward({1, 2, 3});
    std::vector<float> logits(static_cast<std::size_t>(3 * m.config.vocab_size));
    return catch_error([&] { model.logits(normed.data(), 3, logits.data()); }).message;
  };
  CHECK(message("model.norm.weight") == "the model's logits are not finite");
  CHECK(message("model.layers.1.input_layernorm.weight") ==
        "the model's logits are not finite, nor are its activations behind model.layers.1");
}

// config.json says tied: what counts is what the files hold.
TEST_CASE("heads of tied models", "[llm]") {
  const temporary_directory dir;
  reference_model m = write_small_model(dir.path(), json::object(), 3);
  REQUIRE(m.config.tie_word_embeddings);
  const std::vector<int> tokens = random_tokens(m.config, 20, 1);
  const auto& embedding = m.tensors.at("model.embed_tokens.weight");
  const std::vector<index_t> shape = {m.config.vocab_size, m.config.hidden_size};
  const auto write = [&](bool with_embedding, const std::vector<double>& head, dtype type) {
    qeft::io::safetensors_writer writer;
    for (const tensor_spec& spec : expected_tensors(m.config)) {
      if (spec.name == "model.embed_tokens.weight" && !with_embedding) continue;
      if (spec.name != "lm_head.weight") {
        add_tensor(writer, spec, m.tensors.at(spec.name), dtype::f16);
      }
    }
    add_tensor(writer, {"lm_head.weight", shape}, head, type);
    writer.write(dir / "model.safetensors");
  };
  const auto error = [&] {
    llama_model model(qeft::on_host(1), model_source(dir.path()));
    return worst_error(logits_in_pieces(std::move(model), tokens, {20}), m.logits(tokens),
                       m.config.vocab_size);
  };
  SECTION("an equal head, in whatever type, is the embedding") {
    for (const dtype type : {dtype::f16, dtype::f32}) {
      write(true, embedding, type);
      CHECK(model_source(dir.path()).config().tie_word_embeddings);
      CHECK(error() < 1e-5);
    }
  }
  SECTION("only the head is stored: it is the embedding") {
    write(false, embedding, dtype::f16);
    CHECK(error() < 1e-5);
    CHECK_NOTHROW(model_source(dir.path()).weights().require(expected_tensors(m.config)));
  }
  SECTION("another head counts, and a config made from this one says so") {
    m.config.tie_word_embeddings = false;
    m.tensors["lm_head.weight"] = random_tensors(m.config, dtype::f16, 9).at("lm_head.weight");
    write(true, m.tensors.at("lm_head.weight"), dtype::f16);
    CHECK(error() < 1e-5);
    const model_config config = model_source(dir.path()).config();
    CHECK_FALSE(config.tie_word_embeddings);
    CHECK(config.source.at("tie_word_embeddings") == false);
  }
}

TEST_CASE("exp_clamped and softmax", "[llm]") {
  double worst = 0;
  for (int i = -87000; i <= 88000; ++i) {
    const float x = static_cast<float>(i) / 1000;
    const double exact = std::exp(static_cast<double>(x));
    worst = std::max(worst, std::abs(static_cast<double>(exp_clamped(x)) / exact - 1));
  }
  CHECK(worst < 2 * 0x1p-23);
  CHECK(exp_clamped(0) == 1);
  CHECK(exp_clamped(-1e30F) == exp_clamped(-87));

  std::vector<float> scores(77, -3e38F);
  scores[5] = scores[70] = 1e4F;
  softmax(scores.data(), 77);
  CHECK(scores[5] == 0.5F);
  CHECK(scores[70] == 0.5F);
  CHECK(*std::min_element(scores.begin(), scores.end()) < 1e-37F);
}

namespace {

/// Compares with FOLDER/NAME/: model/ and reference.safetensors, which holds `tokens` and their
/// `logits`, and `greedy`, the continuation of `prompt`.
/// @param definition also the forward pass in double, for small models
void compare_with_transformers(const std::filesystem::path& folder, bool definition) {
  sweep models("models of transformers");
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    models.ran();
    const std::string name = entry.path().filename().string();
    CAPTURE(name);
    const model_source source(entry.path() / "model");
    llama_model model(qeft::on_host(definition ? 1 : 0), source);
    const qeft::io::safetensors_reader reference(entry.path() / "reference.safetensors");
    const auto ints = [&](const std::string& tensor) {
      const auto& t = reference.at(tensor);
      return qeft::io::read_i32(reference, tensor, t.elements());
    };

    const std::vector<int> tokens = ints("tokens");
    const auto count = static_cast<index_t>(tokens.size());
    const index_t vocabulary = model.config().vocab_size;
    const auto& stored = reference.at("logits", dtype::f32, {count, vocabulary});
    std::vector<float> expected(static_cast<std::size_t>(stored.elements()));
    std::memcpy(expected.data(), stored.data.data(), static_cast<std::size_t>(stored.data.size()));
    const std::vector<float> logits = logits_in_pieces(model, tokens, {count});
    const double error = worst_error(logits, expected, vocabulary);
    // F32 weights are rounded to 16 bits.
    const bool exact =
        source.weights().view("model.norm.weight", {model.config().hidden_size}).type != dtype::f32;
    CHECK(error < (exact ? 1e-3 : 1e-2));
    if (definition) {
      reference_model slow{source.config(), {}};
      for (const tensor_spec& spec : expected_tensors(slow.config)) {
        const std::vector<float> values = source.weights().read(spec.name, spec.shape);
        slow.tensors[spec.name].assign(values.begin(), values.end());
      }
      CHECK(worst_error(expected, slow.logits(tokens), vocabulary) < 2e-5);
      if (exact) CHECK(worst_error(logits, slow.logits(tokens), vocabulary) < 1e-5);
    } else {
      std::printf("%s: relative error of the logits of %zu tokens %.2g\n", name.c_str(),
                  tokens.size(), error);
    }

    std::vector<int> step = ints("prompt");
    const std::vector<int> greedy = ints("greedy");
    model.reset(static_cast<index_t>(step.size() + greedy.size()));
    std::vector<float> last(static_cast<std::size_t>(vocabulary));
    const auto hidden = static_cast<std::size_t>(model.config().hidden_size);
    std::vector<int> generated;
    while (generated.size() < greedy.size()) {
      const std::vector<float>& normed = model.forward(step);
      model.logits(normed.data() + normed.size() - hidden, 1, last.data());
      generated.push_back(
          static_cast<int>(std::max_element(last.begin(), last.end()) - last.begin()));
      step = {generated.back()};
    }
    if (exact) CHECK(generated == greedy);
  }
}

}  // namespace

TEST_CASE("small models give the logits and greedy tokens of transformers", "[llm]") {
  compare_with_transformers(std::filesystem::path(QEFT_GOLDENS) / "models", true);
}

TEST_CASE("logits and greedy text equal those of transformers", "[llm][data]") {
  const char* data = std::getenv("QEFT_TEST_DATA");
  const auto folder = std::filesystem::path(data == nullptr ? "" : data) / "transformers";
  if (data == nullptr || !std::filesystem::is_directory(folder)) {
    skip("no results of transformers in QEFT_TEST_DATA (see tests/llm/compare_transformers.py)");
    return;
  }
  compare_with_transformers(folder, false);
}
