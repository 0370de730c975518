// SPDX-License-Identifier: Apache-2.0
// `qeft-llm heal`: checks everything, draws the samples, trains, writes the checkpoint.
#include "heal.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>

#include "healing.hpp"
#include "llama.hpp"
#include "model_copy.hpp"
#include "model_match.hpp"
#include "qeft/core/version.hpp"
#include "qeft/io/adapter.hpp"
#include "qeft/io/atomic_directory.hpp"
#include "qeft/io/json.hpp"
#include "text_windows.hpp"
#include "training_run.hpp"

namespace qeft_llm {
namespace {

namespace fs = std::filesystem;
namespace io = qeft::io;
using nlohmann::json;
using nlohmann::ordered_json;
using qeft::errc;
using qeft::fail;
using qeft::index_t;
using qeft::text;

// By which the rates are chosen.
constexpr std::size_t calibration_samples = 4;

template <class Value>
[[noreturn]] void refuse_healing(const char* option, const Value& value, const std::string& rule) {
  fail(errc::invalid_argument, text("heal: ", option, " is ", value, ", but must be ", rule));
}

bool trains(const heal_options& o, const char* part) {
  return std::find(o.train.begin(), o.train.end(), part) != o.train.end();
}

/// What needs neither model nor text.
void check_options(const heal_options& o) {
  constexpr index_t most = index_t{1} << 31;
  const auto check = [](const char* option, index_t value, index_t least) {
    if (value < least || value > most)
      refuse_healing(option, value, text("in [", least, ", 2^31]"));
  };
  check("--steps", o.steps, 1);
  check("--batch", o.batch, 1);
  check("--warmup", o.warmup, 0);
  check("--validation-windows", o.validation_windows, 0);
  check("--eval-every", o.eval_every, 0);
  check("--checkpoint-every", o.checkpoint_every, 0);
  const auto check_rate = [](const char* option, double value) {
    if (!(value > 0 && std::isfinite(value))) refuse_healing(option, value, "a number above 0");
  };
  check_rate("--lr", o.rate);
  check_rate("--scale-lr", o.scale_rate);
  check_rate("--norm-lr", o.norm_rate);
  if (!(o.clip >= 0 && std::isfinite(o.clip)))
    refuse_healing("--clip", o.clip, "a number of at least 0");
  for (const std::string& part : o.train) {
    if (part != "weak" && part != "scales" && part != "norms") {
      refuse_healing("--train", part, "a list of weak, scales and norms");
    }
  }
  if (o.train.empty()) refuse_healing("--train", "empty", "a list of weak, scales and norms");
}

void check_models(const heal_options& o, const model_config& ours, const model_config& theirs) {
  if (!ours.quantization) {
    refuse_healing("--model", o.model + ", which is not quantised",
                   "what `qeft-llm quantize` wrote");
  }
  if (fs::exists(fs::path(o.model) / "before_merge.qeft")) {
    refuse_healing("--model", o.model + ", which adapters are merged into",
                   "their base: heal that, then merge");
  }
  if (theirs.quantization) {
    refuse_healing("--reference", o.reference + ", which is quantised", "a full-precision model");
  }
  if (architecture_of(ours) != architecture_of(theirs)) {
    refuse_healing("--reference", o.reference + ", which is " + architecture_of(theirs),
                   "the model that --model was made from, " + architecture_of(ours));
  }
  const index_t longest = std::min(ours.max_position_embeddings, theirs.max_position_embeddings);
  if (o.seq_len < 2 || o.seq_len > longest) {
    refuse_healing("--seq-len", o.seq_len,
                   text("between 2 and the models' max_position_embeddings = ", longest));
  }
}

/// A fingerprint of samples.
std::string windows_of(const std::vector<training_sample>& samples) {
  io::stream_hash hash;
  for (const training_sample& s : samples) hash.update(io::as_bytes(s.tokens));
  return text(samples.size(), " windows, ", io::to_hex(hash.finish()));
}

class healer {
 public:
  healer(const heal_options& options, communicator& ranks)
      : o_(options),
        ranks_(ranks),
        exec_(options.threads),
        source_(options.model),
        full_(options.reference) {
    check_models(o_, source_.config(), full_.config());
  }

