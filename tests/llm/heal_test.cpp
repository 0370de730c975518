// SPDX-License-Identifier: Apache-2.0
// Healing: its loss and gradients against a forward pass in double, and the command from the text
// to the healed checkpoint, also killed, gone on with, and refused.
#include "heal.hpp"

#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstring>

#include "divergence.hpp"
#include "healing.hpp"
#include "qeft/io/adapter.hpp"
#include "quantize.hpp"
#include "support/catch.hpp"
#include "support/throws.hpp"
#include "text_windows.hpp"
#include "tokenizer.hpp"
#include "tuned_case.hpp"

namespace {

namespace fs = std::filesystem;
namespace io = qeft::io;
using namespace qeft_llm;
using namespace qeft_test;
using nlohmann::json;
using qeft::errc;
using qeft::index_t;
using qeft::weak_kind;
using qeft::zero_kind;

using texts = std::vector<std::string>;

/// Stores the norms in F32, as quantize writes them. @return the model's directory
fs::path with_f32_norms(const checkpoint_model& m) {
  const io::safetensors_reader reader(m.directory.path());
  io::safetensors_writer writer;
  std::map<std::string, std::vector<float>> norms;
  for (const std::string& name : reader.names()) {
    const io::tensor_view& t = reader.at(name);
    if (t.shape.size() == 1 && t.type == io::dtype::f16) {
      norms[name] = io::to_floats(t);
      writer.add(name, io::dtype::f32, t.shape, io::as_bytes(norms[name]));
    } else {
      writer.add(name, t.type, t.shape, t.data);
    }
  }
  const auto& metadata = reader.files().front().metadata();
  for (const auto& [key, value] : metadata) {
    if (key != io::checksum_key) writer.set_metadata(key, value);
  }
  writer.write(m.directory / "other");
  fs::rename(m.directory / "other", m.directory / "model.safetensors");
  return m.directory.path();
}

/// A quantised model, the one to heal it towards, and a sample.
struct healing_case {
  checkpoint_model quantised;
  checkpoint_model full;
  training_sample sample;
  model_source source{with_f32_norms(quantised)};
  model_source reference{full.directory.path()};

  healing_case(const tuned_case& c, std::uint64_t seed)
      : quantised(c.write(seed)),
        full(full_config(), seed + 1),
        sample(masked_sample(quantised.tokens(c.tokens))) {}

  json full_config() const {
    json of_quantised = json::parse(read_all(quantised.directory / "config.json"));
    of_quantised.erase("quantization_config");
    return of_quantised;
  }

  healed_model load(int threads = 2, const healed_parts& parts = {}) const {
    return {qeft::on_host(threads), source, reference, parts};
  }

