// SPDX-License-Identifier: Apache-2.0
#include "training_run.hpp"

#include <cstdio>
#include <filesystem>
#include <memory>
#include <optional>
#include <string_view>

#include "progress.hpp"
#include "qeft/core/text.hpp"
#include "qeft/io/mapped_file.hpp"

namespace qeft_llm {
namespace {

namespace fs = std::filesystem;
namespace io = qeft::io;
using nlohmann::json;
using nlohmann::ordered_json;
using qeft::errc;
using qeft::index_t;
using qeft::text;

/// The step that a line of a log is of; nothing for any other line.
std::optional<index_t> step_of(std::string_view line) {
  const json found = json::parse(line, nullptr, /*allow_exceptions=*/false);
  if (!found.is_object()) return std::nullopt;
  const auto step = found.find("step");
  if (step == found.end() || !step->is_number_integer()) return std::nullopt;
  return step->get<index_t>();
}

std::string_view text_of(const io::mapped_file& file) {
  return {reinterpret_cast<const char*>(file.bytes().data()),
          static_cast<std::size_t>(file.bytes().size())};
}

/// Lines of JSON, to stdout and to a file.
class step_log {
 public:
  /// @param file  empty for none
  /// @param steps lines of an earlier run up to this step stay in the file; without a step, none
  step_log(const std::string& file, bool to_stdout, std::optional<index_t> steps)
      : name_(file), to_stdout_(to_stdout) {
    if (file.empty()) return;
    io::write_text_file(file, steps ? earlier_lines(*steps) : std::string());
    file_.reset(std::fopen(file.c_str(), "ab"));
    if (!file_) io::fail_io("cannot write", name_);
  }

  void add(const ordered_json& line) {
    const std::string text = line.dump() + "\n";
    if (to_stdout_) {
      std::fputs(text.c_str(), stdout);
      std::fflush(stdout);
    }
    if (!file_) return;
    if (std::fputs(text.c_str(), file_.get()) < 0 || std::fflush(file_.get()) != 0) {
      io::fail_io("cannot write", name_);
    }
  }

 private:
  std::string earlier_lines(index_t steps) const {
    std::error_code unknown;  // then opening says why
    if (!fs::exists(name_, unknown)) return {};
    const io::mapped_file mapped(name_);
    std::string_view rest = text_of(mapped);
    std::string kept;
    for (std::size_t end; (end = rest.find('\n')) != std::string_view::npos;) {
      const std::string_view line = rest.substr(0, end + 1);
      const std::optional<index_t> step = step_of(line);
      if (!step || *step > steps) break;
      kept += line;
      rest.remove_prefix(end + 1);
    }
    return kept;
  }

  std::string name_;
  bool to_stdout_;
  std::unique_ptr<std::FILE, int (*)(std::FILE*)> file_{nullptr, &std::fclose};
};

/// Every rank reads options, model and data by itself.
void require_same_setting(communicator& ranks, const json& setting) {
  std::string first = io::dump_json(setting);
  broadcast(ranks, first);
  together(ranks, [&] {
    const auto difference = find_difference(json::parse(first), setting);
    if (!difference) return;
    qeft::fail(errc::invalid_argument,
               text("rank ", ranks.rank(), " has another ", difference->key,
                    " than rank 0: ", difference->second, " instead of ", difference->first));
  });
}

/// @param save called on all ranks
template <class Save>
void step_through(trainer& train, step_log& log, const run_options& options, const Save& save) {
  progress bar("training", train.steps() - train.step());
  std::string validation;
  const auto measured = [&](double loss) {
    validation = text(", validation ", loss, ", best ", train.best()->loss);
  };
  if (const auto loss = train.measure_start()) {
    measured(*loss);
    together(train.ranks(), [&] { log.add({{"step", 0}, {"validation_loss", *loss}}); });
  }
  while (!train.done()) {
    const step_report r = train.advance();
    const double speed = static_cast<double>(r.tokens) / r.seconds;
    if (r.validation_loss) measured(*r.validation_loss);
    char note[80];
    std::snprintf(note, sizeof note, "loss %.4f, %.0f tokens/s", r.loss, speed);
    ordered_json line = {{"step", r.step},
                         {"loss", r.loss},
                         {"rate", r.rate},
                         {"gradient_norm", r.gradient_norm},
                         {"tokens_per_second", speed}};
    if (r.validation_loss) line["validation_loss"] = *r.validation_loss;
    const index_t every = options.checkpoint_every;
    together(train.ranks(), [&] {
      log.add(line);
      if (every > 0 && (train.done() || train.step() % every == 0)) save();
    });
    bar.advance(1, note + validation);
    if (options.after_step) options.after_step(train.step());
  }
}

}  // namespace

bool may_be_log(const std::string& file) {
  const io::mapped_file mapped(file);
  const std::string_view all = text_of(mapped);
  return all.empty() || step_of(all.substr(0, all.find('\n')));
}

void run_training(trainer& train, io::atomic_directory* out, const json& setting,
                  const run_options& options) {
  communicator& ranks = train.ranks();
  require_same_setting(ranks, setting);
  const fs::path checkpoint = out != nullptr ? out->partial() / checkpoint_file : fs::path();
  bool going_on = out != nullptr && fs::exists(checkpoint);
  broadcast(ranks, going_on);
  if (going_on) {
    train.load(checkpoint, setting);
    std::fprintf(stderr, "going on with what an interrupted run left: %lld of %lld steps\n",
                 static_cast<long long>(train.step()), static_cast<long long>(train.steps()));
  }
  std::optional<step_log> log;
  together(ranks, [&] {
    log.emplace(out != nullptr ? options.log : std::string(), options.json && out != nullptr,
                going_on ? std::optional(train.step()) : std::nullopt);
  });
  const auto save = [&] {
    if (out == nullptr) return;
    train.save(checkpoint, setting);
    out->keep();
  };
  try {
    step_through(train, *log, options, save);
  } catch (const qeft::error& e) {
    // It would only come to this again.
    if (e.code() == errc::not_finite && out != nullptr) out->keep(false);
    throw;
  }
}

}  // namespace qeft_llm
