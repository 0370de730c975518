// SPDX-License-Identifier: Apache-2.0
// The baselines of weak-column tuning: LoRA over full-precision, NF4 and 8-bit weights, QA-LoRA,
// and OWQ's weak columns; their gradients, files and merging.
#include "lora.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "checkpoint_model.hpp"
#include "finetune.hpp"
#include "lora_adapter.hpp"
#include "merge.hpp"
#include "nf4.hpp"
#include "qeft/io/adapter.hpp"
#include "quantize.hpp"
#include "round_to_nearest.hpp"
#include "support/catch.hpp"
#include "support/throws.hpp"
#include "tuned_model.hpp"
#include "tuning_method.hpp"

using namespace qeft_llm;
using namespace qeft_test;
using nlohmann::json;
using qeft::errc;
using qeft::index_t;
namespace fs = std::filesystem;

namespace {

std::size_t at(index_t i) { return static_cast<std::size_t>(i); }

std::vector<float> random_floats(index_t count, random_source& random, double size = 1) {
  std::vector<float> all;
  for (index_t i = 0; i < count; ++i) all.push_back(static_cast<float>(size * random.real()));
  return all;
}

/// A layer in full precision, its numbers rounded to FP16.
packed_matrix full(index_t rows, index_t columns, random_source& random) {
  qeft::matrix_descriptor d;
  d.out_channels = rows;
  d.in_channels = columns;
  d.weak = qeft::weak_kind::tail;
  d.weak_columns = columns;
  packed_matrix m(d);
  for (index_t n = 0; n < rows; ++n) {
    for (index_t j = 0; j < columns; ++j) {
      m.write_weak(n, j, qeft::from_float<qeft::half_bits>(static_cast<float>(random.real())).bits);
    }
  }
  return m;
}

/// What NF4 makes of numbers, by its definition.
std::vector<double> nf4_of(const std::vector<float>& values, index_t rows, index_t columns) {
  std::vector<double> most;  // of each block
  const auto block_of = [&](index_t n, index_t j) {
    return at(n * qeft::ceil_div(columns, 64) + j / 64);
  };
  for (index_t n = 0; n < rows; ++n) {
    for (index_t j = 0; j < columns; ++j) {
      if (j % 64 == 0) most.push_back(0);
      most.back() =
          std::max(most.back(), std::abs(static_cast<double>(values[at(n * columns + j)])));
    }
  }
  double mean = 0;
  for (const double m : most) mean += m / static_cast<double>(most.size());
  std::vector<double> stored;
  for (std::size_t i = 0; i < most.size(); ++i) {
    double largest = 0;
    for (std::size_t j = i / 256 * 256; j < std::min(most.size(), i / 256 * 256 + 256); ++j) {
      largest = std::max(largest, std::abs(most[j] - mean));
    }
    const double step = largest / 127;
    stored.push_back(step > 0 ? mean + step * std::round((most[i] - mean) / step) : mean);
  }
  std::vector<double> result;
  for (index_t n = 0; n < rows; ++n) {
    for (index_t j = 0; j < columns; ++j) {
      const double m = most[block_of(n, j)];
      const double x = m > 0 ? static_cast<double>(values[at(n * columns + j)]) / m : 0;
      double best = 2;
      for (const float level : nf4_levels) {
        if (std::abs(x - static_cast<double>(level)) < std::abs(x - best)) {
          best = static_cast<double>(level);
        }
      }
      result.push_back(best * stored[block_of(n, j)]);
    }
  }
  return result;
}

training_sample sample_of(std::vector<int> tokens) {
  std::vector<char> counted(tokens.size(), 1);
  counted[0] = 0;
  return {std::move(tokens), std::move(counted)};
}

qeft::matrix_descriptor scaled_format(qeft::weak_kind weak, index_t k) {
  qeft::matrix_descriptor d;
  d.group_size = 32;
  d.zero = qeft::zero_kind::scaled;
  d.weak = weak;
  d.weak_columns = k;
  return d;
}

/// Weights of usual size, so that no softmax has a single large term.
plain_layer usual_layer(const qeft::matrix_descriptor& d, random_source& random) {
  plain_layer layer = random_layer(d, random);
  const auto half = [](float x) { return qeft::from_float<qeft::half_bits>(x).bits; };
  for (auto& s : layer.scales) s = half(static_cast<float>(0.01 + 0.005 * random.real()));
  for (auto& z : layer.zeros) z = half(static_cast<float>(-0.08 + 0.02 * random.real()));
  for (auto& w : layer.weak) w = half(static_cast<float>(0.1 * random.real()));
  return layer;
}

json small_config(const json& changes = json::object()) {
  json source = {{"hidden_size", 64},        {"intermediate_size", 96}, {"num_hidden_layers", 2},
                 {"num_attention_heads", 4}, {"head_dim", 16},          {"vocab_size", 37},
                 {"attention_bias", true},   {"mlp_bias", true}};
  source.update(changes);
  return tiny_config(source);
}

/// A small model and a method that tunes it, beside its definition: W + alpha / r * B A of every
/// adapted linear, with A's columns spread over the groups of QA-LoRA, in double.
class adapted {
 public:
  adapted(tuning_method method, std::uint64_t seed, qeft::weak_kind weak = qeft::weak_kind::none,
          index_t k = 0, const json& changes = json::object())
      : method_(method), model_(write(method, seed, weak, k, changes)), source_(path()) {
    if (method == tuning_method::qlora || method == tuning_method::platypus) quantise_reference();
    base_ = model_.tensors;
  }