  /// Sum of KL(full || quantised) of the counted tokens, by its definition.
  double divergence() const {
    const std::vector<double> p = full.logits(sample.tokens);
    const std::vector<double> q = quantised.logits(sample.tokens);
    const auto vocabulary = static_cast<std::size_t>(full.config.vocab_size);
    const auto log_sum = [&](const double* x) {
      double sum = 0;
      for (std::size_t v = 0; v < vocabulary; ++v) sum += std::exp(x[v]);
      return std::log(sum);
    };
    double total = 0;
    for (std::size_t t = 1; t < sample.tokens.size(); ++t) {
      if (sample.counted[t] == 0) continue;
      const double* from = p.data() + (t - 1) * vocabulary;
      const double* to = q.data() + (t - 1) * vocabulary;
      const double from_norm = log_sum(from);
      const double to_norm = log_sum(to);
      for (std::size_t v = 0; v < vocabulary; ++v) {
        const double log_p = from[v] - from_norm;
        total += std::exp(log_p) * (log_p - (to[v] - to_norm));
      }
    }
    return total;
  }
};

/// What an element of a parameter changes: numbers of the reference's tensors, and how far each
/// moves with it.
struct place {
  std::vector<double*> at;
  std::vector<double> step;
};

/// Places of a parameter: factors move what they multiply by itself.
std::vector<place> places_of(checkpoint_model& m, const parameter& p) {
  std::vector<place> all;
  if (p.rows == 1) {
    for (double& x : m.tensors.at(p.name)) all.push_back({{&x}, {x}});
    return all;
  }
  const std::string name = p.name.substr(0, p.name.rfind('.'));
  const model_source source(m.directory.path());
  const qeft::matrix_descriptor& d = *source.config().quantization->find(name);
  const std::vector<std::int32_t> weak =
      io::read_linear(source.weights().reader(), name, d).weak_index;
  std::vector<std::int32_t> dense;
  for (std::int32_t c = 0; c < d.in_channels; ++c) {
    if (!std::binary_search(weak.begin(), weak.end(), c)) dense.push_back(c);
  }
  std::vector<double>& weight = m.tensors.at(name + ".weight");
  const auto element = [&](index_t n, std::int32_t c) {
    return &weight[static_cast<std::size_t>(n * d.in_channels + c)];
  };
  const bool scales = p.name.substr(p.name.rfind('.')) == ".scales";
  for (index_t n = 0; n < p.rows; ++n) {
    for (index_t i = 0; i < p.columns; ++i) {
      place to;
      if (!scales) to = {{element(n, weak[static_cast<std::size_t>(i)])}, {1.0}};
      for (std::size_t j = 0; scales && j < dense.size(); ++j) {
        if (static_cast<index_t>(j) / d.group_size != i) continue;
        to.at.push_back(element(n, dense[j]));
        to.step.push_back(*to.at.back());
      }
      all.push_back(to);
    }
  }
  return all;
}

/// The derivative of the divergence along some places, to fourth order.
double derivative(const healing_case& c, const place& along) {
  std::vector<double> kept;
  for (const double* x : along.at) kept.push_back(*x);
  const auto at = [&](double h) {
    for (std::size_t i = 0; i < kept.size(); ++i) *along.at[i] = kept[i] + h * along.step[i];
    return c.divergence();
  };
  constexpr double h = 1e-3;
  const double near = (at(h) - at(-h)) / (2 * h);
  const double far = (at(2 * h) - at(-2 * h)) / (4 * h);
  at(0);
  return (4 * near - far) / 3;
}

std::vector<float> gradients_of(const healed_model& model) {
  std::vector<float> all;
  for (const parameter& p : model.parameters()) {
    all.insert(all.end(), p.gradient, p.gradient + p.size());
  }
  return all;
}

qeft::matrix_descriptor with_zeros(qeft::matrix_descriptor d, zero_kind zero) {
  d.zero = zero;
  return d;
}

}  // namespace

TEST_CASE("the divergence and its gradient are those of their definition", "[llm]") {
  random_source random(1);
  for (const double size : {0.01, 1.0, 30.0, 300.0}) {
    constexpr index_t vocabulary = 301;
    std::vector<float> p(vocabulary);
    std::vector<float> q(vocabulary);
    for (float& x : p) x = static_cast<float>(size * random.real());
    for (std::size_t v = 0; v < q.size(); ++v) {
      q[v] = p[v] + static_cast<float>(0.3 * random.real());
    }
    const double expected = kl_divergence(p.data(), q.data(), vocabulary);
    const double p_norm = log_sum_exp(p.data(), vocabulary);
    const double q_norm = log_sum_exp(q.data(), vocabulary);
    std::vector<float> spent = p;
    std::vector<float> gradient = q;
    CHECK(std::abs(divergence_gradient(spent.data(), gradient.data(), vocabulary) - expected) <
          1e-7);
    double worst = 0;
    for (std::size_t v = 0; v < q.size(); ++v) {
      const double of_q = std::exp(static_cast<double>(q[v]) - q_norm);
      const double of_p = std::exp(static_cast<double>(p[v]) - p_norm);
      worst = std::max(worst, std::abs(static_cast<double>(gradient[v]) - (of_q - of_p)));
    }
    CHECK(worst < 1e-7);
    spent = p;
    gradient = p;
    CHECK(divergence_gradient(spent.data(), gradient.data(), vocabulary) == 0);
    CHECK(gradient == std::vector<float>(p.size()));
  }
}

