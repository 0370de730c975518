// SPDX-License-Identifier: Apache-2.0
// Losses and gradients of models in training against a forward pass in double, and against
// PyTorch where compare_autograd.py has left its results.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "divergence.hpp"
#include "qeft/io/convert.hpp"
#include "qeft/io/safetensors.hpp"
#include "support/catch.hpp"
#include "support/skip.hpp"
#include "support/sweep.hpp"
#include "tuned_case.hpp"
#include "tuned_model.hpp"

using namespace qeft_llm;
using namespace qeft_test;
using nlohmann::json;
using qeft::errc;
using qeft::index_t;
using qeft::weak_kind;

namespace {

constexpr index_t all = 1000;

tuned_model load(const checkpoint_model& m, int threads = 2, const tuning_options& options = {}) {
  return {qeft::on_host(threads), model_source(m.directory.path()), options};
}

/// Where the elements of a parameter are in the model's tensors.
std::vector<double*> elements(checkpoint_model& m, const parameter& p) {
  std::vector<double*> to;
  if (p.rows == 1) {
    for (double& x : m.tensors.at(p.name)) to.push_back(&x);
    return to;
  }
  const std::string name = p.name.substr(0, p.name.rfind('.'));
  const model_source source(m.directory.path());
  const qeft::matrix_descriptor& d = *source.config().quantization->find(name);
  const std::vector<std::int32_t> columns =
      qeft::io::read_linear(source.weights().reader(), name, d).weak_index;
  std::vector<double>& weight = m.tensors.at(name + ".weight");
  REQUIRE(p.rows == d.out_channels);
  REQUIRE(p.columns == static_cast<index_t>(columns.size()));
  for (index_t n = 0; n < p.rows; ++n) {
    for (const std::int32_t c : columns) {
      to.push_back(&weight[static_cast<std::size_t>(n * d.in_channels + c)]);
    }
  }
  return to;
}

/// The derivative of the loss by a common factor of `steps` added to elements, to fourth order.
double derivative(const checkpoint_model& m, const training_sample& sample,
                  const std::vector<double*>& at, const std::vector<double>& steps) {
  std::vector<double> kept;
  for (const double* x : at) kept.push_back(*x);
  const auto loss = [&](double h) {
    for (std::size_t i = 0; i < at.size(); ++i) *at[i] = kept[i] + h * steps[i];
    return m.loss(sample.tokens, sample.counted);
  };
  constexpr double h = 1e-3;
  const double near = (loss(h) - loss(-h)) / (2 * h);
  const double far = (loss(2 * h) - loss(-2 * h)) / (4 * h);
  loss(0);
  return (4 * near - far) / 3;
}

/// ||gradient - finite differences|| / ||gradient|| of each parameter, the largest. The norm of the
/// difference is estimated from some of the elements, half of them drawn evenly and half by their
/// share of the gradient, and bounded from below by a random direction in all of them.
double worst_gradient(checkpoint_model& m, const std::vector<parameter>& parameters,
                      const training_sample& sample, double factor) {
  constexpr int samples = 24;
  random_source random(3);
  double worst = 0;
  for (const parameter& p : parameters) {
    const std::vector<double*> at = elements(m, p);
    const auto count = static_cast<double>(at.size());
    REQUIRE(static_cast<index_t>(at.size()) == p.size());
    double along = 0;
    std::vector<double> direction(at.size());
    std::vector<double> norms;  // of the elements up to each, squared
    for (std::size_t e = 0; e < at.size(); ++e) {
      const auto g = static_cast<double>(p.gradient[e]);
      direction[e] = random.real() / std::sqrt(count);
      along += direction[e] * g;
      norms.push_back((e == 0 ? 0 : norms[e - 1]) + g * g);
    }
    const double norm = norms.back();
    double difference = 0;
    for (int i = 0; i < samples; ++i) {
      const double share = (random.real() + 1) / 2;
      const auto e =
          i % 2 == 0
              ? static_cast<std::size_t>(share * count)
              : static_cast<std::size_t>(
                    std::upper_bound(norms.begin(), norms.end() - 1, share * norm) - norms.begin());
      const auto g = static_cast<double>(p.gradient[e]);
      const double chance = (1 / count + g * g / norm) / 2;
      const double expected = factor * derivative(m, sample, {at[e]}, {1.0});
      difference += std::pow(g - expected, 2) / chance;
    }
    const double expected = factor * derivative(m, sample, at, direction);
    INFO(p.name);
    CHECK(norm > 0);
    const double of_elements = std::sqrt(difference / samples / norm);
    const double of_all = std::abs(along - expected) / std::sqrt(norm);
    CHECK(of_elements < 1e-6);
    CHECK(of_all < 1e-6);
    worst = std::max({worst, of_elements, of_all});
  }
  return worst;
}

std::vector<float> gradients_of(const tuned_model& model) {
  std::vector<float> gradients;
  for (const parameter& p : model.parameters()) {
    gradients.insert(gradients.end(), p.gradient, p.gradient + p.size());
  }
  return gradients;
}

}  // namespace