  std::string path() const { return model_.directory.path().string(); }
  const model_config& config() const { return model_.config; }
  const model_source& source() const { return source_; }
  const lora_options& options() const { return options_; }

  /// With random A and B, the same in `reference`.
  tuned_model load(int threads = 2, bool zero_b = false, bool keep_tapes = false) const {
    const qeft::on_host exec(threads);
    tuned_model tuned(exec, source_.config(), reader_of(source_),
                      linears_of(method_, exec, source_.config(), options_), {false, keep_tapes});
    random_source random(11);
    for (const parameter& p : tuned.parameters()) {
      if (p.name.find("lora_B") == std::string::npos || zero_b) continue;
      for (index_t i = 0; i < p.size(); ++i) p.value[i] = static_cast<float>(0.05 * random.real());
    }
    tuned.update();
    return tuned;
  }

  void take(const std::vector<parameter>& parameters) {
    for (const parameter& p : parameters) {
      values_[p.name].assign(p.value, p.value + p.size());
    }
    for (index_t l = 0; l < config().num_hidden_layers; ++l) {
      for (const linear_kind kind : all_linears) rebuild(linear_name(l, kind));
    }
  }

  double loss(const training_sample& sample) const {
    return model_.loss(sample.tokens, sample.counted);
  }
  std::vector<int> tokens(std::size_t count) const { return model_.tokens(count); }
  const std::vector<double>& tensor(const std::string& name) const {
    return model_.tensors.at(name);
  }

  /// The derivative of the loss by a common factor of `steps` added to a parameter's elements.
  double derivative(const training_sample& sample, const parameter& p,
                    const std::vector<std::pair<std::size_t, double>>& steps) {
    std::vector<double>& v = values_.at(p.name);
    const std::vector<double> kept = v;
    const auto loss_at = [&](double h) {
      v = kept;
      for (const auto& [i, step] : steps) v[i] += h * step;
      rebuild(p.name.substr(0, p.name.find(".lora_")));
      return loss(sample);
    };
    constexpr double h = 1e-3;
    const double near = (loss_at(h) - loss_at(-h)) / (2 * h);
    const double far = (loss_at(2 * h) - loss_at(-2 * h)) / (4 * h);
    loss_at(0);
    return (4 * near - far) / 3;
  }

 private:
  static checkpoint_model write(tuning_method method, std::uint64_t seed, qeft::weak_kind weak,
                                index_t k, const json& changes) {
    const json source = small_config(changes);
    std::map<std::string, qeft::matrix_descriptor> layers;
    if (method == tuning_method::qa_lora) {
      const model_config config = parse_config(source, "small");
      for (index_t l = 0; l < config.num_hidden_layers; ++l) {
        for (const linear_kind kind : all_linears) {
          layers[linear_name(l, kind)] = scaled_format(weak, k);
        }
      }
    }
    return checkpoint_model(source, seed, layers, usual_layer);
  }

  void quantise_reference() {
    for (index_t l = 0; l < config().num_hidden_layers; ++l) {
      for (const linear_kind kind : all_linears) {
        const std::string name = linear_name(l, kind);
        const linear_shape s = shape_of(config(), kind);
        const packed_matrix m = source_.matrix(name, s.out_channels, s.in_channels);
        std::vector<float> values;
        if (method_ == tuning_method::qlora) {
          const nf4_matrix nf4(s.out_channels, s.in_channels, values_of(m));
          values.resize(at(s.out_channels * s.in_channels));
          for (index_t n = 0; n < s.out_channels; ++n) {
            nf4.decode(n, 0, s.in_channels, values.data() + n * s.in_channels);
          }
        } else {
          values = dequantized(round_to_nearest(qeft::on_host(1), m, 8, 128));
        }
        model_.tensors.at(name + ".weight").assign(values.begin(), values.end());
      }
    }
  }

  void rebuild(const std::string& name) {
    const auto found = values_.find(name + ".lora_A.weight");
    if (found == values_.end()) return;
    const std::vector<double>& a = found->second;
    const std::vector<double>& b = values_.at(name + ".lora_B.weight");
    const std::vector<double>& base = base_.at(name + ".weight");
    std::vector<double>& w = model_.tensors.at(name + ".weight");
    const auto r = at(options_.rank);
    const std::size_t rows = b.size() / r;
    const std::size_t width = a.size() / r;
    const std::size_t columns = w.size() / rows;
    std::vector<std::size_t> from(columns);
    std::vector<double> share(columns, 1.0);
    if (method_ == tuning_method::qa_lora) {
      // Ascending dense columns in groups of 32.
      const auto weak =
          qeft::io::read_linear(source_.weights().reader(), name, *source_.config().quantization)
              .weak_index;
      std::size_t dense = 0;
      for (std::size_t c = 0; c < columns; ++c) {
        const bool is_weak = std::binary_search(weak.begin(), weak.end(), static_cast<int>(c));
        from[c] = is_weak ? width : dense++ / 32;
      }
      for (std::size_t c = 0; c < columns; ++c) {
        share[c] = 1.0 / static_cast<double>(std::count(from.begin(), from.end(), from[c]));
      }
    } else {
      for (std::size_t c = 0; c < columns; ++c) from[c] = c;
    }
    for (std::size_t n = 0; n < rows; ++n) {
      for (std::size_t c = 0; c < columns; ++c) {
        double sum = 0;
        for (std::size_t i = 0; i < r && from[c] < width; ++i) {
          sum += b[n * r + i] * a[i * width + from[c]];
        }
        w[n * columns + c] =
            base[n * columns + c] + options_.alpha / static_cast<double>(r) * sum * share[c];
      }
    }
  }