TEST_CASE("gradients of weak columns, scales and norms equal finite differences", "[llm]") {
  qeft::matrix_descriptor bf16 = format(4, weak_kind::tail, 16);
  bf16.scalar = qeft::scalar_kind::bf16;
  // Dense columns 48 (or 80) of groups of 32: the last group is ragged.
  const tuned_case cases[] = {
      {"tail, integer zeros", json::object(), format(4, weak_kind::tail, 16)},
      {"indexed, scaled zeros",
       {{"attention_bias", true}},
       with_zeros(format(3, weak_kind::indexed, 16), zero_kind::scaled)},
      {"per head, symmetric",
       {{"tie_word_embeddings", false}},
       with_zeros(format(8, weak_kind::per_head, 16, 4), zero_kind::symmetric)},
      {"no weak columns",
       {{"num_hidden_layers", 1}},
       with_zeros(format(2, weak_kind::none, 0), zero_kind::scaled)},
      {"bf16", {{"num_hidden_layers", 1}}, bf16},
  };
  double worst = 0;
  for (const tuned_case& c : cases) {
    INFO(c.name);
    healing_case h(c, 6);
    healed_model model = h.load();
    const double expected = h.divergence();
    CHECK(std::abs(model.backward(h.sample, 0.25) - expected) < 1e-6 * expected);
    CHECK(model.loss(h.sample) == model.backward(h.sample, 0));
    random_source random(3);
    for (const parameter& p : model.parameters()) {
      INFO(p.name);
      const std::vector<place> places = places_of(h.quantised, p);
      REQUIRE(static_cast<index_t>(places.size()) == p.size());
      constexpr int samples = 12;
      double difference = 0;
      for (int i = 0; i < samples; ++i) {
        const auto e = static_cast<std::size_t>(random.integer(0, p.size() - 1));
        const double of_element = 0.25 * derivative(h, places[e]);
        difference += std::pow(static_cast<double>(p.gradient[e]) - of_element, 2);
      }
      place direction;
      double along = 0;
      double norm = 0;
      for (std::size_t e = 0; e < places.size(); ++e) {
        const double by = random.real() / std::sqrt(static_cast<double>(places.size()));
        along += by * static_cast<double>(p.gradient[e]);
        norm += static_cast<double>(p.gradient[e]) * static_cast<double>(p.gradient[e]);
        for (std::size_t i = 0; i < places[e].at.size(); ++i) {
          direction.at.push_back(places[e].at[i]);
          direction.step.push_back(by * places[e].step[i]);
        }
      }
      CHECK(norm > 0);
      const double of_elements =
          std::sqrt(difference / samples * static_cast<double>(places.size()) / norm);
      const double of_all = std::abs(along - 0.25 * derivative(h, direction)) / std::sqrt(norm);
      CHECK(of_elements < 2e-6);
      CHECK(of_all < 2e-6);
      worst = std::max({worst, of_elements, of_all});
    }
  }
  std::printf("largest error of a gradient: %.2g\n", worst);
}

TEST_CASE("a model is not apart from itself", "[llm]") {
  healing_case h({"", {{"max_position_embeddings", 512}}, format(4, weak_kind::indexed, 16), 300},
                 2);
  healed_model model(qeft::on_host(2), h.source, h.source);
  CHECK(model.backward(h.sample, 1.0) == 0);
  const std::vector<float> gradients = gradients_of(model);
  CHECK(std::all_of(gradients.begin(), gradients.end(), [](float x) { return x == 0; }));
}

