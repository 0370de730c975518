// SPDX-License-Identifier: Apache-2.0
// `qeft-llm finetune`: checks everything, reads the data, trains, writes the adapter.
#include "finetune.hpp"

#include <cmath>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "llama.hpp"
#include "merge.hpp"
#include "qeft/core/version.hpp"
#include "qeft/io/adapter.hpp"
#include "qeft/io/atomic_directory.hpp"
#include "trainer.hpp"
#include "training_run.hpp"
#include "tuned_model.hpp"

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

template <class Value>
[[noreturn]] void refuse_tuning(const char* option, const Value& value, const std::string& rule) {
  fail(errc::invalid_argument, text("finetune: ", option, " is ", value, ", but must be ", rule));
}

void check_out(const finetune_options& o) {
  std::error_code unknown;  // then writing says why
  const bool there = fs::exists(fs::symlink_status(o.out, unknown));
  if (fs::path(o.out).has_filename() && !there) return;
  std::string rule = "the name of a file that does not exist yet";
  const std::string unfinished = o.out + ".unfinished.partial";
  if (there && fs::exists(unfinished, unknown)) {
    rule += "; " + unfinished + " is of the run that wrote it, which was killed: it can be removed";
  }
  refuse_tuning("--out", o.out.empty() ? "empty" : o.out, rule);
}

/// The log is replaced, and so must be nothing else than a log.
void check_log(const finetune_options& o) {
  if (o.log.empty()) return;
  std::error_code unknown;
  const auto is_log = [&](const std::string& file) {
    return fs::equivalent(file, o.log, unknown) ||
           fs::weakly_canonical(file, unknown) == fs::weakly_canonical(o.log, unknown);
  };
  const auto check = [&](const char* option, const std::string& file) {
    if (!file.empty() && is_log(file)) {
      refuse_tuning("--log", o.log, text("another file than ", option, ": it is written to"));
    }
  };
  check("--data", o.data);
  check("--validation", o.validation);
  check("--out", o.out);
  if (!fs::exists(o.log, unknown)) return;
  constexpr const char* rule =
      "the name of a log to replace, or of a file that does not exist yet: it has no step in its "
      "first line";
  if (!fs::is_regular_file(o.log, unknown)) refuse_tuning("--log", o.log, rule);
  if (!may_be_log(o.log)) refuse_tuning("--log", o.log, rule);
}

/// What needs neither model nor data.
void check_options(const finetune_options& o) {
  check_out(o);
  check_log(o);
  constexpr index_t most = index_t{1} << 31;
  const auto check = [](const char* option, index_t value, index_t least) {
    if (value < least || value > most) refuse_tuning(option, value, text("in [", least, ", 2^31]"));
  };
  check("--steps", o.steps, 0);
  check("--epochs", o.epochs, 1);
  check("--batch", o.batch, 1);
  check("--eval-every", o.eval_every, 0);
  check("--checkpoint-every", o.checkpoint_every, 0);
  check("--warmup", o.warmup, 0);
  const auto check_share = [](const char* option, double value) {
    if (!(value >= 0 && value < 1)) refuse_tuning(option, value, "in [0, 1)");
  };
  check_share("--validation-share", o.validation_share);
  check_share("--weak-dropout", o.weak_dropout);
  if (!(o.rate > 0 && std::isfinite(o.rate))) refuse_tuning("--lr", o.rate, "a number above 0");
  const auto check_size = [](const char* option, double value) {
    if (!(value >= 0 && std::isfinite(value)))
      refuse_tuning(option, value, "a number of at least 0");
  };
  check_size("--clip", o.clip);
  check_size("--weight-decay", o.weight_decay);
  check_size("--l2-sp", o.l2_sp);
  const auto is_text = [](const std::string& file) { return fs::path(file).extension() == ".txt"; };
  if (o.too_long == long_records::cut && is_text(o.data) &&
      (o.validation.empty() || is_text(o.validation))) {
    refuse_tuning("--long-records", "cut",
                  "refuse for a text, which is tiled: only records can be long");
  }
  if (tunes_weak_columns(o.method)) return;
  check("--rank", o.rank, 1);
  if (!(o.alpha > 0 && std::isfinite(o.alpha)))
    refuse_tuning("--alpha", o.alpha, "a positive number");
  if (o.weak_dropout > 0) {
    refuse_tuning(
        "--weak-dropout", o.weak_dropout,
        text("0 for --method ", to_string(o.method), ", which has no weak columns to train"));
  }
}

void check_length(const finetune_options& o, const model_config& config) {
  if (o.seq_len < 2 || o.seq_len > config.max_position_embeddings) {
    refuse_tuning("--seq-len", o.seq_len,
                  text("between 2 and the model's max_position_embeddings = ",
                       config.max_position_embeddings));
  }
}

