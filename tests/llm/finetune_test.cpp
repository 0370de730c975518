// SPDX-License-Identifier: Apache-2.0
// Fine-tuning of a small quantised model, from the data to the merged result: also killed, gone on
// with, and refused.
#include "finetune.hpp"

#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdio>

#include "llama.hpp"
#include "merge.hpp"
#include "qeft/io/adapter.hpp"
#include "quantize.hpp"
#include "reference_model.hpp"
#include "support/catch.hpp"
#include "support/random.hpp"
#include "support/throws.hpp"
#include "tuned_model.hpp"
#include "unit/io/temporary_directory.hpp"

namespace {

namespace fs = std::filesystem;
using namespace qeft_llm;
using namespace qeft_test;
using nlohmann::json;
using qeft::errc;
using qeft::index_t;

using texts = std::vector<std::string>;

/// A small model with layers of RTN, and a text that has something to learn: "abcabc" and noise.
struct workplace {
  temporary_directory dir;
  reference_model model = write_small_model(dir / "full", json::object(), 1);

  workplace() {
    write_all(dir / "data.txt", letters(1200, 1));
    write_all(dir / "held.txt", letters(400, 2));
    quantize_options q;
    q.model = path("full");
    q.out = path("model");
    q.calibration = path("data.txt");
    q.layer.group_size = 32;
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
    for (int i = 0; i < count; ++i) {
      all += random.chance(10) ? static_cast<char>('a' + random.integer(0, 25)) : "abc"[i % 3];
    }
    return all;
  }

  std::string path(const std::string& name) const { return (dir / name).string(); }