TEST_CASE("threads change nothing", "[llm]") {
  healing_case h({"",
                  {{"max_position_embeddings", 512}},
                  with_zeros(format(3, weak_kind::tail, 16), zero_kind::scaled),
                  300},
                 3);
  healed_model one = h.load(1);
  const double loss = one.backward(h.sample, 0.1);
  for (const int threads : {2, 5}) {
    healed_model model = h.load(threads);
    CHECK(model.backward(h.sample, 0.1) == loss);
    CHECK(gradients_of(model) == gradients_of(one));
  }
}

TEST_CASE("only what is asked for is trained, each at its rate", "[llm]") {
  healing_case h({"", json::object(), format(4, weak_kind::tail, 16)}, 4);
  const auto count = [&](bool weak, bool scales, bool norms) {
    return h.load(1, {{weak, scales}, norms, 2, 3}).parameters().size();
  };
  CHECK(count(true, true, true) == 14 + 14 + 5);
  CHECK(count(true, false, false) == 14);
  CHECK(count(false, true, false) == 14);
  CHECK(count(false, false, true) == 5);
  const healed_model model = h.load(1, {{true, true}, true, 2, 3});
  const auto& all = model.parameters();
  CHECK(all[0].name == "model.layers.0.self_attn.q_proj.weak");
  CHECK(all[0].rate_factor == 1);
  CHECK(all[1].name == "model.layers.0.self_attn.q_proj.scales");
  CHECK(all[1].rate_factor == 2);
  CHECK(all.back().name == "model.norm.weight");
  CHECK(all.back().rate_factor == 3);
}

TEST_CASE("rates are such that gradients of single samples weigh alike", "[llm]") {
  healing_case h({"", json::object(), format(4, weak_kind::tail, 16)}, 4);
  healed_model model = h.load(2, {{true, true}, true, 2, 3});
  const double loss = model.loss(h.sample);
  model.calibrate({h.sample});
  CHECK(model.loss(h.sample) == loss);
  CHECK(gradients_of(model) == std::vector<float>(gradients_of(model).size()));
  const auto counted = static_cast<double>(std::count_if(
      h.sample.counted.begin(), h.sample.counted.end(), [](char c) { return c != 0; }));
  model.backward(h.sample, 1 / counted);
  double all = 0;
  for (const parameter& p : model.parameters()) all += static_cast<double>(p.size());
  const double expected = loss / counted / all;
  for (const parameter& p : model.parameters()) {
    const bool weak = p.name.substr(p.name.rfind('.')) == ".weak";
    const bool scales = p.name.substr(p.name.rfind('.')) == ".scales";
    std::vector<double> squares(static_cast<std::size_t>(p.columns));
    for (index_t i = 0; i < p.size(); ++i) {
      const auto g = static_cast<double>(p.gradient[i]);
      squares[static_cast<std::size_t>(i % p.columns)] += g * g;
    }
    INFO(p.name);
    if (weak) {  // each column by its unit
      CHECK(p.rate_factor == 1);
      for (const double square : squares) {
        CHECK(std::abs(std::sqrt(square / static_cast<double>(p.rows)) - expected) <
              1e-5 * expected);
      }
      continue;
    }
    double sum = 0;
    for (const double square : squares) sum += square;
    const double root = std::sqrt(sum / static_cast<double>(p.size()));
    CHECK(std::abs(p.rate_factor * root / (scales ? 2 : 3) - expected) < 1e-5 * expected);
  }
}