  tuning_method method_;
  lora_options options_{3, 4.5, 7};
  checkpoint_model model_;
  model_source source_;
  tensor_map base_;
  std::map<std::string, std::vector<double>> values_;  // of the parameters
};

/// The largest ||gradient - finite differences|| / ||gradient|| of a parameter, estimated from some
/// elements and a random direction.
double worst_gradient(adapted& m, const std::vector<parameter>& parameters,
                      const training_sample& sample, double factor) {
  constexpr int samples = 16;
  random_source random(3);
  double worst = 0;
  for (const parameter& p : parameters) {
    double norm = 0;
    for (index_t i = 0; i < p.size(); ++i) norm += std::pow(static_cast<double>(p.gradient[i]), 2);
    INFO(p.name);
    CHECK(norm > 0);
    double difference = 0;
    for (int i = 0; i < samples; ++i) {
      const index_t e = random.integer(0, p.size() - 1);
      const double expected = factor * m.derivative(sample, p, {{at(e), 1.0}});
      difference += std::pow(static_cast<double>(p.gradient[e]) - expected, 2);
    }
    double along = 0;
    std::vector<std::pair<std::size_t, double>> direction;
    for (index_t e = 0; e < p.size(); ++e) {
      direction.emplace_back(at(e), random.real() / std::sqrt(static_cast<double>(p.size())));
      along += direction.back().second * static_cast<double>(p.gradient[e]);
    }
    const double expected = factor * m.derivative(sample, p, direction);
    const double of_elements =
        std::sqrt(difference / samples * static_cast<double>(p.size()) / norm);
    const double of_all = std::abs(along - expected) / std::sqrt(norm);
    CHECK(of_elements < 5e-6);
    CHECK(of_all < 5e-6);
    worst = std::max({worst, of_elements, of_all});
  }
  return worst;
}

std::vector<float> gradients_of(const tuned_model& model) {
  std::vector<float> all;
  for (const parameter& p : model.parameters()) {
    all.insert(all.end(), p.gradient, p.gradient + p.size());
  }
  return all;
}

}  // namespace

TEST_CASE("NF4 is what its definition says", "[llm]") {
  random_source random(1);
  const std::pair<index_t, index_t> shapes[] = {{1, 1},     {3, 63},   {5, 64},   {7, 65}, {9, 200},
                                                {300, 128}, {17, 576}, {600, 67}, {40, 1}};
  for (const auto& [rows, columns] : shapes) {
    std::vector<float> values = random_floats(rows * columns, random, 0.1);
    for (index_t n = 0; n < rows; ++n) {
      const auto size = static_cast<float>(std::exp(2 * random.real()));
      for (index_t j = 0; j < columns; ++j) values[at(n * columns + j)] *= size;
    }
    if (rows > 4) std::fill_n(values.begin() + 2 * columns, columns, 0.0F);
    const nf4_matrix m(rows, columns, values);
    const std::vector<double> expected = nf4_of(values, rows, columns);
    std::vector<float> row(at(columns));
    double worst = 0;
    for (index_t n = 0; n < rows; ++n) {
      m.decode(n, 0, columns, row.data());
      for (index_t j = 0; j < columns; ++j) {
        worst = std::max(worst,
                         std::abs(static_cast<double>(row[at(j)]) - expected[at(n * columns + j)]));
      }
      if (columns <= 64) continue;
      const std::vector<float> whole = row;
      m.decode(n, 64, columns, row.data());
      CHECK(std::equal(whole.begin() + 64, whole.end(), row.begin()));
    }
    CHECK(worst < 1e-6);
  }
  const index_t rows = 256;
  const index_t columns = 1024;
  const nf4_matrix m(rows, columns, random_floats(rows * columns, random));
  const double stated = 4 + 8.0 / 64 + 32.0 / (64 * 256);
  CHECK(m.bits_per_weight() == stated + 32.0 / static_cast<double>(rows * columns));
  CHECK_THROWS_AS(nf4_matrix(2, 2, {1.0F}), qeft::error);
}