TEST_CASE("gradients of every parameter equal finite differences", "[llm]") {
  const json llama3_rope = {{"rope_theta", 1000.0},
                            {"rope_scaling",
                             {{"rope_type", "llama3"},
                              {"factor", 8.0},
                              {"low_freq_factor", 1.0},
                              {"high_freq_factor", 4.0},
                              {"original_max_position_embeddings", 64}}}};
  const json biases = {{"attention_bias", true}, {"mlp_bias", true}};
  const json window = {{"model_type", "mistral"}, {"sliding_window", 5}};
  // Dense columns 48 (or 80), 63 (or 95) and 0 of groups of 32: the last group is ragged.
  const tuned_case cases[] = {
      {"tail, 4 bits", json::object(), format(4, weak_kind::tail, 16)},
      {"tail, one column", biases, format(4, weak_kind::tail, 1)},
      {"tail, all columns", {{"tie_word_embeddings", false}}, format(4, weak_kind::tail, all)},
      {"indexed, 3 bits", llama3_rope, format(3, weak_kind::indexed, 16)},
      {"indexed, one column", window, format(2, weak_kind::indexed, 1)},
      {"indexed, all columns", json::object(), format(8, weak_kind::indexed, all)},
      {"per head, 2 bits", {{"num_key_value_heads", 4}}, format(2, weak_kind::per_head, 16, 4)},
      {"per head, 8 bits", biases, format(8, weak_kind::per_head, 16, 2)},
      {"per head, all columns", window, format(3, weak_kind::per_head, all, 4)},
      {"qwen2", {{"model_type", "qwen2"}}, format(4, weak_kind::tail, 16)},
      {"a long window",
       {{"model_type", "mistral"}, {"sliding_window", 35}, {"num_hidden_layers", 1}},
       format(4, weak_kind::tail, 16),
       100},
  };
  double worst = 0;
  for (const tuned_case& c : cases) {
    INFO(c.name);
    checkpoint_model m = c.write(6);
    tuned_model model = load(m, 2, {true, false});
    const training_sample sample = masked_sample(m.tokens(c.tokens));
    const double expected = m.loss(sample.tokens, sample.counted);
    CHECK(std::abs(model.backward(sample, 0.25) - expected) < 1e-6 * expected);
    worst = std::max(worst, worst_gradient(m, model.parameters(), sample, 0.25));
  }
  std::printf("largest error of a gradient: %.2g\n", worst);
}

TEST_CASE("norms are parameters if asked for", "[llm]") {
  const checkpoint_model m =
      tuned_case{"", json::object(), format(4, weak_kind::tail, 16)}.write(1);
  const tuned_model weak = load(m);
  CHECK(weak.parameters().size() == 14);
  CHECK(weak.parameters().front().name == "model.layers.0.self_attn.q_proj.weak");
  const tuned_model with_norms = load(m, 1, {true, false});
  CHECK(with_norms.parameters().size() == 19);
  CHECK(with_norms.parameters().back().name == "model.norm.weight");
}