/// tuned_model as the trainer sees it.
class tuned final : public trainable {
 public:
  tuned(const qeft::on_host& exec, const model_source& source, const finetune_options& o)
      : model_(exec, source.config(), reader_of(source),
               linears_of(o.method, exec, source.config(), {o.rank, o.alpha, o.seed})) {
    source.report_rounding();
  }

  const std::vector<parameter>& parameters() const override { return model_.parameters(); }
  void clear_gradients() override { model_.clear_gradients(); }
  double backward(const training_sample& sample, double factor) override {
    return model_.backward(sample, factor);
  }
  double loss(const training_sample& sample) override { return model_.loss(sample); }
  void update() override { model_.update(); }

  index_t size() const {
    index_t sum = 0;
    for (const parameter& p : parameters()) sum += p.size();
    return sum;
  }
  index_t saved_bytes_per_token() const {
    return model_.saved_channels() * static_cast<index_t>(sizeof(float));
  }
  /// Of AdamW's two moments.
  index_t optimiser_bytes() const { return 2 * size() * static_cast<index_t>(sizeof(float)); }

 private:
  tuned_model model_;
};

/// A fingerprint of samples.
std::string tokens_of(const std::vector<training_sample>& samples) {
  io::stream_hash hash;
  for (const training_sample& s : samples) {
    hash.update(io::as_bytes(s.tokens));
    hash.update(io::as_bytes(s.counted));
  }
  return text(samples.size(), " samples, ", io::to_hex(hash.finish()));
}

class finetuning {
 public:
  finetuning(const finetune_options& options, communicator& ranks)
      : o_(options), ranks_(ranks), exec_(options.threads), source_(options.model) {
    check_model(o_.method, source_.config(), o_.model);
    if (is_merged(o_.model)) {
      refuse_tuning(
          "--model", o_.model,
          "what no adapter is merged into: one of it could not be merged in turn (see unmerge)");
    }
    check_length(o_, source_.config());
  }

  void run() {
    read_data();
    const trainer_options how = training();
    std::optional<io::atomic_directory> out;  // of rank 0
    if (ranks_.is_first()) {
      out.emplace(o_.out, io::leftovers::reuse);
      out->keep(out->resumed());  // an error does not cost what a kill left
    }
    tuned model(exec_, source_, o_);
    std::fprintf(stderr,
                 "method %s: %lld parameters; per token, the linears keep %lld bytes for backward; "
                 "the optimiser keeps %lld bytes\n",
                 to_string(o_.method), static_cast<long long>(model.size()),
                 static_cast<long long>(model.saved_bytes_per_token()),
                 static_cast<long long>(model.optimiser_bytes()));
    trainer train(exec_, model, how, samples_, validation_, ranks_);
    try {
      run_training(train, out ? &*out : nullptr, describe(how),
                   {o_.log, o_.json, o_.checkpoint_every, o_.after_step});
    } catch (const qeft::error& e) {
      const bool has_best = train.best() && train.best()->step > 0;
      if (e.code() != errc::not_finite || !has_best) throw;
      train.take_best();
      together(ranks_, [&] {
        if (!out) return;
        out->keep();  // should the adapter not be written
        write(model);
        out->keep(false);
      });
      fail(errc::not_finite, text(e.what(), "; ", o_.out, " holds the adapter of step ",
                                  train.best()->step, ", which validated best"));
    }
    train.take_best();
    together(ranks_, [&] {
      if (!out) return;
      write(model);
      out->keep(false);
      report(train, model, how);
    });
  }

 private:
  void read_data() {
    const tokenizer tok = tokenizer::from_file(o_.model + "/tokenizer.json");
    training_data_reader reader(o_.model, source_.config(), tok, o_.template_name);
    const auto read = [&](const std::string& file) {
      training_data data = reader.read(file, o_.seq_len, o_.too_long);
      std::fprintf(stderr, "%s: %zu samples, %lld tokens that count\n", file.c_str(),
                   data.samples.size(), static_cast<long long>(data.counted));
      if (data.cut > 0 || data.left_out > 0) {
        std::fprintf(stderr,
                     "notice: %lld of them lost their end behind %lld tokens, and %lld more had "
                     "nothing that counts before it and are left out\n",
                     static_cast<long long>(data.cut), static_cast<long long>(o_.seq_len),
                     static_cast<long long>(data.left_out));
      }
      return std::move(data.samples);
    };
    samples_ = read(o_.data);
    if (!o_.validation.empty()) {
      validation_ = read(o_.validation);
    } else if (o_.validation_share > 0) {
      validation_ = split_off(samples_, o_.validation_share, o_.seed);
    }
    if (!o_.template_name.empty() && !reader.used_template()) {
      refuse_tuning("--template", o_.template_name, "left out for data without messages");
    }
    if (source_.config().eos_token_ids.empty()) {
      std::fprintf(stderr, "notice: the model has no end token; responses are trained without\n");
    }
  }

