// SPDX-License-Identifier: Apache-2.0
// The order of calibration, what each linear sees in it, and going on with an interrupted one.
#include "calibration.hpp"

#include <algorithm>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "column_choice.hpp"
#include "qeft/reorder/permute_matrix.hpp"
#include "reference_model.hpp"
#include "support/catch.hpp"
#include "support/throws.hpp"
#include "trace.hpp"
#include "unit/io/temporary_directory.hpp"
#include "work_directory.hpp"

namespace {

namespace fs = std::filesystem;
using namespace qeft_llm;
using namespace qeft_test;
using nlohmann::json;
using qeft::index_t;
using qeft::io::dtype;
using qeft::solver::hessian_accumulator;

constexpr index_t tokens = 20;

token_windows windows_of(const model_config& config) {
  token_windows windows;
  for (std::uint64_t i = 0; i < 3; ++i) windows.push_back(random_tokens(config, tokens, i + 1));
  return windows;
}

/// A model whose every linear is the half of `original`'s.
struct halved {
  temporary_directory dir;

  explicit halved(const json& config) {
    reference_model model = write_small_model(dir / "original", config, 4);
    fs::copy(dir / "original", dir / "halved");
    for (auto& [name, tensor] : model.tensors) {
      if (name.find("proj.weight") == std::string::npos) continue;
      for (double& x : tensor) x /= 2;
    }
    write_tensors(dir / "halved", model, dtype::f16);
  }
};

using hessians = std::map<std::string, std::vector<float>>;

std::vector<float> copy(qeft::span<const float> x) { return {x.begin(), x.end()}; }

/// Another model's linear in the place of this one.
linear_replacement linear_from(const model_source& source, const std::string& name,
                               linear_kind kind) {
  const linear_shape s = shape_of(source.config(), kind);
  return {source.matrix(name, s.out_channels, s.in_channels),
          qeft::permutation::identity(s.in_channels)};
}

/// 2/T sum (a W (x1 - x) + r (h1 - h)) x^T in double, (OC, IC); traces with 1 are the original's.
std::vector<double> mismatch(const std::vector<trace>& original, const std::vector<trace>& here,
                             const std::string& name, const std::vector<float>& w,
                             linear_shape shape, const qeft::solver::asymmetric_options& options) {
  const auto oc = static_cast<std::size_t>(shape.out_channels);
  const auto ic = static_cast<std::size_t>(shape.in_channels);
  std::vector<double> sum(oc * ic);
  const auto difference = [](const std::vector<float>& a, const std::vector<float>& b,
                             std::size_t i) {
    return static_cast<double>(a[i]) - static_cast<double>(b[i]);
  };
  for (std::size_t s = 0; s < here.size(); ++s) {
    const auto& x = here[s].input.at(name);
    const auto stream = here[s].stream.find(name);
    for (std::size_t t = 0; t < tokens; ++t) {
      for (std::size_t n = 0; n < oc; ++n) {
        double e = 0;
        for (std::size_t j = 0; j < ic; ++j) {
          e += options.input * static_cast<double>(w[n * ic + j]) *
               difference(original[s].input.at(name), x, t * ic + j);
        }
        if (stream != here[s].stream.end()) {
          e += options.stream * difference(original[s].stream.at(name), stream->second, t * oc + n);
        }
        for (std::size_t j = 0; j < ic; ++j) {
          sum[n * ic + j] += 2 * e * static_cast<double>(x[t * ic + j]) /
                             static_cast<double>(tokens * static_cast<index_t>(here.size()));
        }
      }
    }
  }
  return sum;
}

/// The Hessians of a model's linears on all windows.
hessians of_model(const fs::path& directory) {
  const qeft::on_host exec(1);
  const model_source source(directory);
  llama_model model(exec, source);
  std::map<std::string, hessian_accumulator> sums;
  for (const auto& window : windows_of(source.config())) {
    model.reset(tokens);
    index_t block = -1;
    model.forward(window, [&](linear_kind kind, const float* x, index_t n) {
      if (kind == linear_kind::q) ++block;
      sums.try_emplace(linear_name(block, kind), shape_of(source.config(), kind).in_channels)
          .first->second.add(exec, x, n);
    });
  }
  hessians all;
  for (auto& [name, sum] : sums) all[name] = copy(std::move(sum).finish());
  return all;
}

}  // namespace

