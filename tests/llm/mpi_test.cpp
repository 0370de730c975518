// SPDX-License-Identifier: Apache-2.0
// The command under mpirun: the same bytes as one process, also gone on with after a rank died, and
// one message for an error.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "quantize.hpp"
#include "reference_model.hpp"
#include "support/catch.hpp"
#include "support/skip.hpp"
#include "unit/io/temporary_directory.hpp"

namespace {

namespace fs = std::filesystem;
using namespace qeft_llm;
using namespace qeft_test;
using nlohmann::json;

using texts = std::vector<std::string>;

/// What a command came to.
struct outcome {
  int status = 0;
  std::string output;  // stdout and stderr

  int count(const std::string& what) const {
    int found = 0;
    for (std::size_t at = 0; (at = output.find(what, at)) != std::string::npos; ++at) ++found;
    return found;
  }
};

outcome run(const std::string& command) {
  outcome o;
  std::FILE* pipe = ::popen(("exec 2>&1; " + command).c_str(), "r");
  REQUIRE(pipe != nullptr);
  char buffer[4096];
  while (const std::size_t n = std::fread(buffer, 1, sizeof buffer, pipe)) {
    o.output.append(buffer, n);
  }
  o.status = ::pclose(pipe);
  return o;
}

std::string on_ranks(int count, const std::string& command) {
  return "'" QEFT_MPIRUN "' --allow-run-as-root --oversubscribe --bind-to none -np " +
         std::to_string(count) + " " + command;
}

/// Whether mpirun works here.
bool has_mpi() {
  const std::string mpirun = QEFT_MPIRUN;
  if (mpirun.empty()) {
    skip("qeft-llm is built without MPI");
    return false;
  }
  if (run("'" + mpirun + "' --version").output.find("open-mpi.org") == std::string::npos) {
    skip(mpirun + " is not Open MPI's");
    return false;
  }
  if (run(on_ranks(2, "true")).status != 0) {
    skip(mpirun + " starts no processes here (it needs a network interface)");
    return false;
  }
  return true;
}

/// A small quantised model, and texts.
struct workplace {
  temporary_directory dir;

  workplace() {
    write_small_model(dir / "full", json::object(), 1);
    std::string text;
    for (int i = 0; i < 1200; ++i)
      text += i % 11 == 0 ? static_cast<char>('a' + i % 26) : "abc"[i % 3];
    write_all(dir / "data.txt", text);
    write_all(dir / "held.txt", text.substr(0, 333));
    quantize_options q;
    q.model = path("full");
    q.out = path("model");
    q.calibration = path("data.txt");
    q.layer.group_size = 32;
    q.layer.method = qeft::solver::layer_method::rtn;
    q.weak_columns = 8;
    q.samples = 6;
    q.seq_len = 32;
    q.threads = 1;
    REQUIRE(run_quantize(q) == 0);
  }

  std::string path(const std::string& name) const { return (dir / name).string(); }

  std::string finetune(const std::string& more = {}) const {
    return "'" QEFT_LLM "' finetune --model '" + path("model") + "' --data '" + path("data.txt") +
           "' --validation '" + path("held.txt") + "' --out '" + path("out") + "' --log '" +
           path("log") +
           "' --seq-len 32 --batch 5 --lr 3e-3 --eval-every 4 --checkpoint-every 1 --threads 1 "
           "--l2-sp 0.1 --weak-dropout 0.3 " +
           more;
  }
  std::string heal(const std::string& more = {}) const {
    return "'" QEFT_LLM "' heal --model '" + path("model") + "' --reference '" + path("full") +
           "' --text '" + path("data.txt") + "' --out '" + path("out") +
           "' --seq-len 32 --batch 3 --steps 4 --validation-windows 3 --checkpoint-every 1 "
           "--threads 1 " +
           more;
  }

  /// Also while it is written.
  std::ptrdiff_t log_lines() const {
    if (!fs::exists(dir / "log")) return 0;
    const std::string text = read_all(dir / "log");
    return std::count(text.begin(), text.end(), '\n');
  }

  /// The lines of the log, but for the time.
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
};

/// The process ids that ranks wrote to DIR/rank.N, once all are there.
std::vector<::pid_t> pids_in(const temporary_directory& dir, int count) {
  std::vector<::pid_t> pids;
  while (static_cast<int>(pids.size()) < count) {
    const fs::path file = dir / ("rank." + std::to_string(pids.size()));
    const std::string text = fs::exists(file) ? read_all(file) : "";
    if (text.empty() || text.back() != '\n') {
      ::usleep(2000);
    } else {
      pids.push_back(static_cast<::pid_t>(std::stol(text)));
    }
  }
  return pids;
}

}  // namespace