  void run() {
    std::optional<io::atomic_directory> out;  // of rank 0
    if (ranks_.is_first()) {
      out.emplace(o_.out, io::leftovers::reuse);
      out->keep(out->resumed());  // an error does not cost what a kill left
    }
    read_text();
    compare_fingerprints();
    source_.weights().require(expected_tensors(source_.config()));
    const trainer_options how = training();
    healed_model model(exec_, source_, full_, parts());
    source_.report_rounding();
    const auto few = std::min(samples_.size(), calibration_samples);
    model.calibrate({samples_.begin(), samples_.begin() + static_cast<std::ptrdiff_t>(few)});
    trainer train(exec_, model, how, samples_, validation_, ranks_);
    run_training(train, out ? &*out : nullptr, setting(how),
                 {o_.log, o_.json, o_.checkpoint_every, o_.after_step});
    train.take_best();
    together(ranks_, [&] {
      if (!out) return;
      const std::string fingerprint = write(model, train, how, *out);
      out->commit();
      report(train, model, how, fingerprint);
    });
  }

 private:
  /// Windows to train on and to validate with.
  void read_text() {
    const tokenizer tok = tokenizer::from_file(o_.model + "/tokenizer.json");
    check_same_vocabulary("heal", o_.reference, full_.config(), source_.config(), tok);
    auto windows = text_windows(tok, o_.text, o_.seq_len, o_.validation_windows + o_.batch);
    const auto all = static_cast<index_t>(windows.size());
    const index_t wanted = o_.validation_windows + o_.steps * o_.batch;
    windows = draw_windows(std::move(windows), std::min(all, wanted), o_.seed);
    if (all < wanted) {
      std::fprintf(stderr,
                   "notice: the text has %lld windows of %lld tokens; to see each once, %lld "
                   "steps would do\n",
                   static_cast<long long>(all), static_cast<long long>(o_.seq_len),
                   static_cast<long long>(steps_of(all - o_.validation_windows, o_.batch)));
    }
    // A prefix is context, not text to predict.
    const std::size_t context = std::max<std::size_t>(1, tok.prefix().size());
    for (std::vector<int>& window : windows) {
      training_sample s{std::move(window), {}};
      s.counted.assign(s.tokens.size(), 1);
      std::fill_n(s.counted.begin(), context, char{0});
      const bool validates = static_cast<index_t>(validation_.size()) < o_.validation_windows;
      (validates ? validation_ : samples_).push_back(std::move(s));
    }
  }

  /// Healing towards another model may be wanted, but rarely is.
  void compare_fingerprints() const {
    const json& how = source_.config().quantization->provenance;
    const auto made_from = how.find("model_fingerprint");
    if (made_from == how.end()) return;
    const std::string given = io::weights_fingerprint(full_.weights().reader());
    if (*made_from == given) return;
    std::fprintf(stderr,
                 "notice: --model was made from %s, but --reference is %s: other files, or "
                 "another model\n",
                 io::dump_json(*made_from).c_str(), given.c_str());
  }

  healed_parts parts() const {
    healed_parts p;
    p.linears = {trains(o_, "weak"), trains(o_, "scales")};
    p.norms = trains(o_, "norms");
    p.scale_rate = o_.scale_rate / o_.rate;
    p.norm_rate = o_.norm_rate / o_.rate;
    return p;
  }

  trainer_options training() const {
    trainer_options t;
    t.batch = o_.batch;
    t.steps = o_.steps;
    t.rate = {qeft::schedule_kind::cosine, o_.rate, std::min(o_.warmup, o_.steps / 4), t.steps,
              0.0};
    t.clip = o_.clip;
    t.eval_every = o_.eval_every;
    t.seed = o_.seed;
    return t;
  }

