// SPDX-License-Identifier: Apache-2.0
// The decoder against a forward pass in double, written here on its own, and against `transformers`
// where compare_transformers.py has left its results.
#include "llama.hpp"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>
#include <utility>
#include <vector>

#include "elementwise.hpp"
#include "qeft/io/checkpoint.hpp"
#include "qeft/io/safetensors.hpp"
#include "support/cases.hpp"
#include "support/catch.hpp"
#include "support/skip.hpp"
#include "unit/io/temporary_directory.hpp"

using namespace qeft_llm;
using namespace qeft_test;
using nlohmann::json;
using qeft::errc;
using qeft::index_t;
using qeft::io::dtype;

namespace {

using values = std::vector<double>;

/// The config of a small model, with these keys replaced.
json tiny(const json& changes = json::object()) {
  json config = {{"architectures", {"LlamaForCausalLM"}},
                 {"model_type", "llama"},
                 {"hidden_act", "silu"},
                 {"hidden_size", 48},
                 {"intermediate_size", 80},
                 {"num_hidden_layers", 3},
                 {"num_attention_heads", 6},
                 {"num_key_value_heads", 2},
                 {"head_dim", 8},
                 {"vocab_size", 101},
                 {"max_position_embeddings", 128},
                 {"rms_norm_eps", 1e-5},
                 {"rope_theta", 10000.0},
                 {"tie_word_embeddings", true}};
  config.update(changes);
  return config;
}

/// A model directory of random tensors, FP16 or quantised, and the same numbers in memory.
struct random_model {
  model_config config;
  std::map<std::string, values> tensors;
  temporary_directory directory;

  /// @param quantised the linears, by name without ".weight", to write as quantised layers
  random_model(json source, std::uint64_t seed,
               std::map<std::string, qeft::matrix_descriptor> quantised = {})
      : config(parse_config(source, "tiny")) {
    random_source random(seed);
    std::map<std::string, packed_matrix> packed;
    qeft::io::safetensors_writer writer;
    for (const tensor_spec& spec : expected_tensors(config)) {
      const std::string name = spec.name.substr(0, spec.name.rfind('.'));
      const bool is_matrix = spec.shape.size() == 2;
      const auto layer = is_matrix ? quantised.find(name) : quantised.end();
      if (layer != quantised.end()) {
        layer->second.out_channels = spec.shape[0];
        layer->second.in_channels = spec.shape[1];
        const plain_layer plain = random_layer(layer->second, random);
        const std::vector<float> weights = weights_of(plain);
        tensors[spec.name].assign(weights.begin(), weights.end());
        const auto at = packed.emplace(name, pack<qeft::layout::row_packed>(plain)).first;
        qeft::io::add_linear(writer, name, at->second, plain.weak_columns);
        continue;
      }
      const double mean = spec.name.find("norm") != std::string::npos ? 1.0 : 0.0;
      const double scale = is_matrix ? 1.5 / std::sqrt(static_cast<double>(spec.shape[1])) : 0.3;
      const index_t count = spec.shape[0] * (is_matrix ? spec.shape[1] : 1);
      std::vector<std::byte> bytes(static_cast<std::size_t>(2 * count));
      for (index_t i = 0; i < count; ++i) {
        const auto x = static_cast<float>(random.real() * scale + mean);
        const auto half = qeft::from_float<qeft::half_bits>(x);
        std::memcpy(bytes.data() + 2 * i, &half.bits, 2);
        tensors[spec.name].push_back(static_cast<double>(qeft::to_float(half)));
      }
      writer.add(spec.name, dtype::f16, spec.shape, std::move(bytes));
    }
    if (!quantised.empty()) {
      qeft::io::quantization_config q;
      for (const auto& [name, d] : quantised) q.layers[name] = d;
      source["quantization_config"] = qeft::io::to_json(q);
    }
    writer.write(directory / "model.safetensors");
    write_all(directory / "config.json", source.dump());
  }

  values linear(const std::string& name, const values& x) const {
    const values& w = tensors.at(name + ".weight");
    const auto bias = tensors.find(name + ".bias");
    values y(w.size() / x.size(), 0.0);
    for (std::size_t n = 0; n < y.size(); ++n) {
      for (std::size_t c = 0; c < x.size(); ++c) y[n] += w[n * x.size() + c] * x[c];
      if (bias != tensors.end()) y[n] += bias->second[n];
    }
    return y;
  }
  values norm(const std::string& name, const values& x) const {
    double squares = 0;
    for (const double v : x) squares += v * v;
    const double root = std::sqrt(squares / static_cast<double>(x.size()) + config.rms_norm_eps);
    values y = x;
    for (std::size_t c = 0; c < x.size(); ++c) y[c] *= tensors.at(name + ".weight")[c] / root;
    return y;
  }
  void rotate(values& x, index_t position) const {
    const auto dim = static_cast<std::size_t>(config.head_dim);
    for (std::size_t head = 0; head < x.size(); head += dim) {
      for (std::size_t i = 0; i < dim / 2; ++i) {
        const double exponent = -2.0 * static_cast<double>(i) / static_cast<double>(dim);
        const double angle = static_cast<double>(position) *
                             std::pow(config.rope.theta, exponent) / config.rope.factor;
        const double a = x[head + i];
        const double b = x[head + i + dim / 2];
        x[head + i] = a * std::cos(angle) - b * std::sin(angle);
        x[head + i + dim / 2] = a * std::sin(angle) + b * std::cos(angle);
      }
    }
  }