TEST_CASE("ranks write the bytes of one process, and one of them speaks") {
  if (!has_mpi()) return;
  const workplace w;
  const std::string command = w.finetune("--steps 9 --json");
  REQUIRE(run(command).status == 0);
  const std::string expected = read_all(w.dir / "out");
  const auto log = w.log();
  REQUIRE(log.size() == 10);
  for (const int ranks : {2, 3}) {
    fs::remove(w.dir / "out");
    const outcome o = run(on_ranks(ranks, command));
    CHECK(o.status == 0);
    CHECK(read_all(w.dir / "out") == expected);
    CHECK(w.log() == log);
    CHECK(o.count("{\"step\":9,") == 1);
    CHECK(o.count("{\"out\":") == 1);
    CHECK(o.count("tokens that count") == 2);
    CHECK(o.count("training: done") == 1);
    CHECK(w.dir.files() == texts{"data.txt", "full", "held.txt", "log", "model", "out"});
  }
}

TEST_CASE("healing by ranks writes the bytes of one process") {
  if (!has_mpi()) return;
  const workplace w;
  const auto weights = [&] {
    const std::string bytes = read_all(w.dir / "out/model.safetensors");
    fs::remove_all(w.dir / "out");
    return bytes;
  };
  REQUIRE(run(w.heal()).status == 0);
  const std::string expected = weights();
  CHECK(run(on_ranks(2, w.heal())).status == 0);
  CHECK(weights() == expected);
}

TEST_CASE("a rank that dies ends the run, and any number of ranks goes on to the same bytes") {
  if (!has_mpi()) return;
  const workplace w;
  const std::string command = w.finetune("--steps 100");
  REQUIRE(run(command).status == 0);
  const std::string expected = read_all(w.dir / "out");
  const auto log = w.log();
  const std::string named = "sh -c 'echo $$ >\"$0/rank.$OMPI_COMM_WORLD_RANK\"; exec \"$@\"' '" +
                            w.dir.path().string() + "' ";
  for (const int victim : {0, 1}) {
    fs::remove(w.dir / "out");
    fs::remove(w.dir / "log");
    std::FILE* pipe = ::popen(("exec 2>&1; " + on_ranks(2, named + command)).c_str(), "r");
    REQUIRE(pipe != nullptr);
    const auto pids = pids_in(w.dir, 2);
    while (w.log_lines() < 5) ::usleep(2000);
    REQUIRE(::kill(pids[static_cast<std::size_t>(victim)], SIGKILL) == 0);
    outcome o;
    char buffer[4096];
    while (const std::size_t n = std::fread(buffer, 1, sizeof buffer, pipe)) {
      o.output.append(buffer, n);
    }
    CHECK(::pclose(pipe) != 0);
    CHECK(o.count("rank " + std::to_string(victim) + " with PID") == 1);
    CHECK(o.count("signal 9") == 1);
    CHECK_FALSE(fs::exists(w.dir / "out"));
    REQUIRE(fs::exists(w.dir / "out.unfinished.partial/checkpoint.safetensors"));
    for (const char* name : {"rank.0", "rank.1"}) fs::remove(w.dir / name);
    const outcome rest = run(victim == 0 ? command : on_ranks(3, command));
    CHECK(rest.status == 0);
    CHECK(rest.count("going on with what an interrupted run left") == 1);
    CHECK(read_all(w.dir / "out") == expected);
    CHECK(w.log() == log);
    CHECK_FALSE(fs::exists(w.dir / "out.unfinished.partial"));
  }
}

TEST_CASE("an error ends all ranks with one message, and nothing is left") {
  if (!has_mpi()) return;
  const workplace w;
  const texts before = w.dir.files();
  const auto fails = [&](const std::string& command, const std::string& message) {
    const outcome o = run(command);
    fs::remove(w.dir / "log");
    const bool good = o.status != 0 && o.count(message) == 1 && o.count("qeft-llm: ") == 1 &&
                      w.dir.files() == before;
    if (!good) std::printf("%s\n", o.output.c_str());
    return good;
  };
  const std::string good = w.finetune("--steps 3");
  CHECK(fails(on_ranks(2, w.finetune("--steps 3 --model no-such-model")), "no-such-model"));
  // On one rank only.
  const auto mixed = [&](const std::string& first, const std::string& second) {
    return on_ranks(1, first) + " : -np 1 " + second;
  };
  CHECK(fails(mixed(good, w.finetune("--steps 3 --data no-such-data.txt")),
              "rank 1: cannot open no-such-data.txt"));
  CHECK(fails(mixed(good, w.finetune("--steps 3 --seed 7")),
              "rank 1 has another --seed than rank 0: 7"));
  CHECK(fails(mixed(good, w.finetune("--steps 3 --data '" + w.path("held.txt") + "'")),
              "rank 1 has another data of --data than rank 0"));
  // Values that stop being finite, and a log that cannot be written.
  CHECK(fails(on_ranks(2, w.finetune("--steps 3 --lr 3e4 --eval-every 0")), "--lr (here 30000)"));
  CHECK(
      fails(on_ranks(2, w.finetune("--steps 3 --log no-such-directory/log")), "no-such-directory"));
  CHECK(
      fails(on_ranks(2, "'" QEFT_LLM "' perplexity --model m --text t"), "only finetune and heal"));
}