  /// What was chosen, by the options that people know it by.
  json description(const trainer_options& t) const {
    return {{"steps", t.steps},
            {"batch", t.batch},
            {"seq_len", o_.seq_len},
            {"train", trained()},
            {"lr", o_.rate},
            {"scale_lr", o_.scale_rate},
            {"norm_lr", o_.norm_rate},
            {"warmup", t.rate.warmup},
            {"clip", t.clip},
            {"validation_windows", o_.validation_windows},
            {"eval_every", t.eval_every},
            {"seed", t.seed}};
  }

  /// Everything that the result depends on.
  json setting(const trainer_options& t) const {
    json all = description(t);
    all["version"] = {QEFT_VERSION_MAJOR, QEFT_VERSION_MINOR, QEFT_VERSION_PATCH};
    all["--model"] = io::weights_fingerprint(source_.weights().reader());
    all["--reference"] = io::weights_fingerprint(full_.weights().reader());
    all["windows of --text"] = windows_of(samples_);
    all["windows to validate with"] = windows_of(validation_);
    return all;
  }

  json trained() const {
    json all = json::array();
    for (const char* part : {"weak", "scales", "norms"}) {
      if (trains(o_, part)) all.push_back(part);
    }
    return all;
  }

  /// @return the fingerprint
  std::string write(const healed_model& model, const trainer& train, const trainer_options& how,
                    const io::atomic_directory& out) const {
    const fs::path from = o_.model;
    const io::safetensors_reader& reader = source_.weights().reader();
    std::string fingerprint =
        copy_model(from, reader, out.partial(),
                   [&](const io::tensor_view& tensor) { return model.stored(tensor); });
    json config = io::load_json(from / "config.json");
    json provenance = description(how);
    provenance["base"] = io::weights_fingerprint(reader);
    provenance["reference"] = io::weights_fingerprint(full_.weights().reader());
    if (const auto& best = train.best()) {
      provenance["start_kl"] = *train.start_loss();
      provenance["kl"] = best->loss;
      provenance["best_step"] = best->step;
    }
    config["quantization_config"]["provenance"]["heal"] = std::move(provenance);
    io::write_text_file(out.partial() / "config.json", io::dump_json(config, 2) + "\n");
    fs::remove(out.partial() / checkpoint_file);
    return fingerprint;
  }

  void report(const trainer& train, const healed_model& model, const trainer_options& how,
              const std::string& fingerprint) const {
    index_t parameters = 0;
    for (const parameter& p : model.parameters()) parameters += p.size();
    const auto& best = train.best();
    if (best) {
      std::fprintf(stderr, "KL per token on %zu windows of the text: %.5f before, %.5f after\n",
                   validation_.size(), *train.start_loss(), best->loss);
    }
    if (!o_.json) return;
    ordered_json all = {{"out", o_.out},
                        {"steps", how.steps},
                        {"tokens", how.steps * how.batch * o_.seq_len},
                        {"parameters", parameters},
                        {"fingerprint", fingerprint},
                        {"start_kl", nullptr},
                        {"kl", nullptr},
                        {"best_step", nullptr}};
    if (best) {
      all["start_kl"] = *train.start_loss();
      all["kl"] = best->loss;
      all["best_step"] = best->step;
    }
    std::printf("%s\n", all.dump(-1, ' ', false, json::error_handler_t::replace).c_str());
  }

  heal_options o_;
  communicator& ranks_;
  qeft::on_host exec_;
  model_source source_;
  model_source full_;
  std::vector<training_sample> samples_;
  std::vector<training_sample> validation_;
};

}  // namespace

int run_heal(const heal_options& options, communicator& ranks) {
  check_options(options);
  healer(options, ranks).run();
  return 0;
}

}  // namespace qeft_llm