TEST_CASE("each linear sees the inputs that those replaced before it produce") {
  for (const json& config : {json::object(), json{{"model_type", "qwen2"}}}) {
    const halved models(config);
    const qeft::on_host exec(2);
    const model_source original(models.dir / "original");
    const model_source replacement(models.dir / "halved");
    const model_config& c = original.config();
    hessians seen;
    std::vector<std::string> order;
    calibration samples(exec, original, windows_of(c), models.dir.path(), false);
    for (index_t l = 0; l < c.num_hidden_layers; ++l) {
      samples.run_block([&](index_t block, linear_kind kind, const layer_inputs& inputs) {
        CHECK(block == l);
        const std::string name = linear_name(block, kind);
        order.push_back(name);
        seen[name] = copy(inputs.hessian());
        const auto n = static_cast<index_t>(inputs.diagonal().size());
        CHECK(n == shape_of(c, kind).in_channels);
        for (index_t j = 0; j < n; ++j) {
          CHECK(inputs.diagonal()[static_cast<std::size_t>(j)] ==
                Approx(seen[name][static_cast<std::size_t>(j * (n + 1))]));
        }
        CHECK(inputs
                  .mismatch(weight_of(original, block, kind), shape_of(c, kind).out_channels,
                            {0.5, 0.5})
                  .empty());
        return linear_from(replacement, name, kind);
      });
      CHECK(samples.blocks() == l + 1);
    }
    CHECK(order.size() == 14);
    for (std::size_t i = 0; i < order.size(); ++i) {
      CHECK(order[i] == linear_name(static_cast<index_t>(i / 7), all_linears[i % 7]));
    }
    const hessians expected = of_model(models.dir / "halved");
    const hessians unchanged = of_model(models.dir / "original");
    REQUIRE(expected.size() == seen.size());
    for (const auto& [name, h] : expected) {
      INFO(name);
      CHECK(worst_error(seen.at(name), h, static_cast<index_t>(h.size())) < 1e-5);
      const bool first = name.find("layers.0.self_attn") != std::string::npos &&
                         name.find("o_proj") == std::string::npos;
      if (first) continue;  // nothing is replaced before q, k and v of the first block
      CHECK(worst_error(seen.at(name), unchanged.at(name), static_cast<index_t>(h.size())) > 1e-3);
    }
  }
}

TEST_CASE("mismatches are those between the original model and the one at work") {
  for (const json& config : {json::object(), json{{"model_type", "qwen2"}}}) {
    const halved models(config);
    const qeft::on_host exec(2);
    const model_source original(models.dir / "original");
    const model_source replacement(models.dir / "halved");
    const auto windows = windows_of(original.config());
    std::vector<trace> first, second;
    for (const auto& window : windows) {
      first.push_back(trace_of(models.dir / "original", window));
      second.push_back(trace_of(models.dir / "halved", window));
    }
    const qeft::solver::asymmetric_options options{0.5, 0.75};
    calibration samples(exec, original, windows, models.dir.path(), true);
    int compared = 0;
    const auto replace = [&](index_t block, linear_kind kind, const layer_inputs& inputs) {
      const std::string name = linear_name(block, kind);
      INFO(name);
      const linear_shape s = shape_of(original.config(), kind);
      const std::vector<float> w = weight_of(original, block, kind);
      const std::vector<float> seen = copy(inputs.mismatch(w, s.out_channels, options));
      REQUIRE(seen.size() == w.size());
      if (block == 0 && kind < linear_kind::o) {  // nothing was replaced before
        CHECK(std::all_of(seen.begin(), seen.end(), [](float v) { return v == 0; }));
      } else {
        const auto expected = mismatch(first, second, name, w, s, options);
        CHECK(worst_error(seen, expected, static_cast<index_t>(seen.size())) < 1e-5);
        ++compared;
      }
      return linear_from(replacement, name, kind);
    };
    samples.run_block(replace);
    samples.run_block(replace);
    CHECK(compared == 11);
  }
}