TEST_CASE("what 16 bits do not hold is refused by name, and so are norms of another type",
          "[llm]") {
  healing_case h(
      {"", json::object(), with_zeros(format(4, weak_kind::tail, 16), zero_kind::scaled)}, 5);
  healed_model model = h.load();
  const double loss = model.loss(h.sample);
  const auto refused = [&](const char* end, std::initializer_list<const char*> why) {
    for (const parameter& p : model.parameters()) {
      if (p.name != std::string("model.layers.1.mlp.up_proj.") + end) continue;
      const float kept = std::exchange(p.value[5], 1e9F);
      const bool good = throws_with(errc::not_finite, why, [&] { model.update(); });
      p.value[5] = kept;
      return good && model.loss(h.sample) == loss;
    }
    return false;
  };
  CHECK(refused("scales", {"model.layers.1.mlp.up_proj", "row 2, group 1", "scale"}));
  CHECK(refused("weak", {"model.layers.1.mlp.up_proj", "weak column 5"}));
  const checkpoint_model f16 =
      tuned_case{"", json::object(), format(4, weak_kind::tail, 16)}.write(1);
  const model_source source(f16.directory.path());
  CHECK(throws_with(errc::unsupported, {"layernorm.weight is F16", "must be F32"},
                    [&] { healed_model(qeft::on_host(1), source, h.reference); }));
}

namespace {

/// A small model with layers of RTN, and a text.
struct workplace {
  temporary_directory dir;
  reference_model model = write_small_model(dir / "full", json::object(), 1);

  explicit workplace(zero_kind zero = zero_kind::integer) {
    write_all(dir / "text.txt", letters(2400, 1));
    quantize_options q;
    q.model = path("full");
    q.out = path("model");
    q.calibration = path("text.txt");
    q.layer.bits = 3;
    q.layer.group_size = 32;
    q.layer.zero = zero;
    q.layer.method = qeft::solver::layer_method::rtn;
    q.weak_columns = 8;
    q.samples = 6;
    q.seq_len = 32;
    q.threads = 2;
    REQUIRE(run_quantize(q) == 0);
  }

  static std::string letters(int count, std::uint64_t seed) {
    random_source random(seed);
    std::string all;
    for (int i = 0; i < count; ++i) all += static_cast<char>('a' + random.integer(0, 25));
    return all;
  }

  std::string path(const std::string& name) const { return (dir / name).string(); }

  heal_options options() const {
    heal_options o;
    o.model = path("model");
    o.reference = path("full");
    o.text = path("text.txt");
    o.out = path("out");
    o.seq_len = 32;
    o.steps = 6;
    o.batch = 3;
    o.rate = 0.5;
    o.scale_rate = 0.6;
    o.norm_rate = 0.5;
    o.warmup = 1;
    o.validation_windows = 4;
    o.eval_every = 2;
    o.checkpoint_every = 1;
    o.log = path("log");
    o.threads = 2;
    return o;
  }

  std::vector<json> log() const {
    std::vector<json> lines;
    std::string rest = read_all(dir / "log");
    while (!rest.empty()) {
      lines.push_back(json::parse(rest.substr(0, rest.find('\n'))));
      lines.back().erase("tokens_per_second");
      rest.erase(0, rest.find('\n') + 1);
    }
    return lines;
  }

  /// KL per token of a model on the windows that these options validate with.
  double divergence_of(const std::string& checkpoint, const heal_options& o) const {
    const tokenizer tok = tokenizer::from_file(o.model + "/tokenizer.json");
    auto windows = text_windows(tok, o.text, o.seq_len, 1);
    const auto wanted =
        std::min(static_cast<index_t>(windows.size()), o.validation_windows + o.steps * o.batch);
    windows = draw_windows(std::move(windows), wanted, o.seed);
    windows.resize(static_cast<std::size_t>(o.validation_windows));
    const model_source source(checkpoint);
    const model_source full(o.reference);
    healed_model healed(qeft::on_host(1), source, full);
    double sum = 0;
    double counted = 0;
    for (const std::vector<int>& w : windows) {
      const training_sample s = sample_of(w);
      sum += healed.loss(s);
      counted += static_cast<double>(w.size() - 1);
    }
    return sum / counted;
  }

