// SPDX-License-Identifier: Apache-2.0
// The command qeft-llm as a user runs it: results, exit status, messages, and what stays on the
// disk.
#include <sys/wait.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "preset.hpp"
#include "qeft/io/safetensors.hpp"
#include "reference_model.hpp"
#include "support/catch.hpp"
#include "support/throws.hpp"
#include "unit/io/temporary_directory.hpp"

namespace {

namespace fs = std::filesystem;
using namespace qeft_llm;
using namespace qeft_test;
using nlohmann::json;
using qeft::io::dtype;

struct outcome {
  int status;        // exit status; -1 when killed by a signal
  std::string text;  // standard output and standard error
};

/// Runs `qeft-llm ARGUMENTS` in a shell, behind `setup`.
outcome run(const std::string& arguments, const std::string& setup = "") {
  const std::string command = "exec 2>&1 </dev/null; " + setup + " '" QEFT_LLM "' " + arguments;
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

bool mentions_any(const std::string& text, std::initializer_list<const char*> fragments) {
  return std::any_of(fragments.begin(), fragments.end(),
                     [&](const char* f) { return text.find(f) != std::string::npos; });
}

std::string last_line(const std::string& text) {
  const std::string whole = text.substr(0, text.find_last_not_of('\n') + 1);
  return whole.substr(whole.rfind('\n') + 1);
}

/// A model, a text, and the arguments that quantise the one with the other.
struct workplace {
  temporary_directory dir;
  reference_model model = write_small_model(dir / "model", json::object(), 1);
  std::string letters;

  workplace() {
    const std::vector<int> ids = random_tokens(model.config, 4000, 3);
    for (const int id : ids) letters += static_cast<char>('a' + id % 26);
    write_all(dir / "text", letters);
  }

  std::string at(const std::string& name) const { return "'" + (dir / name).string() + "'"; }
  std::string quantize(const std::string& from = "model", const std::string& to = "out") const {
    return "quantize --model " + at(from) + " --out " + at(to) + " --calibration " + at("text") +
           " --group-size 32 --weak-columns 8 --samples 6 --seq-len 64 --threads 2 ";
  }
  /// A copy of the model's directory, to be damaged.
  fs::path copy(const std::string& name) const {
    fs::remove_all(dir / name);
    fs::copy(dir / "model", dir / name);
    return dir / name;
  }
  /// Whether the run failed with a message of these fragments and left nothing behind.
  bool refused(const outcome& result, std::initializer_list<const char*> fragments) const {
    bool clean = result.status == 1 && mentions(result.text, fragments);
    for (const std::string& name : dir.files()) {
      if (name.rfind("out", 0) == 0 || name.find(".tmp") != std::string::npos) {
        std::printf("left behind: %s\n", name.c_str());
        clean = false;
      }
    }
    return clean;
  }
};

}  // namespace

TEST_CASE("quantize, inspect, perplexity and generate work on one another's results") {
  const workplace w;
  fs::create_directory(w.dir / "model/additional_chat_templates");
  write_all(w.dir / "model/additional_chat_templates/tool.jinja", "{{ messages }}");
  REQUIRE(run(w.quantize()).status == 0);
  CHECK(w.dir.files() == std::vector<std::string>{"model", "out", "text"});
  CHECK(read_all(w.dir / "out/additional_chat_templates/tool.jinja") == "{{ messages }}");

  const outcome table = run("inspect " + w.at("out"));
  CHECK(table.status == 0);
  CHECK(mentions(table.text, {"model.layers.1.mlp.down_proj", "tail", "bits per weight"}));
  fs::copy(w.dir / "out", w.dir / "edited");
  json config = json::parse(read_all(w.dir / "edited/config.json"));
  const json& reports = config.at("quantization_config").at("provenance").at("layers");
  char error[32];
  std::snprintf(error, sizeof error, " %.4g ",
                reports.at("model.layers.1.mlp.down_proj").at("output_error").get<double>());
  const std::string row = table.text.substr(table.text.find("model.layers.1.mlp.down_proj"));
  CHECK(mentions(row.substr(0, row.find('\n')), {error}));
  config["mlp_bias"] = true;
  write_all(w.dir / "edited/config.json", config.dump());
  const outcome biased = run("inspect " + w.at("edited"));
  CHECK(biased.status == 1);
  CHECK(mentions(biased.text, {"model.layers.1.mlp.down_proj.bias"}));
  config.erase("mlp_bias");
  const json intermediate = config.at("intermediate_size");
  config["intermediate_size"] = 96;
  write_all(w.dir / "edited/config.json", config.dump());
  const outcome smaller = run("inspect " + w.at("edited"));
  CHECK(smaller.status == 1);
  CHECK(mentions(smaller.text, {"model.layers.0.mlp.gate_proj", "the model needs 96 x 96"}));
  config["intermediate_size"] = intermediate;
  json& layers = config["quantization_config"]["layers"];
  layers["model.layers.2.mlp.down_proj"] = layers["model.layers.1.mlp.down_proj"];
  write_all(w.dir / "edited/config.json", config.dump());
  const outcome larger = run("inspect " + w.at("edited"));
  CHECK(larger.status == 1);
  CHECK(mentions(larger.text, {"model.layers.2.mlp.down_proj", "num_hidden_layers = 2"}));
  fs::remove_all(w.dir / "edited");

  // The letters are the ids, so the reference sees the windows that the command sees.
  double loss = 0;
  for (int window = 0; window < 5; ++window) {
    std::vector<int> ids;
    for (int i = 0; i < 64; ++i)
      ids.push_back(w.letters[static_cast<std::size_t>(64 * window + i)] - 'a');
    loss += w.model.loss(ids) / 5;
  }
  const outcome measured = run("perplexity --model " + w.at("model") + " --text " + w.at("text") +
                               " --seq-len 64 --tokens 300");
  REQUIRE(measured.status == 0);
  double perplexity = 0;
  int tokens = 0;
  REQUIRE(std::sscanf(last_line(measured.text).c_str(), "perplexity %lf tokens %d", &perplexity,
                      &tokens) == 2);
  CHECK(tokens == 5 * 63);
  CHECK(std::abs(perplexity / std::exp(loss) - 1) < 1e-4);
  CHECK(run("perplexity --model " + w.at("out") + " --text " + w.at("text") + " --seq-len 64")
            .status == 0);

  std::vector<int> ids = {0, 1, 2};
  std::string expected;
  for (int i = 0; i < 20; ++i) {
    const std::vector<double> logits = w.model.logits(ids);
    const auto last = logits.end() - w.model.config.vocab_size;
    ids.push_back(static_cast<int>(std::max_element(last, logits.end()) - last));
    if (ids.back() < 26) expected += static_cast<char>('a' + ids.back());
  }
  const outcome said = run("generate --model " + w.at("model") +
                           " --prompt abc --max-tokens 20 --ignore-eos 2>/dev/null");
  CHECK(said.status == 0);
  CHECK(said.text == expected + "\n");

  const auto drawn = [&](const std::string& how) {
    const std::string common = " --prompt abc --max-tokens 20 --ignore-eos 2>/dev/null";
    return run("generate --model " + w.at("out") + " " + how + common).text;
  };
  CHECK(drawn("--temperature 0.7 --seed 5") == drawn("--temperature 0.7 --seed 5"));
  CHECK(drawn("--temperature 0.7 --seed 5") != drawn("--temperature 0.7 --seed 6"));
  CHECK(drawn("--temperature 1e-40 --seed 5") == drawn("--temperature 0"));
}

TEST_CASE("OPTQ beats RTN on every layer, and inspect says so") {
  const workplace w;
  const outcome made = run(w.quantize("model", "out/") + "--compare-rtn --static-groups");
  INFO(made.text);
  REQUIRE(made.status == 0);
  CHECK(mentions(made.text, {"E is below that of RTN on 14 of 14 layers"}));
  CHECK(w.dir.files() == std::vector<std::string>{"model", "out", "text"});
  const json config = json::parse(read_all(w.dir / "out" / "config.json"));
  int layers = 0;
  for (const auto& [name, report] :
       config.at("quantization_config").at("provenance").at("layers").items()) {
    CHECK(report.at("output_error").get<double>() < report.at("rtn_output_error").get<double>());
    ++layers;
  }
  CHECK(layers == 14);
  CHECK(mentions(run("inspect " + w.at("out")).text, {"E/RTN"}));
  const json inspected = json::parse(run("inspect --json " + w.at("out")).text);
  for (const json& layer : inspected.at("layers")) {
    CHECK(layer.at("error").get<double>() < layer.at("rtn_error").get<double>());
  }
  CHECK(run("inspect " + w.at("out") + " >/dev/full").status == 1);
}

TEST_CASE("weak columns of another checkpoint are taken over, or refused at once") {
  const workplace w;
  REQUIRE(run(w.quantize("model", "base")).status == 0);
  REQUIRE(run(w.quantize("model", "scattered") + "--reorder off").status == 0);
  const std::string rest = " --out " + w.at("out") + " --calibration " + w.at("text") +
                           " --group-size 32 --samples 6 --seq-len 64 --model " + w.at("model") +
                           " --weak-columns-from ";
  CHECK(w.refused(run("quantize" + rest + w.at("scattered")), {"share them", "--reorder"}));
  CHECK(w.refused(run("quantize" + rest + w.at("base") + " --weak-placement per_head"),
                  {"per_head needs the same weak columns", "o_proj"}));
  CHECK(w.refused(run("quantize" + rest + w.at("nowhere")), {"nowhere"}));
  CHECK(w.refused(run("quantize" + rest + w.at("model")), {"has no quantised layer"}));
  CHECK(run("quantize" + rest + w.at("base") + " --weak-columns 4").status != 0);
  REQUIRE(run("quantize" + rest + w.at("base") + " --method rtn").status == 0);
  const qeft::io::safetensors_reader base(w.dir / "base");
  const qeft::io::safetensors_reader out(w.dir / "out");
  for (const std::string& name : base.names()) {
    if (name.find("weak_index") == std::string::npos) continue;
    const auto& a = base.at(name).data;
    const auto& b = out.at(name).data;
    CHECK(std::equal(a.begin(), a.end(), b.begin(), b.end()));
  }
}

TEST_CASE("damaged models are refused") {
  const workplace w;
  const auto quantize_damaged = [&] { return run(w.quantize("damaged")); };

  const auto file = [&] { return w.copy("damaged") / "model.safetensors"; };
  const auto path = file();
  fs::resize_file(path, fs::file_size(path) / 2);
  CHECK(w.refused(quantize_damaged(), {"model.safetensors", "data_offsets"}));
  CHECK(run("generate --model " + w.at("damaged") + " --prompt a").status == 1);

  const auto header = [&](const std::string& tensors) {
    write_all(file(), safetensors_bytes(tensors, std::string(64, '\0')));
    return quantize_damaged();
  };
  CHECK(w.refused(header(R"({"a":{"dtype":"F16","shape":[8],"data_offsets":[0,16]},)"
                         R"("b":{"dtype":"F16","shape":[8],"data_offsets":[8,24]}})"),
                  {"'b'", "inside its predecessor"}));
  CHECK(w.refused(header(R"({"a":{"dtype":"F16","shape":[8],"data_offsets":[60,76]}})"),
                  {"'a'", "data_offsets"}));

  const auto rewritten = [&](const std::string& name, dtype type, bool keep) {
    const fs::path out = file();
    qeft::io::safetensors_writer writer;
    for (const tensor_spec& spec : expected_tensors(w.model.config)) {
      if (spec.name != name) {
        add_tensor(writer, spec, w.model.tensors.at(spec.name), dtype::f16);
      } else if (keep) {
        std::vector<std::byte> zeros(4 * w.model.tensors.at(name).size());
        writer.add(name, type, spec.shape, std::move(zeros));
      }
    }
    writer.write(out);
    return quantize_damaged();
  };
  const std::string up = "model.layers.1.mlp.up_proj.weight";
  CHECK(w.refused(rewritten(up, dtype::i32, true), {up.c_str(), "I32"}));
  CHECK(w.refused(rewritten(up, dtype::f32, false), {up.c_str(), "missing"}));

  reference_model broken = w.model;
  broken.tensors.at(up)[5] = NAN;
  write_tensors(w.copy("damaged"), broken, dtype::f32);
  CHECK(w.refused(quantize_damaged(), {up.c_str(), "flat index 5", "finite"}));
  broken.tensors.at(up)[5] = 3.4e38;
  write_tensors(w.copy("damaged"), broken, dtype::f32);
  CHECK(w.refused(quantize_damaged(), {up.c_str(), "overflows"}));

  write_all(w.copy("damaged") / "config.json", "{\"model_type\": \"llama\"");
  CHECK(w.refused(quantize_damaged(), {"config.json"}));
  fs::remove(w.copy("damaged") / "tokenizer.json");
  CHECK(w.refused(quantize_damaged(), {"tokenizer.json", "No such file"}));
  CHECK(w.refused(run(w.quantize("nowhere")), {"nowhere", "config.json"}));
}

TEST_CASE("prompts, sampling and JSON of generate") {
  const workplace w;
  const std::string common = " --max-tokens 12 --ignore-eos --model " + w.at("model") + " ";
  const auto said = [&](const std::string& options, const std::string& setup = "") {
    const outcome o = run("generate" + common + options + " 2>/dev/null", setup);
    CHECK(o.status == 0);
    return o.text;
  };
  const std::string expected = said("--prompt abc");
  write_all(w.dir / "prompt", "abc");
  CHECK(said("--prompt-file " + w.at("prompt")) == expected);
  CHECK(said("--prompt-file /dev/stdin", "printf abc |") == expected);
  CHECK(mentions(run("generate" + common + "--prompt-file " + w.at("nowhere")).text,
                 {"cannot open", "nowhere"}));
  CHECK(said("--prompt - < " + w.at("prompt")) == expected);
  CHECK(said("--prompt abc --temperature 2 --top-k 1 --seed 3") == expected);
  CHECK(said("--prompt abc --temperature 2 --top-p 0.0001 --seed 3") == expected);
  CHECK(said("--prompt abc --activations int8") == expected);  // nothing is quantised
  CHECK(said("--prompt abc --repetition-penalty 1000") != expected);

  const json all = json::parse(said("--prompt abc --json"));
  CHECK(all.at("prompt_tokens") == 3);
  CHECK(all.at("tokens").size() == 12);
  CHECK(all.at("text").get<std::string>() + "\n" == expected);
  CHECK(all.at("finish_reason") == "length");
  CHECK(all.at("decode_seconds").get<double>() > 0);
  CHECK(run("generate" + common).status != 0);
  CHECK(run("generate" + common + "--prompt a --prompt-file " + w.at("prompt")).status != 0);
  CHECK(w.refused(run("generate" + common + "--prompt a --top-p 2"), {"--top-p is 2"}));
  CHECK(w.refused(run("generate" + common + "--prompt a --system b"), {"--system", "need --chat"}));
}

TEST_CASE("a chat follows the template of the model") {
  const workplace w;
  const std::string model = "generate --max-tokens 9 --ignore-eos --model " + w.at("chat") + " ";
  const auto said = [&](const std::string& options) {
    const outcome o = run(model + options + " 2>/dev/null");
    CHECK(o.status == 0);
    return o.text;
  };
  const auto with_template = [&](const json& source) {
    write_all(w.copy("chat") / "tokenizer_config.json", json{{"chat_template", source}}.dump());
  };
  const char* turns =
      "{% for m in messages %}{{ m.role[:1] }}{{ m.content | trim }}{% endfor %}"
      "{% if add_generation_prompt %}z{% endif %}";
  with_template(turns);
  const std::string plain = said("--prompt uabz");
  CHECK(said("--chat --prompt ' ab '") == plain);
  CHECK(said("--chat --prompt ab --system cd") == said("--prompt scduabz"));
  write_all(w.dir / "messages", R"([{"role": "user", "content": "ab"},
      {"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}])");
  CHECK(said("--messages " + w.at("messages")) == said("--prompt uabaxuyz"));
  CHECK(said("--system c --messages " + w.at("messages")) == said("--prompt scuabaxuyz"));
  with_template(json::array({json{{"name", "default"}, {"template", "q"}},
                             json{{"name", "other"}, {"template", turns}}}));
  CHECK(said("--chat --prompt ab --template other") == plain);
  CHECK(w.refused(run(model + "--chat --prompt ab --template none"),
                  {"no chat template named none", "default, other"}));
  with_template("{% macro x() %}{% endmacro %}");
  CHECK(w.refused(run(model + "--chat --prompt ab"),
                  {"tokenizer_config.json: chat_template: line 1", "{% macro %}", "--template"}));
  with_template("{{ raise_exception('no such talk') }}");
  CHECK(w.refused(run(model + "--chat --prompt ab"), {"refuses these messages: no such talk"}));
}

TEST_CASE("perplexity and inspect as JSON") {
  const workplace w;
  REQUIRE(run(w.quantize() + "--method rtn --weak-columns 0").status == 0);
  const std::string measure =
      "perplexity --text " + w.at("text") + " --seq-len 64 --tokens 300 --model " + w.at("out");
  const json measured = json::parse(run(measure + " --json 2>/dev/null").text);
  const json by_int8 = json::parse(run(measure + " --json --activations int8 2>/dev/null").text);
  CHECK(measured.at("tokens") == 5 * 63);
  CHECK(measured.at("windows") == 5);
  CHECK(measured.at("seq_len") == 64);
  const auto perplexity = measured.at("perplexity").get<double>();
  double printed = 0;
  REQUIRE(std::sscanf(last_line(run(measure).text).c_str(), "perplexity %lf", &printed) == 1);
  CHECK(std::abs(perplexity / printed - 1) < 1e-4);
  CHECK(by_int8.at("perplexity") != perplexity);
  CHECK(std::abs(by_int8.at("perplexity").get<double>() / perplexity - 1) < 0.1);

  const json table = json::parse(run("inspect --json " + w.at("out")).text);
  CHECK(table.at("model_type") == "llama");
  CHECK(table.at("layers").size() == 14);
  const json& layer = table.at("layers").at(13);
  CHECK(layer.at("name") == "model.layers.1.mlp.down_proj");
  CHECK(layer.at("bits") == 4);
  CHECK(layer.at("group_size") == 32);
  CHECK(layer.at("in_channels") == 160);
  CHECK(layer.at("error").is_null());
  const json full = json::parse(run("inspect --json " + w.at("model")).text);
  CHECK(full.at("bits_per_weight") == 16);
}

TEST_CASE("perplexity measures the divergence from a reference") {
  const workplace w;
  reference_model other = w.model;
  for (double& x : other.tensors.at("model.layers.1.mlp.down_proj.weight")) x *= 2;
  write_tensors(w.copy("other"), other, dtype::f16);
  const std::string measure = "perplexity --text " + w.at("text") + " --seq-len 64 --model " +
                              w.at("other") + " --reference " + w.at("model");
  const auto as_json = [](const std::string& command) {
    return json::parse(run(command + " --json 2>/dev/null").text);
  };

  std::vector<double> means;
  int agreeing = 0;
  for (std::size_t window = 0; window < 5; ++window) {
    std::vector<int> ids;
    for (std::size_t i = 0; i < 64; ++i) ids.push_back(w.letters[64 * window + i] - 'a');
    const auto vocabulary = static_cast<std::size_t>(w.model.config.vocab_size);
    const std::vector<double> p = w.model.logits(ids);
    const std::vector<double> q = other.logits(ids);
    double sum = 0;
    for (std::size_t first = 0; first < 63 * vocabulary; first += vocabulary) {
      double p_sum = 0;
      double q_sum = 0;
      for (std::size_t v = first; v < first + vocabulary; ++v) {
        p_sum += std::exp(p[v]);
        q_sum += std::exp(q[v]);
      }
      std::size_t p_top = first;
      std::size_t q_top = first;
      for (std::size_t v = first; v < first + vocabulary; ++v) {
        sum += std::exp(p[v]) / p_sum * (p[v] - std::log(p_sum) - q[v] + std::log(q_sum));
        if (p[v] > p[p_top]) p_top = v;
        if (q[v] > q[q_top]) q_top = v;
      }
      agreeing += p_top == q_top;
    }
    means.push_back(sum / 63);
  }
  double mean = 0;
  for (const double m : means) mean += m / 5;
  double variance = 0;
  for (const double m : means) variance += (m - mean) * (m - mean) / 4;

  const json found = as_json(measure + " --tokens 300");
  REQUIRE(mean > 0.01);
  CHECK(std::abs(found.at("kl").get<double>() / mean - 1) < 1e-4);
  CHECK(std::abs(found.at("kl_standard_error").get<double>() / std::sqrt(variance / 5) - 1) < 1e-3);
  CHECK(agreeing > 100);
  CHECK(agreeing < 300);
  CHECK(found.at("top1_agreement").get<double>() == agreeing / (5 * 63.0));
  for (const char* threads : {"1", "3"}) {
    CHECK(as_json(measure + " --tokens 300 --threads " + threads) == found);
  }

  double perplexity = 0;
  int tokens = 0;
  double kl = 0;
  double error = 0;
  double top1 = 0;
  REQUIRE(std::sscanf(last_line(run(measure + " --tokens 300").text).c_str(),
                      "perplexity %lf tokens %d kl %lf se %lf top1 %lf", &perplexity, &tokens, &kl,
                      &error, &top1) == 5);
  CHECK(tokens == 5 * 63);
  CHECK(std::abs(kl - found.at("kl").get<double>()) < 1e-6);
  CHECK(std::abs(error - found.at("kl_standard_error").get<double>()) < 1e-6);
  CHECK(std::abs(top1 - found.at("top1_agreement").get<double>()) < 1e-4);

  // The reference changes nothing about the model's own numbers.
  const json alone = as_json("perplexity --text " + w.at("text") +
                             " --seq-len 64 --tokens 300 --model " + w.at("other"));
  CHECK(alone.size() == 4);
  for (const auto& [name, value] : alone.items()) CHECK(found.at(name) == value);

  CHECK(as_json(measure + " --tokens 60").at("kl_standard_error").is_null());
  CHECK(mentions(run(measure + " --tokens 60").text, {" se nan top1 "}));
}

TEST_CASE("a model has no divergence from itself") {
  const workplace w;
  REQUIRE(run(w.quantize() + "--method rtn --weak-columns 0").status == 0);
  for (const char* model : {"model", "out"}) {
    const outcome measured =
        run("perplexity --seq-len 64 --text " + w.at("text") + " --model " + w.at(model) +
            " --reference " + w.at(model) + " --json 2>/dev/null");
    const json found = json::parse(measured.text);
    CHECK(found.at("kl") == 0.0);
    CHECK(found.at("kl_standard_error") == 0.0);
    CHECK(found.at("top1_agreement") == 1.0);
  }
  // --activations is the measured model's alone.
  const outcome by_int8 =
      run("perplexity --activations int8 --seq-len 64 --text " + w.at("text") + " --json --model " +
          w.at("out") + " --reference " + w.at("out") + " 2>/dev/null");
  const auto kl = json::parse(by_int8.text).at("kl").get<double>();
  CHECK(kl > 0);
  CHECK(kl < 0.1);
}

TEST_CASE("references that the model cannot be compared with are refused") {
  const workplace w;
  const auto against = [&](const std::string& reference) {
    return run("perplexity --seq-len 64 --text " + w.at("text") + " --model " + w.at("model") +
               " --reference " + w.at(reference));
  };
  const qeft::index_t size = w.model.config.vocab_size;
  const std::string larger = "a vocabulary of " + std::to_string(size + 3);
  const std::string ours = "must have the model's " + std::to_string(size);
  write_small_model(w.dir / "larger", {{"vocab_size", size + 3}}, 1);
  CHECK(w.refused(against("larger"), {"larger", larger.c_str(), ours.c_str()}));

  json tokenizer = json::parse(read_all(w.copy("swapped") / "tokenizer.json"));
  std::swap(tokenizer["model"]["vocab"]["c"], tokenizer["model"]["vocab"]["d"]);
  write_all(w.dir / "swapped/tokenizer.json", tokenizer.dump());
  CHECK(w.refused(against("swapped"), {"swapped", "another tokenizer", "token 2 differs"}));

  write_small_model(w.dir / "short", {{"max_position_embeddings", 32}}, 1);
  CHECK(w.refused(against("short"), {"--seq-len is 64", "the reference", "= 32"}));

  reference_model broken = w.model;
  for (double& x : broken.tensors.at("model.norm.weight")) x = 3e38;
  write_tensors(w.copy("damaged"), broken, dtype::f32);
  CHECK(
      w.refused(against("damaged"), {"--reference", "damaged: the model's logits are not finite"}));
  CHECK(w.refused(against("nowhere"), {"nowhere", "config.json"}));
}

TEST_CASE("logits that are not finite end generate and perplexity") {
  const workplace w;
  reference_model broken = w.model;
  for (double& x : broken.tensors.at("model.norm.weight")) x = 3e38;
  write_tensors(w.copy("damaged"), broken, dtype::f32);
  const std::string model = " --model " + w.at("damaged");
  for (const char* temperature : {"0", "1"}) {
    const outcome said =
        run("generate --prompt abc --temperature " + std::string(temperature) + model);
    CHECK(said.status == 1);
    CHECK(mentions(said.text, {"the model's logits are not finite"}));
  }
  const outcome measured = run("perplexity --seq-len 64 --text " + w.at("text") + model);
  CHECK(measured.status == 1);
  CHECK(mentions(measured.text, {"the model's logits are not finite"}));
}

TEST_CASE("what a model or directory lacks is said before any layer is quantised") {
  const workplace w;
  const auto refused_early = [&](std::initializer_list<const char*> fragments,
                                 const std::string& more = "") {
    const outcome result = run(w.quantize("damaged") + more);
    CHECK_FALSE(mentions_any(result.text, {"quantising", "choosing", "gradients"}));
    return w.refused(result, fragments);
  };
  const auto with = [&](const std::string& tensor, double value) {
    reference_model broken = w.model;
    broken.tensors.at(tensor)[7] = value;
    write_tensors(w.copy("damaged"), broken, dtype::f32);
  };
  const std::string embedding = "model.embed_tokens.weight";
  for (const std::string& tensor : {embedding, std::string("model.norm.weight"),
                                    std::string("model.layers.1.post_attention_layernorm.weight"),
                                    std::string("model.layers.0.self_attn.v_proj.weight")}) {
    for (const char* options : {"", "--method rtn --weak-columns 0", "--selection gradient"}) {
      with(tensor, INFINITY);
      CHECK(refused_early({tensor.c_str(), "finite"}, options));
    }
  }
  with("model.layers.0.self_attn.v_proj.weight", 1e37);  // beyond the scales of BF16
  CHECK(refused_early({"model.layers.0.self_attn.v_proj", "overflows", "BF16"}));

  w.copy("damaged");
  fs::create_directory(w.dir / "damaged" / "special_tokens_map.json");
  CHECK(refused_early({"special_tokens_map.json", "not a regular file"}));
  w.copy("damaged");
  fs::create_symlink("nowhere", w.dir / "damaged" / "merges.txt");
  CHECK(refused_early({"merges.txt"}));
}

TEST_CASE("biases that the configuration does not have are left out") {
  const workplace w;
  reference_model more = w.model;
  more.config.qkv_bias = true;
  for (const tensor_spec& spec : expected_tensors(more.config)) {
    if (more.tensors.count(spec.name) == 0) {
      more.tensors[spec.name].assign(static_cast<std::size_t>(spec.shape[0]), NAN);
    }
  }
  write_tensors(w.copy("more"), more, dtype::f32);
  REQUIRE(run(w.quantize("more")).status == 0);
  const qeft::io::safetensors_reader out(w.dir / "out");
  CHECK_FALSE(out.contains("model.layers.0.self_attn.q_proj.bias"));
}

TEST_CASE("activations that are not finite are the model's, in a layer") {
  const workplace w;
  const auto quantize_with = [&](double size, const std::string& options) {
    reference_model broken = w.model;
    for (double& x : broken.tensors.at("model.layers.1.input_layernorm.weight")) x = size;
    write_tensors(w.copy("damaged"), broken, dtype::f32);
    return run(w.quantize("damaged") + options);
  };
  for (const char* options :
       {"", "--reorder off", "--weak-columns 0", "--selection gradient", "--compare-rtn"}) {
    CHECK(w.refused(quantize_with(3e38, options),
                    {"model.layers.1", "the activations of the model are not finite"}));
  }
  CHECK(w.refused(quantize_with(2e18, ""), {"model.layers.1.self_attn.q_proj", "so large"}));
}

TEST_CASE("quantize describes its result as JSON") {
  const workplace w;
  const outcome made = run(w.quantize() + "--json --compare-rtn 2>/dev/null");
  REQUIRE(made.status == 0);
  const json described = json::parse(made.text);
  CHECK(described.at("method") == "optq");
  CHECK(described.at("samples") == 6);
  CHECK(described.at("bits_per_weight").get<double>() > 4.5);
  REQUIRE(described.at("layers").size() == 14);
  const json& layer = described.at("layers").at(3);
  CHECK(layer.at("name") == "model.layers.0.self_attn.o_proj");
  CHECK(layer.at("weak_columns").size() == 8);
  CHECK(layer.at("output_error").get<double>() < layer.at("rtn_output_error").get<double>());
  CHECK(layer.at("scalar") == "f16");
}

TEST_CASE("Hessians without rank give models without NaN") {
  const workplace w;
  reference_model dead = w.model;
  for (double& x : dead.tensors.at("model.layers.0.input_layernorm.weight")) x = 0;
  write_tensors(w.copy("dead"), dead, dtype::f16);
  const outcome zero = run(w.quantize("dead"));
  INFO(zero.text);
  REQUIRE(zero.status == 0);
  const std::string text = " --text " + w.at("text") + " --seq-len 64 --tokens 300";
  CHECK(run("perplexity --model " + w.at("out") + text).status == 0);

  // Two tokens for 96 columns, without damping to begin with.
  const outcome singular =
      run(w.quantize("model", "singular") + "--samples 1 --seq-len 2 --damping 0");
  INFO(singular.text);
  REQUIRE(singular.status == 0);
  CHECK(mentions(singular.text, {"needed a damping of"}));
  CHECK(run("perplexity --model " + w.at("singular") + text).status == 0);
}

TEST_CASE("outputs that cannot be written leave nothing behind") {
  const workplace w;
  CHECK(w.refused(run(w.quantize("model", "text/out")), {"text/out"}));
  CHECK(w.refused(run(w.quantize("model", "model")), {"must not exist yet"}));
  fs::create_directory_symlink(w.dir / "model", w.dir / "link");
  CHECK(w.refused(run(w.quantize("model", "link")), {"link", "must not exist yet"}));
  CHECK(w.refused(run("quantize --method rtn --weak-columns 0 --out '' --model " + w.at("model")),
                  {"directory ''"}));
  // A disk that fills up: the activations of the samples, then the model.
  const std::string small_disk = "ulimit -f 64; trap '' XFSZ;";
  CHECK(w.refused(run(w.quantize(), small_disk), {"activations"}));
  CHECK(w.refused(run(w.quantize() + "--method rtn --weak-columns 0", small_disk),
                  {"cannot write", "model.safetensors"}));
}

TEST_CASE("options that make no sense are refused by name") {
  const workplace w;
  CHECK(w.refused(run(w.quantize() + "--samples 1000"), {"1000 windows of 64 tokens need 64000"}));
  CHECK(w.refused(run(w.quantize() + "--group-size 48"), {"group_size is 48"}));
  CHECK(w.refused(run(w.quantize() + "--weak-columns 97"), {"--weak-columns is 97"}));
  CHECK(w.refused(run(w.quantize() + "--seq-len 129"), {"--seq-len is 129"}));
  CHECK(w.refused(run(w.quantize() + "--damping 2"), {"damping is 2"}));
  CHECK(w.refused(run(w.quantize() + "--device cuda"), {"--device cuda"}));
  CHECK(run(w.quantize() + "--bits 5").status != 0);
#if !defined(QEFT_KEEP_CALLS)  // sanitizers need address space
  CHECK(w.refused(run(w.quantize() + "--threads 500", "ulimit -v 1000000;"), {"threads is 500"}));
#endif
  CHECK(run("quantize --model " + w.at("model")).status != 0);
  CHECK(run("").status != 0);

  const std::string model = " --model " + w.at("model");
  CHECK(w.refused(run("generate" + model + " --prompt ''"), {"prompt is empty"}));
  CHECK(
      w.refused(run("generate" + model + " --prompt a --temperature -1"), {"--temperature is -1"}));
  CHECK(w.refused(run("generate" + model + " --chat --prompt a"), {"ChatML"}));
  CHECK(w.refused(run("perplexity --seq-len 64" + model + " --text " + w.at("none")),
                  {"none", "No such file"}));
  CHECK(w.refused(run("perplexity --seq-len 64" + model + " --text " + w.at("model")),
                  {"model", "not a regular file"}));
  CHECK(run("perplexity" + model + " --text " + w.at("text") + " --tokens -5").status != 0);
  CHECK(w.refused(run("perplexity" + model + " --text " + w.at("text") + " --seq-len 5000"),
                  {"5000"}));
  CHECK(w.refused(run("inspect " + w.at("nowhere")), {"nowhere"}));
}

TEST_CASE("a preset decides what was not asked for, and nothing else") {
  const auto resolved = [](preset chosen, std::vector<std::string> given,
                           const quantize_options& asked = {}) {
    quantize_options o = asked;
    apply(
        chosen,
        [&](const std::string& option) {
          return std::find(given.begin(), given.end(), option) != given.end();
        },
        o);
    return o;
  };
  const auto is_paper = [](const quantize_options& o) {
    return o.order == column_order::natural && !o.is_asymmetric() && !o.layer.search.weighted &&
           o.layer.search.norm == 2.4 && o.layer.refine_rounds == 0 &&
           o.layer.damping.damping == 0.01 && o.layer.group_size == 128;
  };
  CHECK(is_paper(resolved(preset::paper, {})));
  for (const preset p : {preset::standard, preset::small}) {
    const quantize_options o = resolved(p, {});
    CHECK(o.order == column_order::sensitivity);
    CHECK((o.asymmetric.input == 0.5 && o.asymmetric.stream == 0.5));
    CHECK((o.layer.search.weighted && o.layer.search.norm == 2.0));
    CHECK(o.layer.refine_rounds == 1);
    CHECK(o.layer.damping.damping == 0.3);
    CHECK(o.layer.group_size == (p == preset::small ? 64 : 128));
    CHECK(is_paper(resolved(p, {"--order", "--asymmetric", "--search-weights", "--norm", "--refine",
                                "--damping", "--group-size"})));
  }
  quantize_options asked;
  asked.layer.act_order = true;
  CHECK(resolved(preset::standard, {}, asked).order == column_order::natural);
  asked = {};
  asked.reorder = false;
  CHECK(resolved(preset::standard, {}, asked).order == column_order::natural);
  asked = {};
  asked.layer.search.method = qeft::solver::search_method::minmax;
  CHECK_FALSE(resolved(preset::standard, {}, asked).layer.search.weighted);
  asked = {};
  asked.layer.method = qeft::solver::layer_method::rtn;
  CHECK(is_paper(resolved(preset::standard, {}, asked)));
  asked = {};
  asked.layer.search.weighted = true;
  CHECK(resolved(preset::paper, {"--search-weights"}, asked).layer.search.norm == 2.0);
}

TEST_CASE("the options of a preset reach the model") {
  const workplace w;
  const auto made_by = [&](const std::string& options) {
    const outcome made = run(w.quantize() + options, "exec 2>/dev/null;");
    REQUIRE(made.status == 0);
    const auto bytes = read_all(w.dir / "out/model.safetensors");
    const json config = json::parse(read_all(w.dir / "out/config.json"));
    fs::remove_all(w.dir / "out");
    json how = config.at("quantization_config").at("provenance");
    how.erase("layers");
    return std::pair{how, bytes};
  };
  const auto by_default = made_by("");
  CHECK(by_default.first.at("order") == "sensitivity");
  CHECK(by_default.first.at("asymmetric") == json{0.5, 0.5});
  CHECK(by_default.first.at("search") == "weighted");
  CHECK(by_default.first.at("refine") == 1);
  CHECK(made_by("--preset default --order sensitivity --asymmetric 0.5 --search-weights solver "
                "--refine 1 --damping 0.3") == by_default);
  CHECK(made_by("--preset small") == by_default);  // the group size is given
  const auto paper = made_by("--preset paper");
  CHECK_FALSE(mentions_any(paper.first.dump(), {"\"order\"", "asymmetric", "weighted", "refine"}));
  CHECK(made_by("--order natural --asymmetric 0 --search-weights equal --norm 2.4 --refine 0 "
                "--damping 0.01") == paper);
  for (const char* one : {"--order natural", "--asymmetric 0.25", "--search-weights equal",
                          "--norm 3", "--refine 0", "--damping 0.1"}) {
    const auto other = made_by(one);
    INFO(one);
    CHECK(other.second != by_default.second);
    CHECK(other.second != paper.second);
  }
  const auto refuses = [&](const std::string& options, std::initializer_list<const char*> why) {
    return w.refused(run(w.quantize() + options), why);
  };
  CHECK(refuses("--method rtn --asymmetric 0.5", {"--asymmetric", "--method is optq"}));
  CHECK(refuses("--method rtn --search-weights solver", {"--search-weights", "--method is optq"}));
  CHECK(refuses("--search minmax --search-weights solver", {"--search-weights", "grid"}));
  CHECK(refuses("--reorder off --order sensitivity", {"--order", "--reorder is off"}));
  const outcome out_of_range = run(w.quantize() + "--asymmetric 1.5");
  CHECK(out_of_range.status != 0);
}