TEST_CASE("a linear whose columns have another order reads its inputs in that order") {
  const halved models(json::object());
  const qeft::on_host exec(2);
  const model_source original(models.dir / "original");
  const model_source replacement(models.dir / "halved");
  hessians seen;
  calibration samples(exec, original, windows_of(original.config()), models.dir.path(), false);
  const auto replace = [&](index_t block, linear_kind kind, const layer_inputs& inputs) {
    const std::string name = linear_name(block, kind);
    seen[name] = copy(inputs.hessian());
    linear_replacement by = linear_from(replacement, name, kind);
    auto source = std::move(by.order).source();
    std::reverse(source.begin(), source.end());
    std::rotate(source.begin(), source.begin() + 3, source.end());
    by.order = qeft::permutation(std::move(source));
    by.weight = qeft::permute_columns(by.order, by.weight);
    return by;
  };
  samples.run_block(replace);
  samples.run_block(replace);
  for (const auto& [name, h] : of_model(models.dir / "halved")) {
    INFO(name);
    CHECK(worst_error(seen.at(name), h, static_cast<index_t>(h.size())) < 1e-5);
  }
}

TEST_CASE("inputs that nobody asks for are not accumulated, but the samples go on") {
  const halved models(json::object());
  const qeft::on_host exec(2);
  const model_source original(models.dir / "original");
  const model_source replacement(models.dir / "halved");
  const hessians expected = of_model(models.dir / "halved");
  const auto replace = [&](index_t block, linear_kind kind, const layer_inputs& inputs) {
    const std::string name = linear_name(block, kind);
    if (block == 1) {
      const std::vector<float> h = copy(inputs.hessian());
      CHECK(worst_error(h, expected.at(name), static_cast<index_t>(h.size())) < 1e-5);
    }
    return linear_from(replacement, name, kind);
  };
  calibration samples(exec, original, windows_of(original.config()), models.dir.path(), false);
  samples.run_block(replace);
  samples.run_block(replace);
}

TEST_CASE("an interrupted calibration goes on with the same numbers") {
  const halved models(json::object());
  const qeft::on_host exec(2);
  const model_source original(models.dir / "original");
  const model_source replacement(models.dir / "halved");
  const token_windows windows = windows_of(original.config());
  struct interruption {};
  // Runs blocks from `first` on; stops before it replaces linear `stop`, counted from 0.
  const auto run = [&](const fs::path& directory, index_t first, int stop) {
    hessians seen;
    calibration samples(exec, original, windows, directory, true, first);
    int count = 0;
    try {
      while (samples.blocks() < 2) {
        samples.run_block([&](index_t block, linear_kind kind, const layer_inputs& inputs) {
          if (count++ == stop) throw interruption();
          const std::string name = linear_name(block, kind);
          seen[name] = copy(inputs.hessian());
          seen["mismatch " + name] =
              copy(inputs.mismatch(weight_of(original, block, kind),
                                   shape_of(original.config(), kind).out_channels, {0.5, 0.25}));
          return linear_from(replacement, name, kind);
        });
      }
    } catch (const interruption&) {
    }
    return seen;
  };
  fs::create_directory(models.dir / "whole");
  const hessians whole = run(models.dir / "whole", 0, -1);
  REQUIRE(whole.size() == 2 * 14);
  for (int stop = 7; stop < 14; ++stop) {  // in the second block
    const fs::path directory = models.dir / std::to_string(stop);
    fs::create_directory(directory);
    run(directory, 0, stop);
    const hessians rest = run(directory, 1, -1);
    CHECK(rest.size() == 2 * 7);
    for (const auto& [name, h] : rest) CHECK(h == whole.at(name));
  }
}

TEST_CASE("activations that are not finite, or overflow when squared, name the layer") {
  for (const auto& [size, expected] : {std::pair{1e38, "not finite"}, {1e19, "so large"}}) {
    const temporary_directory dir;
    reference_model model = write_small_model(dir / "model", json::object(), 4);
    for (double& x : model.tensors.at("model.layers.1.post_attention_layernorm.weight")) x = size;
    write_tensors(dir / "model", model, dtype::f32);
    const qeft::on_host exec(2);
    const model_source source(dir / "model");
    calibration samples(exec, source, windows_of(source.config()), dir.path(), false);
    const auto keep = [&](index_t block, linear_kind kind, const layer_inputs& inputs) {
      inputs.hessian();
      return linear_from(source, linear_name(block, kind), kind);
    };
    samples.run_block(keep);
    CHECK(throws_with(qeft::errc::not_finite,
                      {"model.layers.1.mlp.", "the activations of the model are", expected},
                      [&] { samples.run_block(keep); }));
  }
}