  /// Whether it ends with this error and leaves nothing new.
  bool refused(const heal_options& o, errc code, std::initializer_list<const char*> why) const {
    const auto others = [&] {
      texts names = dir.files();
      names.erase(std::remove(names.begin(), names.end(), "log"), names.end());
      return names;
    };
    const texts before = others();
    const bool good = throws_with(code, why, [&] { run_heal(o); });
    return good && others() == before;
  }
};

std::string model_bytes(const fs::path& directory) {
  return read_all(directory / "model.safetensors") + read_all(directory / "config.json");
}

/// Runs in a process that is killed: behind a step or, without one, after a while.
void run_and_die(heal_options o, index_t step, unsigned microseconds = 0) {
  const ::pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    o.after_step = [&](index_t done) {
      if (done == step) ::kill(::getpid(), SIGKILL);
    };
    try {
      run_heal(o);
    } catch (const std::exception& e) {
      std::fprintf(stderr, "in the child: %s\n", e.what());
    }
    ::_exit(0);
  }
  if (step == 0) {
    ::usleep(microseconds);
    ::kill(child, SIGKILL);
  }
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  if (step > 0) REQUIRE((WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL));
}

}  // namespace

TEST_CASE("healing brings a model closer, and its checkpoint has the training's divergence") {
  for (const zero_kind zero : {zero_kind::integer, zero_kind::scaled, zero_kind::symmetric}) {
    const workplace w(zero);
    heal_options o = w.options();
    o.steps = 40;
    REQUIRE(run_heal(o) == 0);
    CHECK(w.dir.files() == texts{"full", "log", "model", "out", "text.txt"});
    const auto log = w.log();
    REQUIRE(log.size() == 41);
    const auto before = log.front().at("validation_loss").get<double>();
    double best = before;
    for (const json& line : log) best = std::min(best, line.value("validation_loss", best));
    CHECK(best < 0.8 * before);
    CHECK(w.divergence_of(o.model, o) == before);
    CHECK(w.divergence_of(o.out, o) == best);

    // The rest is as it was.
    const io::safetensors_reader from(o.model);
    const io::safetensors_reader to(o.out);
    CHECK(from.names() == to.names());
    for (const std::string& name : from.names()) {
      const io::tensor_view& a = from.at(name);
      const io::tensor_view& b = to.at(name);
      INFO(name);
      REQUIRE((a.type == b.type && a.shape == b.shape && a.data.size() == b.data.size()));
      const bool same =
          std::memcmp(a.data.data(), b.data.data(), static_cast<std::size_t>(a.data.size())) == 0;
      const auto ends = [&](const char* end) {
        return name.size() > std::strlen(end) &&
               name.compare(name.size() - std::strlen(end), std::string::npos, end) == 0;
      };
      const bool healed = ends(".weak") || ends(".scales") || ends("norm.weight") ||
                          (zero == zero_kind::scaled && ends(".zeros"));
      CHECK(same == !healed);
    }
    json config = json::parse(read_all(fs::path(o.out) / "config.json"));
    json& provenance = config.at("quantization_config").at("provenance");
    CHECK(provenance.at("heal").at("kl") == best);
    CHECK(provenance.at("heal").at("base") == io::weights_fingerprint(from));
    provenance.erase("heal");
    CHECK(config == json::parse(read_all(fs::path(o.model) / "config.json")));
    CHECK(read_all(fs::path(o.out) / "tokenizer.json") ==
          read_all(fs::path(o.model) / "tokenizer.json"));
  }
}