TEST_CASE("losses of a model in training are those of the decoder", "[llm]") {
  for (const bool tied : {true, false}) {
    const checkpoint_model m =
        tuned_case{"",
                   {{"tie_word_embeddings", tied}, {"max_position_embeddings", 512}},
                   format(4, weak_kind::tail, 16)}
            .write(2);
    tuned_model model = load(m);
    const std::vector<int> tokens = m.tokens(300);  // more than one piece of logits
    for (const training_sample& sample : {sample_of(tokens), masked_sample(tokens)}) {
      const double loss = model.loss(sample);
      CHECK(model.backward(sample, 1.0) == loss);

      llama_model decoder = m.model();
      decoder.reset(300);
      const std::vector<float> normed = decoder.forward(tokens);
      const index_t vocabulary = m.config.vocab_size;
      std::vector<float> logits(tokens.size() * static_cast<std::size_t>(vocabulary));
      decoder.logits(normed.data(), 300, logits.data());
      double expected = 0;
      for (std::size_t t = 1; t < tokens.size(); ++t) {
        if (sample.counted[t] == 0) continue;
        const float* row = logits.data() + static_cast<index_t>(t - 1) * vocabulary;
        expected += log_sum_exp(row, vocabulary) - static_cast<double>(row[tokens[t]]);
      }
      CHECK(std::abs(loss - expected) < 1e-6 * expected);
    }
  }
}

TEST_CASE("gradients add up until they are cleared", "[llm]") {
  const checkpoint_model m =
      tuned_case{"", json::object(), format(4, weak_kind::indexed, 16)}.write(3);
  tuned_model model = load(m);
  const training_sample sample = sample_of(m.tokens(20));
  model.backward(sample, 0.5);
  const std::vector<float> once = gradients_of(model);
  model.backward(sample, 0.5);
  std::vector<float> twice = once;
  for (float& x : twice) x *= 2;
  const std::vector<float> added = gradients_of(model);
  CHECK(worst_error(added, twice, static_cast<index_t>(twice.size())) < 1e-6);
  model.clear_gradients();
  CHECK(gradients_of(model) == std::vector<float>(once.size()));
  model.backward(sample, 0.5);
  CHECK(gradients_of(model) == once);

  model.clear_gradients();
  training_sample none = sample;
  std::fill(none.counted.begin(), none.counted.end(), char{0});
  CHECK(model.backward(none, 1.0) == 0);
  CHECK(gradients_of(model) == std::vector<float>(once.size()));
}

TEST_CASE("gradients depend neither on threads nor on what is kept", "[llm]") {
  const checkpoint_model m = tuned_case{"",
                                        {{"max_position_embeddings", 512},
                                         {"num_attention_heads", 6},
                                         {"num_key_value_heads", 3},
                                         {"intermediate_size", 224}},
                                        format(4, weak_kind::tail, 16)}
                                 .write(4);
  const training_sample sample = sample_of(m.tokens(200));
  tuned_model one = load(m, 1, {true, false});
  const double loss = one.backward(sample, 0.1);
  for (const int threads : {1, 2, 5}) {
    for (const bool keep_tapes : {false, true}) {
      tuned_model model = load(m, threads, {true, keep_tapes});
      CHECK(model.backward(sample, 0.1) == loss);
      CHECK(gradients_of(model) == gradients_of(one));
    }
  }
}

TEST_CASE("forward reads the weak columns as a checkpoint would hold them", "[llm]") {
  checkpoint_model m = tuned_case{"", json::object(), format(3, weak_kind::indexed, 16)}.write(6);
  tuned_model model = load(m);
  const training_sample sample = sample_of(m.tokens(20));
  random_source random(1);
  for (const parameter& p : model.parameters()) {
    const std::vector<double*> at = elements(m, p);
    for (std::size_t i = 0; i < at.size(); ++i) {
      CHECK(static_cast<double>(p.value[i]) == *at[i]);
      p.value[i] += static_cast<float>(random.real() * 0.1);
      *at[i] = static_cast<double>(qeft::to_float(qeft::from_float<qeft::half_bits>(p.value[i])));
    }
  }
  const double before = model.loss(sample);
  model.update();
  const double expected = m.loss(sample.tokens, sample.counted);
  CHECK(std::abs(before - expected) > 1e-3 * expected);
  CHECK(std::abs(model.loss(sample) - expected) < 1e-6 * expected);
}

TEST_CASE("the linears keep k of their IC inputs", "[llm]") {
  const checkpoint_model m =
      tuned_case{"", json::object(), format(4, weak_kind::tail, 16)}.write(7);
  const model_source source(m.directory.path());
  const qeft::on_host exec(1);
  constexpr index_t tokens = 21;
  tuned_block block =
      load_tuned_block(m.config, reader_of(source), weak_column_tuning(exec, source.config()), 1);
  const rope_table rope(m.config, tokens);
  floats stream(static_cast<std::size_t>(tokens * m.config.hidden_size), 0.5F);
  const block_pass pass(exec, m.config, rope, block, tokens);
  const block_tape tape = pass.record(stream.data());
  for (const linear_kind kind : all_linears) {
    const auto bytes = tape.saved[static_cast<std::size_t>(kind)].size() * sizeof(float);
    const index_t in_channels = shape_of(m.config, kind).in_channels;
    const auto full = static_cast<std::size_t>(tokens * in_channels) * sizeof(float);
    CHECK(bytes * static_cast<std::size_t>(in_channels) == full * 16);
  }
}