TEST_CASE("a work directory keeps finished layers for the same quantisation only") {
  const temporary_directory dir;
  const fs::path parent = dir / "partial";
  fs::create_directory(parent);
  const json fingerprint = {{"bits", 4}};
  qeft::matrix_descriptor d;
  d.out_channels = 3;
  d.in_channels = 40;
  d.group_size = 32;
  d.weak = qeft::weak_kind::indexed;
  d.weak_columns = 2;
  packed_matrix m(d, std::vector<std::int32_t>{5, 30});
  m.write_code(2, 7, 9);
  m.write_weak(1, 1, 0x3c00);
  const json report = {{"output_error", 0.1}, {"damping", 1.0 / 3.0}};
  auto source = qeft::permutation::identity(40).source();
  std::reverse(source.begin(), source.end());
  const qeft::permutation order(std::move(source));
  {
    const work_directory work(parent, fingerprint);
    CHECK_FALSE(work.resumed());
    CHECK_FALSE(work.has_linear("a.b"));
    CHECK_FALSE(work.load("blocks"));
    work.store_linear("a.b", {m, order, report});
    work.store("blocks", {{"finished", 3}});
  }
  write_all(parent / "model.safetensors.1.tmp", "half");
  {
    const work_directory work(parent, fingerprint);
    CHECK(work.resumed());
    CHECK(work.load("blocks").value().at("finished") == 3);
    REQUIRE(work.has_linear("a.b"));
    const finished_linear back = work.load_linear("a.b");
    CHECK(back.report == report);
    CHECK(back.order == order);
    CHECK(back.matrix.descriptor() == d);
    CHECK(back.matrix.weak_index() == m.weak_index());
    const auto equal = [](qeft::span<const std::byte> x, qeft::span<const std::byte> y) {
      return std::equal(x.begin(), x.end(), y.begin(), y.end());
    };
    CHECK(equal(back.matrix.codes(), m.codes()));
    CHECK(equal(back.matrix.weak(), m.weak()));
    CHECK_FALSE(fs::exists(parent / "model.safetensors.1.tmp"));
    write_all(work.path() / "a.b.safetensors", "damaged");
    write_all(work.path() / "blocks.json", "{");
    const std::string advice = "remove " + parent.string() + " to quantise from the start";
    CHECK_THROWS_WITH(work.load_linear("a.b"), contains(advice));
    CHECK_THROWS_WITH(work.load("blocks"), contains(advice));
    CHECK_THROWS_WITH(work.checked([] { return json::object().at("finished"); }), contains(advice));
    const auto pass = [] { qeft::fail(qeft::errc::io_error, "no memory to map a file"); };
    CHECK_THROWS_WITH(work.checked(pass), !contains(advice));
  }
  {
    const work_directory work(parent, {{"bits", 3}});
    CHECK_FALSE(work.resumed());
    CHECK_FALSE(work.has_linear("a.b"));
    write_all(work.path() / "fingerprint.json", "{\"bits\": ");
  }
  {
    const work_directory work(parent, {{"bits", 3}});
    CHECK_FALSE(work.resumed());
    work.store("blocks", {{"finished", 3}});
    fs::remove(work.path() / "fingerprint.json");
    fs::create_directory(work.path() / "fingerprint.json");
    // What cannot be read, perhaps for now, is not thrown away.
    CHECK_THROWS_WITH(work_directory(parent, {{"bits", 3}}), contains("not a regular file"));
    CHECK(fs::exists(work.path() / "blocks.json"));
    fs::remove(work.path() / "fingerprint.json");
  }
  const work_directory work(parent, {{"bits", 3}});
  CHECK_FALSE(work.resumed());
  work.remove();
  CHECK(fs::is_empty(parent));
}