TEST_CASE("a linear in NF4 multiplies with what it stores", "[llm]") {
  random_source random(2);
  const std::pair<index_t, index_t> shapes[] = {{5, 70}, {130, 64}, {300, 260}};
  for (const auto& [rows, columns] : shapes) {
    for (const index_t tokens : {1, 7, 70}) {
      const std::vector<float> bias = random_floats(rows, random);
      nf4_linear linear(full(rows, columns, random), bias);
      std::vector<float> w(at(rows * columns));
      for (index_t n = 0; n < rows; ++n) linear.weight().decode(n, 0, columns, &w[at(n * columns)]);
      const std::vector<float> x = random_floats(tokens * columns, random);
      const std::vector<float> dy = random_floats(tokens * rows, random);
      const std::vector<float> start = random_floats(tokens * columns, random);
      std::vector<double> y_expected;
      std::vector<double> dx_expected(start.begin(), start.end());
      for (index_t t = 0; t < tokens; ++t) {
        for (index_t n = 0; n < rows; ++n) {
          double sum = static_cast<double>(bias[at(n)]);
          for (index_t j = 0; j < columns; ++j) {
            const auto weight = static_cast<double>(w[at(n * columns + j)]);
            sum += weight * static_cast<double>(x[at(t * columns + j)]);
            dx_expected[at(t * columns + j)] += weight * static_cast<double>(dy[at(t * rows + n)]);
          }
          y_expected.push_back(sum);
        }
      }
      std::vector<float> first_y;
      std::vector<float> first_dx;
      for (const int threads : {1, 2, 3}) {
        const qeft::on_host exec(threads);
        std::vector<float> y(at(tokens * rows));
        std::vector<float> dx = start;
        linear.forward(exec, x.data(), tokens, y.data(), nullptr);
        linear.backward(exec, dy.data(), nullptr, tokens, dx.data());
        CHECK(worst_error(y, y_expected, rows) < 1e-6);
        CHECK(worst_error(dx, dx_expected, columns) < 1e-6);
        if (threads == 1) {
          first_y = y;
          first_dx = dx;
        }
        CHECK(y == first_y);
        CHECK(dx == first_dx);
      }
    }
  }
}

TEST_CASE("gradients of LoRA and its kin equal finite differences", "[llm]") {
  using qeft::weak_kind;
  struct {
    tuning_method method;
    weak_kind weak;
    index_t k;
    std::size_t parameters;
  } const cases[] = {{tuning_method::lora, weak_kind::none, 0, 28},
                     {tuning_method::qlora, weak_kind::none, 0, 28},
                     {tuning_method::platypus, weak_kind::none, 0, 12},
                     {tuning_method::qa_lora, weak_kind::none, 0, 28},
                     {tuning_method::qa_lora, weak_kind::tail, 16, 28},
                     {tuning_method::qa_lora, weak_kind::indexed, 9, 28}};
  for (const auto& c : cases) {
    INFO(to_string(c.method));
    adapted m(c.method, 5, c.weak, c.k);
    tuned_model model = m.load();
    CHECK(model.parameters().size() == c.parameters);
    m.take(model.parameters());
    const training_sample sample = sample_of(m.tokens(20));
    const double expected = m.loss(sample);
    const double loss = model.backward(sample, 0.25);
    CHECK(std::abs(loss - expected) < 1e-6 * expected);
    CHECK(model.loss(sample) == loss);
    const double worst = worst_gradient(m, model.parameters(), sample, 0.25);
    std::printf("%s: largest error of a gradient: %.2g\n", to_string(c.method), worst);
  }
}

TEST_CASE("adapted linears begin as their base, bit for bit", "[llm]") {
  for (const tuning_method method : {tuning_method::lora, tuning_method::qlora,
                                     tuning_method::platypus, tuning_method::qa_lora}) {
    INFO(to_string(method));
    const adapted m(method, 6);
    const qeft::on_host exec(2);
    const auto make = linears_of(method, exec, m.source().config(), m.options());
    for (const linear_kind kind : all_linears) {
      const std::string name = linear_name(1, kind);
      const linear_shape s = shape_of(m.config(), kind);
      const packed_matrix weight = m.source().matrix(name, s.out_channels, s.in_channels);
      random_source random(1);
      const std::vector<float> bias = random_floats(s.out_channels, random);
      const std::vector<float> x = random_floats(30 * s.in_channels, random);
      const auto y_of = [&](const tuned_linear& l) {
        std::vector<float> y(at(30 * s.out_channels));
        l.forward(exec, x.data(), 30, y.data(), nullptr);
        return y;
      };
      std::unique_ptr<tuned_linear> base;
      if (method == tuning_method::qlora) {
        base = std::make_unique<nf4_linear>(weight, bias);
      } else if (method == tuning_method::platypus) {
        base = std::make_unique<frozen>(exec, round_to_nearest(exec, weight, 8, 128), bias);
      } else {
        base = std::make_unique<frozen>(exec, weight, bias);
      }
      const auto tuned = make(name, weight, bias);
      CHECK(y_of(*tuned) == y_of(*base));
      // A is random, within its bounds, and another one in each layer and for each seed.
      std::vector<parameter> parameters;
      tuned->add_parameters("x", parameters);
      if (method == tuning_method::platypus && kind < linear_kind::gate) {
        CHECK(parameters.empty());
        CHECK(tuned->saved_channels() == 0);
        continue;
      }
      REQUIRE(parameters.size() == 2);
      const parameter& a = parameters[0];
      const parameter& b = parameters[1];
      CHECK(a.name == "x.lora_A.weight");
      CHECK(b.name == "x.lora_B.weight");
      CHECK(a.columns == (method == tuning_method::qa_lora ? s.in_channels / 32 : s.in_channels));
      CHECK(tuned->saved_channels() == a.columns + 3);
      CHECK(std::all_of(b.value, b.value + b.size(), [](float v) { return v == 0; }));
      const double bound = 1 / std::sqrt(static_cast<double>(a.columns));
      const auto [low, high] = std::minmax_element(a.value, a.value + a.size());
      CHECK(static_cast<double>(*low) >= -bound);
      CHECK(static_cast<double>(*high) <= bound);
      const auto first_of = [&](const std::string& layer, std::uint64_t seed) {
        lora_options o = m.options();
        o.seed = seed;
        std::vector<parameter> all;
        const auto other = linears_of(method, exec, m.source().config(), o)(layer, weight, bias);
        other->add_parameters("x", all);
        return all[0].value[0];
      };
      CHECK(first_of(name, 7) == a.value[0]);
      CHECK(first_of(name, 8) != a.value[0]);
      CHECK(first_of(linear_name(0, kind), 7) != a.value[0]);
    }
  }
}