TEST_CASE("what training cannot go on with is refused", "[llm]") {
  checkpoint_model m = tuned_case{"", json::object(), format(4, weak_kind::tail, 16)}.write(8);
  tuned_model model = load(m);
  const auto refused = [&](const training_sample& sample) {
    return catch_error([&] { model.backward(sample, 1.0); });
  };
  CHECK(refused(sample_of({1})).code == errc::invalid_argument);
  CHECK_THAT(refused(sample_of({1})).message, contains("has 1 tokens"));
  CHECK_THAT(refused(sample_of(std::vector<int>(129))).message, contains("between 2 and 128"));
  CHECK_THAT(refused(sample_of({1, 37})).message, contains("holds token 37"));
  CHECK_THAT(refused(sample_of({-1, 1})).message, contains("holds token -1"));
  CHECK_THAT(refused({{1, 2}, {0}}).message, contains("counted has 1"));
  CHECK_THAT(refused({{1, 2}, {1, 1}}).message, contains("the first of them false"));

  // A value that overflows FP16 leaves the layer as it was.
  const training_sample sample = sample_of({1, 2, 3});
  const double loss = model.loss(sample);
  const parameter& p = model.parameters().front();
  for (const float bad : {1e6F, std::numeric_limits<float>::quiet_NaN()}) {
    const float kept = std::exchange(p.value[17], bad);
    const auto e = catch_error([&] { model.update(); });
    CHECK(e.code == errc::not_finite);
    CHECK_THAT(e.message, contains("row 1 of weak column 1"));
    p.value[17] = kept;
    CHECK(model.loss(sample) == loss);
  }

  // So that no gradient is made of it.
  const tuning_options norms{true, false};
  tuned_model wild = load(m, 2, norms);
  const auto break_norm = [&](const char* name) {
    for (const parameter& n : wild.parameters()) {
      if (n.name == name) std::fill_n(n.value, n.size(), 3e38F);
    }
    return catch_error([&] { wild.backward(sample, 1.0); });
  };
  CHECK_THAT(break_norm("model.norm.weight").message, contains("the loss is"));
  const auto e = break_norm("model.layers.1.input_layernorm.weight");
  CHECK(e.code == errc::not_finite);
  CHECK_THAT(e.message, contains("model.layers.1: the activations"));
}

TEST_CASE("gradients equal those of autograd", "[llm][data]") {
  const char* data = std::getenv("QEFT_TEST_DATA");
  const auto folder = std::filesystem::path(data == nullptr ? "" : data) / "autograd";
  if (data == nullptr || !std::filesystem::is_directory(folder)) {
    skip("no gradients of PyTorch in QEFT_TEST_DATA (see tests/llm/compare_autograd.py)");
    return;
  }
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    const qeft::io::safetensors_reader reference(entry.path() / "reference.safetensors");
    const auto ints = [&](const char* name) {
      return qeft::io::read_i32(reference, name, reference.at(name).elements());
    };
    const std::vector<std::int32_t> counted = ints("counted");
    const training_sample sample{ints("tokens"), {counted.begin(), counted.end()}};
    tuned_model model(qeft::on_host(0), model_source(entry.path() / "model"), {true, false});
    const double expected = static_cast<double>(qeft::io::to_floats(reference.at("loss")).front());
    CHECK(std::abs(model.backward(sample, 1.0) - expected) < 1e-5 * expected);
    double worst = 0;
    for (const parameter& p : model.parameters()) {
      const std::vector<float> gradient = qeft::io::to_floats(reference.at(p.name));
      worst = std::max(worst, worst_error({p.gradient, p.gradient + p.size()}, gradient, p.size()));
    }
    CHECK(worst < 1e-4);
    std::printf("%s: %zu gradients, largest relative error %.2g\n",
                entry.path().filename().string().c_str(), model.parameters().size(), worst);
  }
}