  /// Logits of every token, (tokens, vocabulary).
  values logits(const std::vector<int>& tokens) const {
    const auto dim = static_cast<std::size_t>(config.head_dim);
    const auto heads = static_cast<std::size_t>(config.num_attention_heads);
    const auto group = heads / static_cast<std::size_t>(config.num_key_value_heads);
    const auto hidden = static_cast<std::size_t>(config.hidden_size);
    std::vector<values> stream;
    for (const int token : tokens) {
      const auto row = tensors.at("model.embed_tokens.weight").begin() +
                       static_cast<std::ptrdiff_t>(token) * config.hidden_size;
      stream.emplace_back(row, row + config.hidden_size);
    }
    for (index_t l = 0; l < config.num_hidden_layers; ++l) {
      const std::string block = "model.layers." + std::to_string(l) + ".";
      std::vector<values> k;
      std::vector<values> v;
      for (std::size_t t = 0; t < stream.size(); ++t) {
        values& x = stream[t];
        values in = norm(block + "input_layernorm", x);
        values q = linear(block + "self_attn.q_proj", in);
        k.push_back(linear(block + "self_attn.k_proj", in));
        v.push_back(linear(block + "self_attn.v_proj", in));
        rotate(q, static_cast<index_t>(t));
        rotate(k.back(), static_cast<index_t>(t));
        const auto window = static_cast<std::size_t>(config.sliding_window);
        const std::size_t begin = window > 0 && t + 1 > window ? t + 1 - window : 0;
        values mixed(heads * dim, 0.0);
        for (std::size_t h = 0; h < heads; ++h) {
          const std::size_t kv = h / group * dim;
          double total = 0;
          for (std::size_t s = begin; s <= t; ++s) {
            double score = 0;
            for (std::size_t d = 0; d < dim; ++d) score += q[h * dim + d] * k[s][kv + d];
            const double weight = std::exp(score / std::sqrt(static_cast<double>(dim)));
            total += weight;
            for (std::size_t d = 0; d < dim; ++d) mixed[h * dim + d] += weight * v[s][kv + d];
          }
          for (std::size_t d = 0; d < dim; ++d) mixed[h * dim + d] /= total;
        }
        const values attended = linear(block + "self_attn.o_proj", mixed);
        for (std::size_t c = 0; c < hidden; ++c) x[c] += attended[c];
        in = norm(block + "post_attention_layernorm", x);
        values inner = linear(block + "mlp.gate_proj", in);
        const values up = linear(block + "mlp.up_proj", in);
        for (std::size_t c = 0; c < inner.size(); ++c) {
          inner[c] = inner[c] / (1 + std::exp(-inner[c])) * up[c];
        }
        const values down = linear(block + "mlp.down_proj", inner);
        for (std::size_t c = 0; c < hidden; ++c) x[c] += down[c];
      }
    }
    values all;
    for (const values& x : stream) {
      const values y = linear(config.tie_word_embeddings ? "model.embed_tokens" : "lm_head",
                              norm("model.norm", x));
      all.insert(all.end(), y.begin(), y.end());
    }
    return all;
  }

  std::vector<int> tokens(std::size_t count) const {
    random_source random(count);
    std::vector<int> ids(count);
    for (int& id : ids) id = static_cast<int>(random.integer(0, config.vocab_size - 1));
    return ids;
  }
  llama_model model(int threads = 2) const {
    return {qeft::on_host(threads), model_source(directory.path())};
  }
};

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

/// The largest ||actual - expected|| / ||expected|| of a token.
template <class T>
double worst_error(const std::vector<float>& actual, const std::vector<T>& expected,
                   index_t vocabulary) {
  REQUIRE(actual.size() == expected.size());
  double worst = 0;
  for (std::size_t i = 0; i < actual.size();) {
    double difference = 0;
    double norm = 0;
    for (index_t v = 0; v < vocabulary; ++v, ++i) {
      const auto e = static_cast<double>(expected[i]);
      const double d = static_cast<double>(actual[i]) - e;
      difference += d * d;
      norm += e * e;
    }
    worst = std::max(worst, std::sqrt(difference / norm));
  }
  return worst;
}

double error_of(const random_model& m) {
  const std::vector<int> tokens = m.tokens(70);
  return worst_error(logits_in_pieces(m.model(), tokens, {70}), m.logits(tokens),
                     m.config.vocab_size);
}

}  // namespace