TEST_CASE("gradients of LoRA and its kin depend neither on threads nor on what is kept", "[llm]") {
  for (const tuning_method method :
       {tuning_method::lora, tuning_method::qlora, tuning_method::qa_lora}) {
    const adapted m(method, 8, qeft::weak_kind::none, 0,
                    {{"max_position_embeddings", 512}, {"intermediate_size", 288}});
    const training_sample sample = sample_of(m.tokens(200));
    tuned_model one = m.load(1);
    const double loss = one.backward(sample, 0.1);
    for (const int threads : {2, 5}) {
      tuned_model model = m.load(threads, false, threads == 5);
      CHECK(model.backward(sample, 0.1) == loss);
      CHECK(gradients_of(model) == gradients_of(one));
    }
  }
}

TEST_CASE("a LoRA with impossible settings is refused", "[llm]") {
  random_source random(1);
  const packed_matrix weight = full(4, 8, random);
  const auto refused = [&](index_t rank, double alpha, const char* why) {
    return throws_with(errc::invalid_argument, {why}, [&] {
      lora(std::make_unique<nf4_linear>(weight, std::vector<float>()), "x", {rank, alpha, 0});
    });
  };
  CHECK(refused(0, 1, "rank is 0"));
  CHECK(refused(1, 0, "alpha is 0"));
  CHECK(refused(1, NAN, "alpha is nan"));
}

namespace {

/// A small full-precision model, checkpoints made of it, and a text that has something to learn.
struct workplace {
  temporary_directory dir;
  reference_model model = write_small_model(dir / "full", json::object(), 1);

  workplace() {
    write_all(dir / "data.txt", letters(900, 1));
    write_all(dir / "held.txt", letters(300, 2));
  }

  static std::string letters(int count, std::uint64_t seed) {
    random_source random(seed);
    std::string all;
    for (int i = 0; i < count; ++i) {
      all += random.chance(10) ? static_cast<char>('a' + random.integer(0, 25)) : "abc"[i % 3];
    }
    return all;
  }

  std::string path(const std::string& name) const { return (dir / name).string(); }

  void quantise(const std::string& name, qeft::zero_kind zero, index_t weak, bool reorder) const {
    quantize_options q;
    q.model = path("full");
    q.out = path(name);
    q.calibration = path("data.txt");
    q.layer.group_size = 32;
    q.layer.method = qeft::solver::layer_method::rtn;
    q.layer.zero = zero;
    q.weak_columns = weak;
    q.reorder = reorder;
    q.samples = 6;
    q.seq_len = 32;
    q.threads = 2;
    REQUIRE(run_quantize(q) == 0);
  }

  finetune_options options(tuning_method method, const std::string& base) const {
    finetune_options o;
    o.model = path(base);
    o.method = method;
    o.rank = 4;
    o.alpha = 8;
    o.data = path("data.txt");
    o.validation = path("held.txt");
    o.out = path("out");
    o.seq_len = 32;
    o.steps = 20;
    o.batch = 3;
    o.rate = 1e-2;
    o.clip = 1;
    o.eval_every = 5;
    o.checkpoint_every = 0;
    o.log = path("log");
    o.threads = 2;
    return o;
  }

  /// The validation losses of the log: of the start and of the best.
  std::pair<double, double> losses() const {
    std::vector<double> all;
    std::string rest = read_all(dir / "log");
    for (; !rest.empty(); rest.erase(0, rest.find('\n') + 1)) {
      const json line = json::parse(rest.substr(0, rest.find('\n')));
      if (line.contains("validation_loss")) all.push_back(line.at("validation_loss"));
    }
    return {all.front(), *std::min_element(all.begin(), all.end())};
  }

  /// The mean loss of a model directory on the validation data.
  double loss_of(const std::string& name) const {
    const model_source source(path(name));
    const tokenizer tok = tokenizer::from_file(path(name) + "/tokenizer.json");
    const auto held =
        training_data_reader(path(name), source.config(), tok).read(path("held.txt"), 32);
    const qeft::on_host exec(1);
    tuned_model m(exec, source.config(), reader_of(source),
                  [&](const std::string&, const packed_matrix& weight,
                      std::vector<float> bias) -> std::unique_ptr<tuned_linear> {
                    return std::make_unique<frozen>(exec, weight, std::move(bias));
                  });
    double loss = 0;
    for (const training_sample& s : held.samples) loss += m.loss(s);
    return loss / static_cast<double>(held.counted);
  }

  void merge(const std::string& model_name, const std::string& out,
             const std::vector<std::string>& adapters, const std::vector<double>& weights) const {
    merge_options m;
    m.model = path(model_name);
    m.out = path(out);
    for (const std::string& a : adapters) m.adapters.push_back(path(a));
    m.weights = weights;
    REQUIRE(run_merge(m) == 0);
  }