TEST_CASE("parts that are not trained stay") {
  const workplace w;
  heal_options o = w.options();
  o.validation_windows = 0;  // the last are taken
  const char* const ends[] = {".weak", ".scales", "norm.weight"};
  const char* const parts[] = {"weak", "scales", "norms"};
  for (int i = 0; i < 3; ++i) {
    o.train = {parts[i]};
    REQUIRE(run_heal(o) == 0);
    const io::safetensors_reader from(o.model);
    const io::safetensors_reader to(o.out);
    for (const std::string& name : from.names()) {
      const std::string end = ends[i];
      const bool trained =
          name.size() > end.size() && name.compare(name.size() - end.size(), end.size(), end) == 0;
      INFO(name);
      const auto bytes = [&](const io::safetensors_reader& reader) {
        const auto& data = reader.at(name).data;
        return std::vector<std::byte>(data.begin(), data.end());
      };
      CHECK((bytes(from) == bytes(to)) == !trained);
    }
    fs::remove_all(o.out);
  }
}

TEST_CASE("a killed run goes on where it was, to the same bytes and the same log") {
  const workplace w;
  heal_options o = w.options();
  o.threads = 1;
  REQUIRE(run_heal(o) == 0);
  const std::string expected = model_bytes(o.out);
  const auto log = w.log();
  const auto is_as_expected = [&] {
    const bool same = model_bytes(o.out) == expected && w.log() == log;
    fs::remove_all(o.out);
    return same && w.dir.files() == texts{"full", "log", "model", "text.txt"};
  };
  CHECK(is_as_expected());
  o.threads = 2;
  for (const index_t every : {1, 4}) {
    o.checkpoint_every = every;
    for (index_t step = 1; step <= 6; ++step) {
      run_and_die(o, step);
      CHECK_FALSE(fs::exists(o.out));
      REQUIRE(run_heal(o) == 0);
      CHECK(is_as_expected());
    }
  }
  random_source random(5);
  for (int i = 0; i < 10; ++i) {
    run_and_die(o, 0, static_cast<unsigned>(random.integer(1000, 200000)));
    if (!fs::exists(o.out)) REQUIRE(run_heal(o) == 0);
    CHECK(is_as_expected());
  }

  run_and_die(o, 5);
  const auto refused = [&](auto change, std::initializer_list<const char*> why) {
    heal_options other = o;
    change(other);
    return w.refused(other, errc::invalid_argument, why);
  };
  CHECK(refused([](auto& x) { x.rate = 1e-2; }, {"another lr", "0.5 there", "0.01 here"}));
  CHECK(refused([](auto& x) { x.scale_rate = 1; }, {"another scale_lr"}));
  CHECK(refused([](auto& x) { x.train = {"weak"}; }, {"another train"}));
  CHECK(refused([](auto& x) { x.seed = 4; }, {"another seed"}));
  CHECK(run_heal(o) == 0);
  CHECK(is_as_expected());
}