TEST_CASE("the decoder computes what its definition says", "[llm]") {
  const json variants[] = {
      json::object(),
      {{"attention_bias", true}, {"mlp_bias", true}},
      {{"tie_word_embeddings", false}},
      {{"num_key_value_heads", 6}},
      {{"num_key_value_heads", 1}, {"head_dim", 40}, {"num_attention_heads", 2}},
      {{"model_type", "qwen2"}, {"architectures", {"Qwen2ForCausalLM"}}},
      {{"model_type", "mistral"},
       {"architectures", {"MistralForCausalLM"}},
       {"sliding_window", 35}},
      {{"rope_scaling", {{"rope_type", "linear"}, {"factor", 4.0}}}},
  };
  for (const json& changes : variants) {
    CAPTURE(changes.dump());
    CHECK(error_of(random_model(tiny(changes), 1)) < 2e-6);
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
  const random_model m(tiny(), 5,
                       {{linear_name(0, linear_kind::q), format(4, qeft::weak_kind::tail, 8)},
                        {linear_name(0, linear_kind::o), format(4, qeft::weak_kind::indexed, 5)},
                        {linear_name(1, linear_kind::o),
                         format(3, qeft::weak_kind::per_head, 12, 6)},
                        {linear_name(1, linear_kind::v), format(8, qeft::weak_kind::none, 0)},
                        {linear_name(2, linear_kind::gate), format(2, qeft::weak_kind::tail, 48)},
                        {linear_name(2, linear_kind::down),
                         format(3, qeft::weak_kind::indexed, 16)}});
  CHECK(error_of(m) < 2e-6);
}

TEST_CASE("a sequence gives the same bits however it is cut and however many threads", "[llm]") {
  for (const index_t window : {0, 21}) {
    const random_model m(
        tiny({{"model_type", "mistral"},
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
  }
}

TEST_CASE("the tap sees the input of every linear", "[llm]") {
  const random_model m(tiny(), 7);
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

TEST_CASE("full-precision tensors that FP16 cannot hold are refused", "[llm]") {
  const auto refused = [](std::vector<float> x) {
    const qeft::io::tensor_view t{"w", dtype::f32, {1, 2},
                                  {reinterpret_cast<const std::byte*>(x.data()), 8}};
    return catch_error([&] { full_precision("w", t, 1, 2); });
  };
  CHECK(refused({1, 65504}).code == errc::ok);
  CHECK(refused({1, 65520}).message == "tensor w, element 1: 65520.000000 overflows FP16");
  CHECK(refused({std::nanf(""), 1}).message == "tensor w, element 0: not finite");
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

// Directories NAME/ of compare_transformers.py: model/ and reference.safetensors, which holds
// `tokens` and their `logits`, and `greedy`, the continuation of `prompt`.
TEST_CASE("logits and greedy text equal those of transformers", "[llm][data]") {
  const char* data = std::getenv("QEFT_TEST_DATA");
  const auto folder = std::filesystem::path(data == nullptr ? "" : data) / "transformers";
  if (data == nullptr || !std::filesystem::is_directory(folder)) {
    skip("no results of transformers in QEFT_TEST_DATA (see tests/llm/compare_transformers.py)");
    return;
  }
  sweep models("models of transformers");
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    models.ran();
    const std::string name = entry.path().filename().string();
    CAPTURE(name);
    llama_model model(qeft::on_host(0), model_source(entry.path() / "model"));
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
    const double error =
        worst_error(logits_in_pieces(model, tokens, {count}), expected, vocabulary);
    std::printf("%s: relative error of the logits of %zu tokens %.2g\n", name.c_str(),
                tokens.size(), error);
    CHECK(error < 1e-3);

    std::vector<int> step = ints("prompt");
    const std::vector<int> greedy = ints("greedy");
    model.reset(static_cast<index_t>(step.size() + greedy.size()));
    std::vector<float> logits(static_cast<std::size_t>(vocabulary));
    const auto hidden = static_cast<std::size_t>(model.config().hidden_size);
    std::vector<int> generated;
    while (generated.size() < greedy.size()) {
      const std::vector<float>& normed = model.forward(step);
      model.logits(normed.data() + normed.size() - hidden, 1, logits.data());
      generated.push_back(
          static_cast<int>(std::max_element(logits.begin(), logits.end()) - logits.begin()));
      step = {generated.back()};
    }
    CHECK(generated == greedy);
  }
}