  std::string weights(const std::string& name) const {
    return read_all(dir / name / "model.safetensors");
  }
};

/// The 16-bit number next to x, once rounded.
double half_of(double x) {
  std::byte bits[2];
  qeft::io::store_number(qeft::io::dtype::f16, x, bits, 0);
  return qeft::io::number_at(qeft::io::dtype::f16, bits, 0);
}

}  // namespace

TEST_CASE("every method learns, and what it writes is what was trained", "[llm]") {
  const workplace w;
  w.quantise("tail", qeft::zero_kind::integer, 8, true);
  w.quantise("indexed", qeft::zero_kind::integer, 8, false);
  w.quantise("scaled", qeft::zero_kind::scaled, 0, true);
  struct {
    tuning_method method;
    const char* base;
    double fall;       // of the validation loss, at least
    double tolerance;  // of the merged model's loss; negative: its base is another one
  } const cases[] = {
      {tuning_method::qeft, "tail", 0.3, 0},         {tuning_method::owq, "indexed", 0.3, 0},
      {tuning_method::lora, "full", 0.3, 2e-4},      {tuning_method::qlora, "full", 0.3, -1},
      {tuning_method::qa_lora, "scaled", 0.3, 2e-4}, {tuning_method::platypus, "full", 0.3, -1}};
  for (const auto& c : cases) {
    INFO(to_string(c.method));
    const finetune_options o = w.options(c.method, c.base);
    REQUIRE(run_finetune(o) == 0);
    const auto [start, best] = w.losses();
    CHECK(best < start - c.fall);
    w.merge(c.base, "merged", {"out"}, {});
    const double merged = w.loss_of("merged");
    std::printf("%s: validation loss from %.4f to %.4f, merged %.4f\n", to_string(c.method), start,
                best, merged);
    if (c.tolerance >= 0) {
      CHECK(std::abs(merged - best) <= c.tolerance);
    } else {
      CHECK(merged < start - c.fall);
    }
    run_unmerge({w.path("merged"), w.path("back")});
    CHECK(w.weights("back") == w.weights(c.base));
    for (const char* name : {"out", "merged", "back"}) fs::remove_all(w.dir / name);
  }
}

TEST_CASE("merging LoRA rounds W + sum of weight alpha / r B A once", "[llm]") {
  const workplace w;
  std::vector<lora_adapter> adapters;
  for (const auto method : {tuning_method::lora, tuning_method::platypus}) {
    finetune_options o = w.options(method, "full");
    o.out = w.path(to_string(method));
    o.steps = 3;
    REQUIRE(run_finetune(o) == 0);
    adapters.push_back(read_lora_adapter(o.out));
  }
  CHECK(adapters[0].linears.size() == 14);
  CHECK(adapters[1].linears.size() == 6);
  CHECK(adapters[0].rank == 4);
  CHECK(adapters[0].alpha == 8);
  CHECK_FALSE(adapters[0].groupwise);
  const std::vector<double> weights = {0.75, -0.5};
  w.merge("full", "merged", {"lora", "platypus"}, weights);
  const hf_weights merged(w.dir / "merged");
  for (const tensor_spec& t : expected_tensors(w.model.config)) {
    std::vector<double> expected = w.model.tensors.at(t.name);
    const std::string name = t.name.substr(0, t.name.rfind(".weight"));
    for (std::size_t i = 0; i < expected.size(); ++i) {
      bool changed = false;
      double sum = expected[i];
      for (std::size_t a = 0; a < 2; ++a) {
        const auto found = adapters[a].linears.find(name);
        if (found == adapters[a].linears.end()) continue;
        const std::size_t columns = at(t.shape[1]);
        double delta = 0;
        for (std::size_t r = 0; r < 4; ++r) {
          delta += static_cast<double>(found->second.b[i / columns * 4 + r]) *
                   static_cast<double>(found->second.a[r * columns + i % columns]);
        }
        sum += weights[a] * 8 / 4 * delta;
        changed = true;
      }
      if (changed) expected[i] = half_of(sum);
    }
    const std::vector<float> found = merged.read(t.name, t.shape);
    index_t different = 0;  // a sum in another order may round the other way
    for (std::size_t i = 0; i < found.size(); ++i) {
      if (static_cast<double>(found[i]) == expected[i]) continue;
      ++different;
      CHECK(std::abs(static_cast<double>(found[i]) - expected[i]) < 2e-3 * std::abs(expected[i]));
    }
    CHECK(different <= 1);
  }
}