TEST_CASE("what is wrong is said, and nothing is left") {
  const workplace w;
  const auto refused = [&](errc code, auto change, std::initializer_list<const char*> why) {
    heal_options o = w.options();
    change(o);
    return w.refused(o, code, why);
  };
  constexpr errc bad = errc::invalid_argument;
  const auto write_other = [&](const char* name, const json& changes) {
    write_small_model(w.dir / name, changes, 1);
    return w.path(name);
  };
  const std::string words = write_other("words", {{"vocab_size", 64}});
  CHECK(refused(bad, [&](auto& o) { o.reference = words; }, {"--reference", "vocabulary of 64"}));
  const std::string heads = write_other("heads", {{"num_key_value_heads", 3}});
  CHECK(refused(bad, [&](auto& o) { o.reference = heads; },
                {"--reference", "heads on 3 of", "heads on 2 of"}));
  const std::string other = write_other("other", json::object());
  std::string ids = read_all(w.dir / "other/tokenizer.json");
  const auto swap_at = ids.find("\"a\"");
  const auto with_at = ids.find("\"b\"");
  REQUIRE((swap_at != std::string::npos && with_at != std::string::npos));
  std::swap(ids[swap_at + 1], ids[with_at + 1]);
  write_all(w.dir / "other/tokenizer.json", ids);
  CHECK(refused(bad, [&](auto& o) { o.reference = other; }, {"--reference", "another tokenizer"}));
  CHECK(refused(bad, [](auto& o) { o.reference = o.model; }, {"--reference", "is quantised"}));
  CHECK(refused(bad, [](auto& o) { o.model = o.reference; }, {"--model", "not quantised"}));
  write_all(w.dir / "short.txt", w.letters(100, 1));
  CHECK(refused(bad, [&](auto& o) { o.text = w.path("short.txt"); },
                {"short.txt", "100 tokens", "7 windows of 32"}));
  CHECK(refused(errc::io_error, [&](auto& o) { o.text = w.path("no.txt"); }, {"no.txt"}));
  CHECK(refused(errc::io_error, [](auto& o) { o.out = o.model; }, {"cannot write", "model"}));
  CHECK(refused(bad, [](auto& o) { o.seq_len = 4000; }, {"--seq-len is 4000", "128"}));
  CHECK(refused(bad, [](auto& o) { o.seq_len = 1; }, {"--seq-len is 1"}));
  CHECK(refused(bad, [](auto& o) { o.steps = 0; }, {"--steps is 0"}));
  CHECK(refused(bad, [](auto& o) { o.batch = 0; }, {"--batch is 0"}));
  CHECK(refused(bad, [](auto& o) { o.rate = -1; }, {"--lr is -1"}));
  CHECK(refused(bad, [](auto& o) { o.scale_rate = 0; }, {"--scale-lr is 0"}));
  CHECK(refused(bad, [](auto& o) { o.norm_rate = NAN; }, {"--norm-lr is nan"}));
  CHECK(refused(bad, [](auto& o) { o.clip = -1; }, {"--clip is -1"}));
  CHECK(refused(bad, [](auto& o) { o.train = {"codes"}; }, {"--train is codes", "weak"}));
  CHECK(refused(bad, [](auto& o) { o.train = {}; }, {"--train is empty"}));
  CHECK(refused(bad, [](auto& o) { o.validation_windows = -1; }, {"--validation-windows is -1"}));
  // A rate at which 16 bits overflow, behind a checkpoint.
  CHECK(refused(errc::not_finite, [](auto& o) { o.rate = 3e9; }, {"step ", "--lr (here "}));
  write_all(w.dir / "model/before_merge.qeft", "");
  CHECK(refused(bad, [](auto&) {}, {"--model", "adapters are merged"}));
}

TEST_CASE("the command: parts by name, and JSON") {
  const workplace w;
  const std::string command =
      "exec 2>/dev/null; '" QEFT_LLM "' heal --model '" + w.path("model") + "' --reference '" +
      w.path("full") + "' --text '" + w.path("text.txt") + "' --out '" + w.path("out") +
      "' --train weak,norms --seq-len 32 --steps 4 --batch 2 --threads 2 --json";
  std::FILE* pipe = ::popen(command.c_str(), "r");
  REQUIRE(pipe != nullptr);
  std::string text;
  char buffer[4096];
  while (const std::size_t n = std::fread(buffer, 1, sizeof buffer, pipe)) text.append(buffer, n);
  CHECK(::pclose(pipe) == 0);
  std::vector<json> lines;
  while (!text.empty()) {
    lines.push_back(json::parse(text.substr(0, text.find('\n'))));
    text.erase(0, text.find('\n') + 1);
  }
  REQUIRE(lines.size() == 1 + 4 + 1);
  CHECK(lines.front().at("step") == 0);
  const json& result = lines.back();
  CHECK(result.at("steps") == 4);
  CHECK(result.at("tokens") == 4 * 2 * 32);
  CHECK(result.at("kl").get<double>() < result.at("start_kl").get<double>());
  const io::safetensors_reader written(w.path("out"));
  CHECK(result.at("fingerprint") == io::weights_fingerprint(written));
  const json config = json::parse(read_all(w.dir / "out/config.json"));
  CHECK(config.at("quantization_config").at("provenance").at("heal").at("train") ==
        json{"weak", "norms"});
}