  finetune_options options() const {
    finetune_options o;
    o.model = path("model");
    o.data = path("data.txt");
    o.validation = path("held.txt");
    o.out = path("out");
    o.seq_len = 32;
    o.steps = 6;
    o.batch = 3;
    o.rate = 3e-3;
    o.clip = 1;
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

  /// The mean loss on the validation data of the model with the adapter that was written.
  double merged_loss(const finetune_options& o) const {
    merge_options m;
    m.model = o.model;
    m.out = path("merged");
    m.adapters = {o.out};
    REQUIRE(run_merge(m) == 0);
    double loss = 0;
    double counted = 0;
    {
      const model_source source(m.out);
      const tokenizer tok = tokenizer::from_file(o.model + "/tokenizer.json");
      const auto held =
          training_data_reader(o.model, source.config(), tok).read(o.validation, o.seq_len);
      tuned_model merged(qeft::on_host(1), source);
      for (const training_sample& s : held.samples) loss += merged.loss(s);
      counted = static_cast<double>(held.counted);
    }
    fs::remove_all(m.out);
    return loss / counted;
  }

  /// Whether it ends with this error and leaves nothing new.
  bool refused(const finetune_options& o, errc code, std::initializer_list<const char*> why) const {
    const auto others = [&] {
      texts names = dir.files();
      names.erase(std::remove(names.begin(), names.end(), "log"), names.end());
      return names;
    };
    const texts before = others();
    const bool good = throws_with(code, why, [&] { run_finetune(o); });
    const texts after = others();
    if (after != before) std::printf("something was left behind\n");
    return good && after == before;
  }
};

/// Runs in a process that is killed: behind a step or, without one, after a while.
void run_and_die(finetune_options o, index_t step, unsigned microseconds = 0) {
  const ::pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    o.after_step = [&](index_t done) {
      if (done == step) ::kill(::getpid(), SIGKILL);
    };
    try {
      run_finetune(o);
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

/// What a shell command writes to stdout; it must succeed.
std::string output_of(const std::string& command) {
  std::FILE* pipe = ::popen(command.c_str(), "r");
  REQUIRE(pipe != nullptr);
  std::string text;
  char buffer[4096];
  while (const std::size_t n = std::fread(buffer, 1, sizeof buffer, pipe)) text.append(buffer, n);
  CHECK(::pclose(pipe) == 0);
  return text;
}

}  // namespace

TEST_CASE("tuning lowers the loss, and the merged model has the training's validation loss") {
  const workplace w;
  finetune_options o = w.options();
  o.steps = 30;
  REQUIRE(run_finetune(o) == 0);
  CHECK(w.dir.files() == texts{"data.txt", "full", "held.txt", "log", "model", "out"});
  const auto log = w.log();
  REQUIRE(log.size() == 31);
  const auto before = log.front().at("validation_loss").get<double>();
  double best = before;
  for (const json& line : log) best = std::min(best, line.value("validation_loss", best));
  CHECK(best < before - 0.5);
  CHECK(log.back().at("loss").get<double>() < log.at(1).at("loss").get<double>() - 0.5);

  CHECK(w.merged_loss(o) == best);

  // Here the best are not the last: the text to validate with is another.
  write_all(w.dir / "held.txt", "zyxwzyxwzyxw");
  fs::remove(o.out);
  REQUIRE(run_finetune(o) == 0);
  const auto worse = w.log();
  const auto first = worse.front().at("validation_loss").get<double>();
  CHECK(worse.back().at("validation_loss").get<double>() > first);
  best = first;
  for (const json& line : worse) best = std::min(best, line.value("validation_loss", best));
  CHECK(w.merged_loss(o) == best);
}

TEST_CASE("a killed run goes on where it was, to the same bytes and the same log") {
  const workplace w;
  finetune_options o = w.options();
  o.weak_dropout = 0.3;
  o.l2_sp = 0.1;
  o.schedule = qeft::schedule_kind::cosine;
  o.threads = 1;
  REQUIRE(run_finetune(o) == 0);
  const std::string expected = read_all(o.out);
  const auto log = w.log();
  const auto is_as_expected = [&] {
    const bool same = read_all(o.out) == expected && w.log() == log;
    fs::remove(o.out);
    return same && w.dir.files() == texts{"data.txt", "full", "held.txt", "log", "model"};
  };
  CHECK(is_as_expected());
  o.threads = 2;
  for (const index_t every : {1, 4}) {
    o.checkpoint_every = every;
    for (index_t step = 1; step <= 6; ++step) {
      run_and_die(o, step);
      CHECK_FALSE(fs::exists(o.out));
      REQUIRE(run_finetune(o) == 0);
      CHECK(is_as_expected());
    }
  }
  // At random moments, which lie closer or further apart until enough are behind a checkpoint.
  o.checkpoint_every = 1;
  random_source random(5);
  double latest = 1.5e5;  // microseconds
  int gone_on = 0;
  for (int i = 0; i < 10 || (gone_on < 3 && i < 100); ++i) {
    run_and_die(o, 0, static_cast<unsigned>(random.integer(1000, std::llround(latest))));
    if (fs::exists(o.out)) {
      latest = std::max(latest / 1.5, 2e3);
    } else if (fs::exists(w.dir / "out.unfinished.partial/checkpoint.safetensors")) {
      ++gone_on;
    } else {
      latest *= 1.5;
    }
    if (!fs::exists(o.out)) REQUIRE(run_finetune(o) == 0);
    fs::remove_all(w.dir / "out.unfinished.partial");  // of one that was killed at its very end
    CHECK(is_as_expected());
  }
  CHECK(gone_on >= 3);
}

TEST_CASE("an error costs no more than what is done since the last checkpoint") {
  const workplace w;
  finetune_options o = w.options();
  REQUIRE(run_finetune(o) == 0);
  const std::string expected = read_all(o.out);
  fs::remove(o.out);
  struct interruption {};
  o.checkpoint_every = 2;
  o.after_step = [](index_t step) {
    if (step == 3) throw interruption();
  };
  CHECK_THROWS_AS(run_finetune(o), interruption);
  CHECK(fs::exists(w.dir / "out.unfinished.partial"));
  std::vector<index_t> steps;
  o.after_step = [&](index_t step) { steps.push_back(step); };
  REQUIRE(run_finetune(o) == 0);
  CHECK(steps == std::vector<index_t>{3, 4, 5, 6});
  CHECK(read_all(o.out) == expected);
}

TEST_CASE("a checkpoint of other settings or data is refused by name, and stays") {
  const workplace w;
  const finetune_options o = w.options();
  run_and_die(o, 3);
  const auto refused = [&](auto change, std::initializer_list<const char*> why) {
    finetune_options other = o;
    change(other);
    return w.refused(other, errc::invalid_argument, why);
  };
  CHECK(refused([](auto& x) { x.rate = 1e-2; }, {"another --lr", "0.003 there", "0.01 here"}));
  CHECK(refused([](auto& x) { x.batch = 4; }, {"another --batch", "3 there", "4 here"}));
  CHECK(refused([](auto& x) { x.seed = 4; }, {"another --seed"}));
  CHECK(refused([](auto& x) { x.steps = 7; }, {"another --steps"}));
  CHECK(refused([](auto& x) { x.clip = 7; }, {"another --clip"}));
  CHECK(refused([](auto& x) { x.l2_sp = 7; }, {"another --l2-sp"}));
  CHECK(refused([](auto& x) { x.weight_decay = 7; }, {"another --weight-decay"}));
  CHECK(refused([](auto& x) { x.weak_dropout = .7; }, {"another --weak-dropout"}));
  CHECK(refused([](auto& x) { x.warmup = 2; }, {"another --warmup"}));
  CHECK(refused([](auto& x) { x.eval_every = 3; }, {"another --eval-every"}));
  CHECK(refused([](auto& x) { x.schedule = qeft::schedule_kind::linear; }, {"another --schedule"}));
  CHECK(refused([](auto& x) { x.validation.clear(); }, {"another data of --data"}));
  CHECK(refused([&](auto& x) { x.data = w.path("held.txt"); }, {"another data of --data"}));
  CHECK(refused([&](auto& x) { x.validation = x.data; }, {"another data of --validation"}));
  const std::string checkpoint = w.path("out.unfinished.partial/checkpoint.safetensors");
  std::string bytes = read_all(checkpoint);
  bytes[bytes.size() / 2] ^= 1;
  write_all(checkpoint, bytes);
  CHECK(w.refused(o, errc::corrupt_file, {"checkpoint.safetensors", "damaged"}));
  fs::remove_all(w.dir / "out.unfinished.partial");
  CHECK(run_finetune(o) == 0);
}

TEST_CASE("what is wrong is said, and nothing is left") {
  const workplace w;
  const auto refused = [&](errc code, auto change, std::initializer_list<const char*> why) {
    finetune_options o = w.options();
    change(o);
    return w.refused(o, code, why);
  };
  constexpr errc bad = errc::invalid_argument;
  CHECK(refused(bad, [&](auto& o) { o.out = w.path("model"); }, {"--out", "not exist yet"}));
  CHECK(refused(bad, [&](auto& o) { o.out = ""; }, {"--out is empty"}));
  CHECK(refused(errc::io_error, [&](auto& o) { o.out = w.path("held.txt/x"); }, {"held.txt"}));
  CHECK(refused(bad, [&](auto& o) { o.model = w.path("full"); }, {"--model", "not quantised"}));
  CHECK(refused(bad, [&](auto& o) { o.seq_len = 4000; }, {"--seq-len is 4000", "128"}));
  CHECK(refused(bad, [](auto& o) { o.batch = 0; }, {"--batch is 0"}));
  CHECK(refused(bad, [](auto& o) { o.epochs = 0; }, {"--epochs is 0"}));
  CHECK(refused(bad, [](auto& o) { o.steps = -1; }, {"--steps is -1"}));
  CHECK(refused(bad, [](auto& o) { o.validation_share = 1; }, {"--validation-share is 1"}));
  CHECK(refused(bad, [](auto& o) { o.warmup = 70; }, {"--warmup is 70", "steps, 6"}));
  CHECK(refused(bad, [](auto& o) { o.rate = -1; }, {"--lr is -1"}));
  CHECK(refused(errc::io_error, [&](auto& o) { o.data = w.path("no.txt"); }, {"no.txt"}));
  write_all(w.dir / "empty.jsonl", "");
  CHECK(refused(bad, [&](auto& o) { o.data = w.path("empty.jsonl"); }, {"holds no record"}));
  CHECK(refused(bad, [](auto& o) { o.weak_dropout = 1; }, {"--weak-dropout is 1"}));
  CHECK(refused(bad, [](auto& o) { o.clip = NAN; }, {"--clip is nan"}));
  CHECK(refused(bad, [](auto& o) { o.l2_sp = -2; }, {"--l2-sp is -2"}));
  CHECK(refused(bad, [](auto& o) { o.weight_decay = -2; }, {"--weight-decay is -2"}));
  CHECK(refused(bad, [](auto& o) { o.warmup = -2; }, {"--warmup is -2"}));
  // A rate at which 16 bits overflow, behind a checkpoint, and before any validation.
  const auto overflow = [](auto& o) {
    o.rate = 3e4;
    o.eval_every = 0;
  };
  CHECK(refused(errc::not_finite, overflow, {"step ", "--lr (here 30000)"}));

  CHECK(refused(bad, [](auto& o) { o.template_name = "tool"; },
                {"--template is tool", "without messages"}));
  CHECK(refused(bad, [](auto& o) { o.too_long = long_records::cut; },
                {"--long-records is cut", "for a text"}));
  quantize_options q;
  q.model = w.path("full");
  q.out = w.path("none");
  q.layer.method = qeft::solver::layer_method::rtn;
  q.layer.group_size = 32;
  q.weak_columns = 0;
  q.order = column_order::natural;
  q.calibration = w.path("data.txt");
  q.samples = 6;
  q.seq_len = 32;
  REQUIRE(run_quantize(q) == 0);
  CHECK(refused(bad, [&](auto& o) { o.model = q.out; },
                {"--model is ", "no weak columns", "--weak-columns"}));

  struct rlimit old {};
  ::getrlimit(RLIMIT_FSIZE, &old);
  struct rlimit small = old;
  small.rlim_cur = 4096;
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  ::setrlimit(RLIMIT_FSIZE, &small);
  const bool full = refused(errc::io_error, [](auto&) {}, {"cannot write"});
  ::setrlimit(RLIMIT_FSIZE, &old);
  std::signal(SIGXFSZ, handler);
  CHECK(full);
}

TEST_CASE("a log replaces a log, and nothing else") {
  const workplace w;
  const auto refused = [&](const std::string& log, std::initializer_list<const char*> why) {
    finetune_options o = w.options();
    o.log = log;
    const std::string before = fs::is_regular_file(log) ? read_all(log) : "";
    return w.refused(o, errc::invalid_argument, why) &&
           before == (fs::is_regular_file(log) ? read_all(log) : "");
  };
  CHECK(refused(w.path("data.txt"), {"--log is ", "another file than --data"}));
  CHECK(refused(w.path("model/../data.txt"), {"another file than --data"}));
  CHECK(refused(w.path("held.txt"), {"another file than --validation"}));
  CHECK(refused(w.path("out"), {"another file than --out"}));
  fs::create_hard_link(w.dir / "data.txt", w.dir / "link");
  CHECK(refused(w.path("link"), {"another file than --data"}));
  CHECK(refused(w.path("model"), {"--log is ", "a log to replace"}));
  for (const char* content : {"text\n", "{\"a\": 1}\n", "[1]\n", "{\"step\": 0.5}\n", "\n", "7"}) {
    write_all(w.dir / "notes", content);
    CHECK(refused(w.path("notes"), {"--log is ", "a log to replace", "first line"}));
  }
  finetune_options o = w.options();
  for (const char* content : {"", "{\"step\": 3}", "{\"step\": 0}\n{\"step\": 1}\n"}) {
    write_all(w.dir / "log", content);
    REQUIRE(run_finetune(o) == 0);
    CHECK(w.log().size() == 7);
    fs::remove(o.out);
  }
}

TEST_CASE("a run that stops being finite leaves the best that it found") {
  const workplace w;
  finetune_options o = w.options();
  o.eval_every = 1;
  // Takes the values further back with every step, and always too far.
  o.l2_sp = 100 / o.rate;
  o.steps = 3;
  REQUIRE(run_finetune(o) == 0);
  const std::string expected = read_all(o.out);
  const auto log = w.log();
  const auto best = std::min_element(log.begin(), log.end(), [](const json& a, const json& b) {
    return a.at("validation_loss") < b.at("validation_loss");
  });
  REQUIRE(best->at("step") > 0);
  fs::remove(o.out);
  o.steps = 9;
  const std::string step = "out holds the adapter of step " + best->at("step").dump() + ",";
  CHECK(throws_with(errc::not_finite, {"step 5: ", "--lr (here", step.c_str()},
                    [&] { run_finetune(o); }));
  CHECK(read_all(o.out) == expected);
  CHECK(w.dir.files() == texts{"data.txt", "full", "held.txt", "log", "model", "out"});
}

TEST_CASE("an adapter that changes nothing is called so") {
  const workplace w;
  write_all(w.dir / "held.txt", "zyxwzyxwzyxw");
  const auto said = [&](const std::string& data) {
    const std::string command = "exec 2>&1; '" QEFT_LLM "' finetune --model '" + w.path("model") +
                                "' --data '" + w.path("data.txt") + "' --validation '" +
                                w.path(data) + "' --out '" + w.path("out") +
                                "' --seq-len 32 --batch 3 --steps 6 --lr 3e-3 --threads 2";
    const std::string text = output_of(command);
    CHECK(fs::remove(w.dir / "out"));
    return text;
  };
  const std::string notice = "no step improved the validation loss; the adapter changes nothing";
  CHECK(said("held.txt").find(notice) != std::string::npos);
  CHECK(said("data.txt").find(notice) == std::string::npos);
}

TEST_CASE("a merged model is not tuned, and a finished run names what was left of it") {
  const workplace w;
  finetune_options o = w.options();
  o.steps = 1;
  REQUIRE(run_finetune(o) == 0);
  merge_options m;
  m.model = o.model;
  m.out = w.path("merged");
  m.adapters = {o.out};
  REQUIRE(run_merge(m) == 0);
  fs::create_directory(w.dir / "out.unfinished.partial");
  CHECK(
      w.refused(o, errc::invalid_argument, {"--out is ", "out.unfinished.partial is of the run"}));
  o.model = m.out;
  o.out = w.path("another");
  CHECK(w.refused(o, errc::invalid_argument, {"--model is ", "merged", "unmerge"}));
}

TEST_CASE("the command: records, a share that validates, and JSON") {
  const workplace w;
  std::string records;
  for (int i = 0; i < 40; ++i) {
    records += json{{"prompt", "abc" + w.letters(i, 3)}, {"response", "xyzxyz"}}.dump() + "\n";
  }
  write_all(w.dir / "data.jsonl", records);
  const auto run = [&](const std::string& more) {
    const std::string command = "exec 2>/dev/null; '" QEFT_LLM "' finetune --model '" +
                                w.path("model") + "' --data '" + w.path("data.jsonl") +
                                "' --out '" + w.path("out") +
                                "' --seq-len 64 --batch 4 --lr 3e-3 --threads 2 --json " + more;
    std::string text = output_of(command);
    std::vector<json> lines;
    while (!text.empty()) {
      lines.push_back(json::parse(text.substr(0, text.find('\n'))));
      text.erase(0, text.find('\n') + 1);
    }
    fs::remove(w.dir / "out");
    return lines;
  };
  const auto lines = run("--epochs 2 --validation-share 0.1 --schedule linear --warmup 3");
  REQUIRE(lines.size() == 1 + 18 + 1);  // step 0, two passes of 36 samples, the result
  CHECK(lines.front().at("step") == 0);
  CHECK(lines.at(1).at("rate").get<double>() < lines.at(2).at("rate").get<double>());
  CHECK(lines.at(5).at("rate").get<double>() > lines.at(6).at("rate").get<double>());
  CHECK(lines.at(1).at("tokens_per_second").get<double>() > 0);
  CHECK(lines.at(18).at("loss").get<double>() < lines.at(1).at("loss").get<double>());
  const json& result = lines.back();
  CHECK(result.at("steps") == 18);
  CHECK(result.at("samples") == 36);
  CHECK(result.at("validation_samples") == 4);
  CHECK(result.at("best_loss").get<double>() < result.at("start_loss").get<double>());
  CHECK(run("--steps 2 --validation-share 0").back().at("best_loss").is_null());

  const std::string zero = "2>&1 '" QEFT_LLM "' finetune --model m --data d --out o --steps 0";
  CHECK(output_of(zero + " || true").find("--steps: Value 0 not in range") != std::string::npos);
}