TEST_CASE("merging QA-LoRA changes scaled zero points, and these exactly", "[llm]") {
  const workplace w;
  w.quantise("scaled", qeft::zero_kind::scaled, 8, true);
  finetune_options o = w.options(tuning_method::qa_lora, "scaled");
  o.steps = 4;
  REQUIRE(run_finetune(o) == 0);
  const lora_adapter adapter = read_lora_adapter(o.out);
  CHECK(adapter.groupwise);
  CHECK(adapter.linears.size() == 14);
  w.merge("scaled", "merged", {"out"}, {});
  const qeft::io::safetensors_reader before(w.dir / "scaled");
  const qeft::io::safetensors_reader after(w.dir / "merged");
  index_t changed = 0;
  for (const std::string& name : before.names()) {
    const auto& a = before.at(name);
    const auto& b = after.at(name);
    if (std::equal(a.data.begin(), a.data.end(), b.data.begin())) continue;
    ++changed;
    const std::string linear = name.substr(0, name.rfind('.'));
    REQUIRE(name == linear + ".zeros");
    const lora_linear& l = adapter.linears.at(linear);
    const index_t dense =
        model_source(w.path("scaled")).config().quantization->find(linear)->dense_columns();
    for (index_t i = 0; i < a.elements(); ++i) {
      const index_t g = i % l.width;
      double delta = 0;
      for (index_t r = 0; r < 4; ++r) {
        delta += static_cast<double>(l.b[at(i / l.width * 4 + r)]) *
                 static_cast<double>(l.a[at(r * l.width + g)]);
      }
      const double size = static_cast<double>(std::min<index_t>(32, dense - 32 * g));
      const double exact = qeft::io::number_at(a.type, a.data.data(), i) + 8.0 / 4 * delta / size;
      const double stored = qeft::io::number_at(b.type, b.data.data(), i);
      CHECK(std::abs(stored - exact) <= std::abs(exact) * 0x1p-11 + 0x1p-25);
    }
  }
  CHECK(changed == 14);
}

TEST_CASE("a file of LoRA keeps every bit, and damage is found", "[llm]") {
  const temporary_directory dir;
  random_source random(4);
  lora_adapter a{true, 2, 0.1, "base", "a small one", {}};
  a.linears["model.layers.0.mlp.up_proj"] = {3, 5, random_floats(10, random),
                                             random_floats(6, random)};
  a.linears["model.layers.1.mlp.up_proj"] = {7, 2, random_floats(4, random),
                                             random_floats(14, random)};
  const fs::path file = dir / "adapter";
  write_lora_adapter(file, a);
  CHECK(is_lora_adapter(file));
  const lora_adapter b = read_lora_adapter(file);
  CHECK(b.groupwise);
  CHECK(b.rank == a.rank);
  CHECK(b.alpha == a.alpha);
  CHECK(b.base == a.base);
  CHECK(b.architecture == a.architecture);
  REQUIRE(b.linears.size() == 2);
  for (const auto& [name, l] : a.linears) {
    CHECK(b.linears.at(name).a == l.a);
    CHECK(b.linears.at(name).b == l.b);
    CHECK(b.linears.at(name).width == l.width);
    CHECK(b.linears.at(name).out_channels == l.out_channels);
  }
  const qeft::io::safetensors_reader reader(file);
  CHECK(reader.contains("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"));
  CHECK(reader.contains("base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"));
  CHECK(reader.files().front().metadata().at("r") == "2");
  CHECK(reader.files().front().metadata().at("lora_alpha") == "0.1");

  std::string bytes = read_all(file);
  bytes[bytes.size() - 3] ^= 4;
  write_all(file, bytes);
  CHECK(throws_with(errc::corrupt_file, {"adapter", "damaged"}, [&] { read_lora_adapter(file); }));
  a.linears.begin()->second.b[2] = NAN;
  CHECK(throws_with(errc::not_finite, {"layers.0.mlp.up_proj.lora_B"},
                    [&] { write_lora_adapter(dir / "other", a); }));
  CHECK_FALSE(fs::exists(dir / "other"));

  // Written by someone else.
  const auto refused = [&](const std::map<std::string, std::string>& changes,
                           const std::vector<std::string>& names, const char* why) {
    std::map<std::string, std::string> metadata = {
        {"format", "qeft.lora"}, {"format_version", "1"}, {"r", "2"},           {"lora_alpha", "1"},
        {"groupwise", "false"},  {"base", "b"},           {"architecture", "c"}};
    for (const auto& [key, value] : changes) metadata[key] = value;
    qeft::io::safetensors_writer writer(metadata);
    const std::vector<float> values(4, 1.0F);
    for (const std::string& name : names) {
      writer.add(name, qeft::io::dtype::f32, {2, 2}, qeft::io::as_bytes(values));
    }
    writer.write(file);
    try {
      read_lora_adapter(file);
    } catch (const qeft::error& e) {
      return mentions(e.what(), {why});
    }
    return false;
  };
  const std::string x = "base_model.model.x.lora_";
  CHECK(refused({{"r", "0"}}, {}, "r"));
  CHECK(refused({{"r", "3"}}, {x + "A.weight", x + "B.weight"}, "[3, 2]"));
  CHECK(refused({{"lora_alpha", "-1"}}, {}, "lora_alpha is -1"));
  CHECK(refused({{"format_version", "2"}}, {}, "qeft.lora and 2"));
  CHECK(refused({}, {x + "A.weight"}, "lora_B"));
  CHECK(refused({}, {x + "B.weight"}, "has no lora_A"));
  CHECK(refused({}, {"y"}, "'y'"));
}