  trainer_options training() const {
    trainer_options t;
    t.batch = o_.batch;
    t.samples =
        o_.steps > 0 ? o_.steps * o_.batch : o_.epochs * static_cast<index_t>(samples_.size());
    t.steps = steps_of(t.samples, t.batch);
    if (o_.warmup > t.steps) {
      refuse_tuning("--warmup", o_.warmup, text("at most the number of steps, ", t.steps));
    }
    t.rate = {o_.schedule, o_.rate, o_.warmup, t.steps, 0.0};
    t.clip = o_.clip;
    t.adamw.weight_decay = o_.weight_decay;
    t.adamw.l2_sp = o_.l2_sp;
    t.weak_dropout = o_.weak_dropout;
    t.eval_every = o_.eval_every;
    t.seed = o_.seed;
    return t;
  }

  /// Everything that the result depends on, by the options that people know it by.
  json describe(const trainer_options& t) const {
    json all = {{"version", {QEFT_VERSION_MAJOR, QEFT_VERSION_MINOR, QEFT_VERSION_PATCH}},
                {"--model", io::weights_fingerprint(source_.weights().reader())},
                {"--seq-len", o_.seq_len},
                {"data of --data", tokens_of(samples_)},
                {"data of --validation", tokens_of(validation_)},
                {"--batch", t.batch},
                {"--steps", t.steps},
                {"number of samples", t.samples},
                {"--lr", t.rate.peak},
                {"--schedule", static_cast<int>(t.rate.kind)},
                {"--warmup", t.rate.warmup},
                {"--clip", t.clip},
                {"--weight-decay", t.adamw.weight_decay},
                {"--l2-sp", t.adamw.l2_sp},
                {"--weak-dropout", t.weak_dropout},
                {"--eval-every", t.eval_every},
                {"--seed", t.seed}};
    if (tunes_weak_columns(o_.method)) return all;
    all["--method"] = to_string(o_.method);
    all["--rank"] = o_.rank;
    all["--alpha"] = o_.alpha;
    return all;
  }

  void write(const trainable& model) const {
    if (!tunes_weak_columns(o_.method)) {
      write_lora_adapter(o_.out, make_lora_adapter(source_, model.parameters(), o_.rank, o_.alpha));
      return;
    }
    const auto tuned_columns = [&](const std::string& linear) -> const float* {
      for (const parameter& p : model.parameters()) {
        if (p.name == linear + ".weak") return p.value;
      }
      return nullptr;
    };
    io::write_adapter(o_.out, make_adapter(source_, tuned_columns));
  }

  void report(const trainer& train, const tuned& model, const trainer_options& how) const {
    const auto& best = train.best();
    if (best && best->step == 0) {
      std::fprintf(stderr,
                   "notice: no step improved the validation loss; the adapter changes nothing; "
                   "try another --lr\n");
    }
    if (best) {
      std::fprintf(
          stderr, "validation loss: %.4f before training, %.4f at best, behind step %lld\n",
          train.start_loss().value_or(best->loss), best->loss, static_cast<long long>(best->step));
    }
    if (!o_.json) return;
    ordered_json all = {{"out", o_.out},
                        {"method", to_string(o_.method)},
                        {"steps", how.steps},
                        {"samples", samples_.size()},
                        {"validation_samples", validation_.size()},
                        {"parameters", model.size()},
                        {"saved_bytes_per_token", model.saved_bytes_per_token()},
                        {"optimiser_bytes", model.optimiser_bytes()},
                        {"start_loss", nullptr},
                        {"best_loss", nullptr},
                        {"best_step", nullptr}};
    if (best) {
      all["start_loss"] = *train.start_loss();
      all["best_loss"] = best->loss;
      all["best_step"] = best->step;
    }
    std::printf("%s\n", all.dump(-1, ' ', false, json::error_handler_t::replace).c_str());
  }

  finetune_options o_;
  communicator& ranks_;
  qeft::on_host exec_;
  model_source source_;
  std::vector<training_sample> samples_;
  std::vector<training_sample> validation_;
};

}  // namespace

int run_finetune(const finetune_options& options, communicator& ranks) {
  check_options(options);
  finetuning(options, ranks).run();
  return 0;
}

}  // namespace qeft_llm