TEST_CASE("models and adapters that do not fit a method are refused", "[llm]") {
  const workplace w;
  w.quantise("tail", qeft::zero_kind::integer, 8, true);
  w.quantise("scaled", qeft::zero_kind::scaled, 0, true);
  w.quantise("other", qeft::zero_kind::scaled, 8, true);
  const auto refused = [&](tuning_method method, const char* base,
                           std::initializer_list<const char*> why, auto change) {
    finetune_options o = w.options(method, base);
    change(o);
    return throws_with(errc::invalid_argument, why, [&] { run_finetune(o); }) &&
           !fs::exists(w.dir / "out");
  };
  const auto as_is = [](finetune_options&) {};
  CHECK(refused(tuning_method::lora, "tail", {"--method lora", "full precision"}, as_is));
  CHECK(refused(tuning_method::qlora, "tail", {"--method qlora", "full precision"}, as_is));
  CHECK(refused(tuning_method::platypus, "tail", {"--method platypus"}, as_is));
  CHECK(refused(tuning_method::qeft, "full", {"not quantised", "--method qeft"}, as_is));
  CHECK(refused(tuning_method::owq, "tail", {"kind tail", "--reorder off"}, as_is));
  CHECK(refused(tuning_method::qa_lora, "tail", {"kind integer", "--zero scaled"}, as_is));
  CHECK(refused(tuning_method::qa_lora, "full", {"not quantised"}, as_is));
  CHECK(refused(tuning_method::lora, "full", {"--rank is 0"}, [](auto& o) { o.rank = 0; }));
  CHECK(refused(tuning_method::lora, "full", {"--alpha is 0"}, [](auto& o) { o.alpha = 0; }));
  CHECK(refused(tuning_method::lora, "full", {"--weak-dropout is 0.5"},
                [](auto& o) { o.weak_dropout = 0.5; }));

  const auto make = [&](tuning_method method, const char* base, const char* out) {
    finetune_options o = w.options(method, base);
    o.out = w.path(out);
    o.steps = 1;
    REQUIRE(run_finetune(o) == 0);
  };
  make(tuning_method::lora, "full", "a_lora");
  make(tuning_method::qa_lora, "scaled", "a_qa");
  make(tuning_method::qa_lora, "other", "a_other");
  make(tuning_method::qeft, "other", "a_weak");
  const auto merge_refused = [&](const char* base, const std::vector<std::string>& adapters,
                                 std::initializer_list<const char*> why) {
    merge_options m;
    m.model = w.path(base);
    m.out = w.path("merged");
    for (const std::string& a : adapters) m.adapters.push_back(w.path(a));
    return throws_with(errc::invalid_argument, why, [&] { run_merge(m); }) &&
           !fs::exists(w.dir / "merged");
  };
  CHECK(merge_refused("tail", {"a_lora"}, {"of LoRA, for a model in full precision"}));
  CHECK(merge_refused("full", {"a_qa"}, {"of QA-LoRA, for the quantised model"}));
  CHECK(merge_refused("other", {"a_qa"}, {"fits no other model"}));
  CHECK(merge_refused("other", {"a_other", "a_weak"}, {"must be of one kind"}));
  // On a full-precision model weak columns and LoRA add up.
  w.merge("full", "merged", {"a_weak", "a_lora"}, {});
}

TEST_CASE("a LoRA run goes on where it was, to the same bytes", "[llm]") {
  const workplace w;
  finetune_options o = w.options(tuning_method::qlora, "full");
  o.steps = 6;
  o.checkpoint_every = 1;
  REQUIRE(run_finetune(o) == 0);
  const std::string expected = read_all(o.out);
  fs::remove(o.out);
  struct interruption {};
  o.after_step = [](index_t step) {
    if (step == 3) throw interruption();
  };
  CHECK_THROWS_AS(run_finetune(o), interruption);
  o.after_step = {};
  finetune_options other = o;
  other.rank = 5;
  CHECK(throws_with(errc::invalid_argument, {"another --rank", "4 there", "5 here"},
                    [&] { run_finetune(other); }));
  other = o;
  other.method = tuning_method::lora;
  CHECK(throws_with(errc::invalid_argument, {"another --method"}, [&] { run_finetune(other); }));
  o.threads = 1;
  REQUIRE(run_finetune(o) == 0);
  CHECK(read_all(o.out) == expected);
}

TEST_CASE("the command says what a method trains and keeps", "[llm]") {
  const workplace w;
  const std::string command =
      "exec 2>/dev/null; '" QEFT_LLM "' finetune --model '" + w.path("full") + "' --data '" +
      w.path("data.txt") + "' --out '" + w.path("out") +
      "' --method platypus --rank 5 --alpha 7 --seq-len 32 --steps 1 --batch 1 --threads 1 --json";
  std::FILE* pipe = ::popen(command.c_str(), "r");
  REQUIRE(pipe != nullptr);
  std::string text;
  char buffer[4096];
  while (const std::size_t n = std::fread(buffer, 1, sizeof buffer, pipe)) text.append(buffer, n);
  CHECK(::pclose(pipe) == 0);
  text.pop_back();
  const json result = json::parse(text.substr(text.rfind('\n') + 1));
  CHECK(result.at("method") == "platypus");
  // Two blocks of gate, up and down, between 96 and 160 channels.
  CHECK(result.at("parameters") == 2 * 3 * 5 * (96 + 160));
  CHECK(result.at("saved_bytes_per_token") == 2 * 4 * (2 * (96 + 5) + 160 + 5));
  CHECK(result.at("optimiser_bytes") == 8 * 2 * 3 * 5 * (96 + 160));
  const lora_adapter a = read_lora_adapter(w.dir / "out");
  CHECK(a.rank == 5);
  CHECK(a.alpha == 7);
}
