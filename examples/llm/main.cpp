// SPDX-License-Identifier: Apache-2.0
// qeft-llm: quantise, run and measure language models.
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>
#include <new>
#include <string>
#include <utility>
#include <vector>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "commands.hpp"
#include "finetune.hpp"
#include "heal.hpp"
#include "merge.hpp"
#include "mpi_session.hpp"
#include "preset.hpp"
#include "qeft/core/status.hpp"
#include "qeft/io/notice.hpp"
#include "qeft/io/signal_cleanup.hpp"
#include "quantize.hpp"

namespace {

using namespace qeft_llm;
using qeft::solver::layer_method;
using qeft::solver::search_method;

template <class Value>
using choices = std::vector<std::pair<std::string, Value>>;

/// How --help says that the default is what the preset decides.
constexpr const char* by_preset = "by preset";

/// An option that takes one of some names; `value` holds the default.
template <class Value>
CLI::Option* add_choice(CLI::App& command, const std::string& name, Value& value,
                        const std::string& help, const choices<Value>& all) {
  std::vector<std::string> names;
  std::string chosen;
  for (const auto& [text, meaning] : all) {
    names.push_back(text);
    if (meaning == value) chosen = text;
  }
  const auto set = [&value, all](const std::string& given) {
    for (const auto& [text, meaning] : all) {
      if (text == given) value = meaning;
    }
  };
  return command.add_option_function<std::string>(name, set, help)
      ->check(CLI::IsMember(names))
      ->default_str(chosen);
}

void add_common(CLI::App& command, std::string& model, int& threads, std::string& device) {
  command.add_option("--model", model, "model directory (Hugging Face or QEFT)")->required();
  command.add_option("--threads", threads, "CPU threads, 0 for all")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command.add_option("--device", device, "where to run")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str();
}

void add_json(CLI::App& command, bool& json) {
  command.add_flag("--json", json, "one JSON object on the standard output");
}

/// What the commands that run a model have in common.
void add_run(CLI::App& command, activation_type& activations, bool& json) {
  add_choice<activation_type>(command, "--activations", activations,
                              "arithmetic of quantised layers; int8 is faster and less exact",
                              {{"exact", activation_type::exact}, {"int8", activation_type::int8}});
  add_json(command, json);
}

void add_quantize(CLI::App& command, quantize_options& o, preset& chosen, std::string& device) {
  add_common(command, o.model, o.threads, device);
  command.add_option("--out", o.out, "directory to write")->required();
  add_choice<preset>(
      command, "--preset", chosen,
      "what other options leave open: paper (its algorithm: --order natural --asymmetric 0 "
      "--search-weights equal --refine 0 --damping 0.01), default (--order sensitivity "
      "--asymmetric 0.5 --search-weights solver --refine 1 --damping 0.3) or small (default, "
      "--group-size 64)",
      {{"paper", preset::paper}, {"default", preset::standard}, {"small", preset::small}});
  command.add_option("--calibration", o.calibration, "text file of calibration data");
  command.add_option("--bits", o.layer.bits, "bits per code")
      ->check(CLI::IsMember({2, 3, 4, 8}))
      ->capture_default_str();
  command
      .add_option("--group-size", o.layer.group_size, "columns per scale, -1 for one per channel")
      ->default_str("128, small: 64");
  command.add_option("--weak-columns", o.weak_columns, "k, full-precision columns per layer")
      ->capture_default_str();
  add_choice<qeft::weak_kind>(
      command, "--weak-placement", o.o_proj_placement, "where the weak columns of o_proj are",
      {{"per_head", qeft::weak_kind::per_head}, {"indexed", qeft::weak_kind::indexed}});
  add_choice<qeft::zero_kind>(command, "--zero", o.layer.zero, "kind of zero points",
                              {{"integer", qeft::zero_kind::integer},
                               {"scaled", qeft::zero_kind::scaled},
                               {"symmetric", qeft::zero_kind::symmetric}});
  add_choice<layer_method>(command, "--method", o.layer.method, "how codes are found",
                           {{"optq", layer_method::optq}, {"rtn", layer_method::rtn}});
  add_choice<search_method>(command, "--search", o.layer.search.method, "ranges of groups",
                            {{"grid", search_method::grid}, {"minmax", search_method::minmax}});
  command.add_option("--steps", o.layer.search.steps, "steps of the grid search")
      ->capture_default_str();
  command.add_option("--norm", o.layer.search.norm, "p of the grid search's error |w - Q(w)|^p")
      ->default_str("2 with weights of the solver, else 2.4");
  add_choice<bool>(command, "--search-weights", o.layer.search.weighted,
                   "of the errors in the grid search: equal, or what the solver pays for them",
                   {{"equal", false}, {"solver", true}})
      ->default_str(by_preset);
  add_choice<column_order>(
      command, "--order", o.order, "columns as they are, or robust ones by falling sensitivity",
      {{"natural", column_order::natural}, {"sensitivity", column_order::sensitivity}})
      ->default_str(by_preset);
  command
      .add_option_function<double>(
          "--asymmetric",
          [&o](double a) {
            o.asymmetric = {a, a};
          },
          "how far a layer makes up for the errors before it, 0 (not at all) to 1")
      ->check(CLI::Range(0.0, 1.0))
      ->default_str(by_preset);
  command.add_option("--refine", o.layer.refine_rounds, "rounds of refinement after the solver")
      ->check(CLI::Range(0, 100))
      ->default_str(by_preset);
  command
      .add_option("--damping", o.layer.damping.damping,
                  "of the Hessian, as a fraction of its mean diagonal")
      ->default_str(by_preset);
  command.add_flag("--robust-damping", o.layer.damping.robust_mean,
                   "leave the weak columns out of that mean");
  add_choice<qeft::selection_metric>(
      command, "--selection", o.selection, "sensitivity that ranks columns",
      {{"hessian", qeft::selection_metric::hessian},
       {"hessian_perturbation", qeft::selection_metric::hessian_perturbation},
       {"gradient", qeft::selection_metric::gradient}});
  add_choice<qeft::accumulation>(
      command, "--accumulation", o.accumulation,
      "global selection adds a layer's top-k (paper) or all columns (reference)",
      {{"paper", qeft::accumulation::top_k}, {"reference", qeft::accumulation::all_columns}});
  add_choice<bool>(command, "--reorder", o.reorder,
                   "Offline Global Reordering; off: weak columns stay where they are",
                   {{"on", true}, {"off", false}});
  command.add_option("--samples", o.samples, "calibration samples")->capture_default_str();
  command.add_option("--seq-len", o.seq_len, "tokens per sample")->capture_default_str();
  command
      .add_option("--weak-columns-from", o.weak_columns_from,
                  "QEFT model whose weak columns, and their number, are taken over")
      ->excludes("--weak-columns");
  command.add_option("--seed", o.seed, "of the choice of samples")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command.add_flag("--act-order", o.layer.act_order,
                   "quantise columns by falling Hessian diagonal (implies --static-groups)");
  command.add_flag("--static-groups", o.layer.static_groups,
                   "group parameters from the weights before any compensation");
  command.add_flag("--compare-rtn", o.compare_rtn,
                   "also find each layer's error under RTN, for inspect");
  command.add_flag(
      "--keep-partial", o.keep_partial,
      "when interrupted, keep the finished layers; the same command goes on with them");
  command.add_flag("--json", o.json, "print a JSON object that describes the result");
}

void add_merge(CLI::App& command, merge_options& o) {
  command.add_option("--model", o.model, "QEFT or full-precision model directory")->required();
  command.add_option("--out", o.out, "directory to write")->required();
  // One value at a time: the n-th weight is that of the n-th adapter.
  command.add_option("--adapter", o.adapters, "adapter file; may be given several times")
      ->required()
      ->take_all()
      ->allow_extra_args(false);
  command.add_option("--weight", o.weights, "of each --adapter, in their order; all 1 by default")
      ->take_all()
      ->allow_extra_args(false);
  command.add_flag("--skip-missing", o.skip_missing,
                   "leave out columns of the adapters that are not weak in the model");
  command.add_flag("--other-base", o.other_base,
                   "add adapters that were made of another model, as of one that the weak columns "
                   "were taken from");
  add_json(command, o.json);
}

void add_finetune(CLI::App& command, finetune_options& o, std::string& device) {
  add_common(command, o.model, o.threads, device);
  command
      .add_option("--data", o.data,
                  "text (.txt) or records (.jsonl) of instruction, input and output, of prompt and "
                  "response, or of messages")
      ->required();
  command.add_option("--out", o.out, "adapter file to write")->required();
  add_choice<tuning_method>(
      command, "--method", o.method,
      "what is trained: weak columns (qeft; owq: of a model quantised with --reorder off), or LoRA "
      "on a full-precision model (lora), on NF4 made of it (qlora), on 8 bits made of it and in "
      "the MLP only (platypus), or by groups on a model quantised with --zero scaled (qa-lora)",
      {{"qeft", tuning_method::qeft},
       {"owq", tuning_method::owq},
       {"lora", tuning_method::lora},
       {"qlora", tuning_method::qlora},
       {"qa-lora", tuning_method::qa_lora},
       {"platypus", tuning_method::platypus}});
  command.add_option("--rank", o.rank, "r of LoRA")->capture_default_str();
  command.add_option("--alpha", o.alpha, "B A of LoRA is multiplied with alpha / r")
      ->capture_default_str();
  auto* validation = command.add_option("--validation", o.validation, "data to validate with");
  command
      .add_option("--validation-share", o.validation_share,
                  "share of the data to validate with instead, 0 for none")
      ->excludes(validation)
      ->capture_default_str();
  command.add_option("--template", o.template_name,
                     "for messages: one of several chat templates, by name");
  command.add_option("--seq-len", o.seq_len, "tokens of a sample, at most")->capture_default_str();
  add_choice<long_records>(command, "--long-records", o.too_long,
                           "what becomes of records that are longer",
                           {{"refuse", long_records::refuse}, {"cut", long_records::cut}});
  auto* steps = command.add_option("--steps", o.steps, "of the optimiser, instead of --epochs")
                    ->check(CLI::Range(qeft::index_t{1}, qeft::index_t{1} << 31));
  command.add_option("--epochs", o.epochs, "passes over the data")
      ->excludes(steps)
      ->capture_default_str();
  command.add_option("--batch", o.batch, "samples per step")->capture_default_str();
  command.add_option("--lr", o.rate, "learning rate; the paper's for 7B models is 1e-5")
      ->capture_default_str();
  add_choice<qeft::schedule_kind>(command, "--schedule", o.schedule,
                                  "how the learning rate goes on behind the warm-up",
                                  {{"constant", qeft::schedule_kind::constant},
                                   {"cosine", qeft::schedule_kind::cosine},
                                   {"linear", qeft::schedule_kind::linear}});
  command.add_option("--warmup", o.warmup, "steps in which the learning rate rises")
      ->capture_default_str();
  command.add_option("--clip", o.clip, "limit of the gradient's norm, 0 for none")
      ->capture_default_str();
  command.add_option("--weight-decay", o.weight_decay, "decay of the weak columns towards 0")
      ->capture_default_str();
  command.add_option("--l2-sp", o.l2_sp, "decay of the weak columns towards what they were")
      ->capture_default_str();
  command
      .add_option("--weak-dropout", o.weak_dropout,
                  "share of the weak columns that are, in a step, what they were")
      ->capture_default_str();
  command.add_option("--eval-every", o.eval_every, "steps between validations")
      ->capture_default_str();
  command
      .add_option("--checkpoint-every", o.checkpoint_every,
                  "steps between checkpoints, from which the same command goes on; 0 for none")
      ->capture_default_str();
  command.add_option("--seed", o.seed, "of the order of samples, the split and the dropout")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command.add_option("--log", o.log,
                     "file of a JSON object per step; a log that is there is replaced");
  command.add_flag("--json", o.json, "a JSON object per step, and one for the result, on stdout");
}

void add_heal(CLI::App& command, heal_options& o, std::string& device) {
  add_common(command, o.model, o.threads, device);
  command.add_option("--reference", o.reference, "full-precision model that --model was made from")
      ->required();
  command.add_option("--text", o.text, "text file; never one to be measured on")->required();
  command.add_option("--out", o.out, "directory to write")->required();
  command.add_option("--train", o.train, "which numbers are tuned")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->take_all()
      ->default_str("weak,scales,norms");
  command.add_option("--steps", o.steps, "of the optimiser")->capture_default_str();
  command.add_option("--batch", o.batch, "samples per step")->capture_default_str();
  command.add_option("--seq-len", o.seq_len, "tokens of a sample")->capture_default_str();
  command.add_option("--lr", o.rate, "learning rate of the weak columns, as a share of the loss")
      ->capture_default_str();
  command.add_option("--scale-lr", o.scale_rate, "of the scales, likewise")->capture_default_str();
  command.add_option("--norm-lr", o.norm_rate, "of the norms, likewise")->capture_default_str();
  command
      .add_option("--warmup", o.warmup,
                  "steps in which the learning rates rise, at most a quarter of --steps; behind "
                  "them they fall to 0 as a cosine")
      ->capture_default_str();
  command.add_option("--clip", o.clip, "limit of the gradient's norm, 0 for none")
      ->capture_default_str();
  command
      .add_option("--validation-windows", o.validation_windows,
                  "windows of the text to choose and report by instead of training on them")
      ->capture_default_str();
  command
      .add_option("--eval-every", o.eval_every,
                  "steps between validations; 0 for one before and one after")
      ->capture_default_str();
  command
      .add_option("--checkpoint-every", o.checkpoint_every,
                  "steps between checkpoints, from which the same command goes on; 0 for none")
      ->capture_default_str();
  command.add_option("--seed", o.seed, "of the choice and order of samples")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  command.add_option("--log", o.log, "file to write a JSON object per step to");
  command.add_flag("--json", o.json, "a JSON object per step, and one for the result, on stdout");
}

}  // namespace

int main(int argc, char** argv) {
#if defined(__GLIBC__)
  // Freed layers go back to the system. Otherwise the limit grows with what is freed, the heap
  // keeps blocks of layers, and memory grows with their number. Smaller blocks, activations, stay:
  // to give them back and fault them in again would take a tenth of the time.
  ::mallopt(M_MMAP_THRESHOLD, 4 << 20);
  ::mallopt(M_TRIM_THRESHOLD, 64 << 20);
#endif
  // Not through stdio: a thread that a signal stopped may hold its lock.
  qeft::io::set_notice_handler(
      [](const std::string& text) { ::dprintf(STDERR_FILENO, "qeft-llm: %s\n", text.c_str()); });
  const mpi_session mpi;
  const qeft::io::signal_cleanup signals;
  CLI::App app("Quantises, runs and measures language models with QEFT");
  app.require_subcommand(1);
  app.option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  std::string device = "cpu";

  quantize_options quantize;
  preset quantize_preset = preset::standard;
  CLI::App* quantize_command = app.add_subcommand("quantize", "quantise a model");
  add_quantize(*quantize_command, quantize, quantize_preset, device);

  finetune_options finetune;
  CLI::App* finetune_command = app.add_subcommand("finetune", "tune a model's weak columns");
  add_finetune(*finetune_command, finetune, device);

  heal_options heal;
  CLI::App* heal_command =
      app.add_subcommand("heal", "tune a quantised model towards the one that it was made from");
  add_heal(*heal_command, heal, device);

  generate_options generate;
  CLI::App* generate_command = app.add_subcommand("generate", "continue a prompt");
  add_common(*generate_command, generate.model, generate.threads, device);
  auto* prompt = generate_command->add_option_group("prompt", "one of");
  prompt->add_option("--prompt", generate.prompt, "text to continue; - reads the standard input");
  prompt->add_option("--prompt-file", generate.prompt_file, "file of the text to continue");
  prompt->add_option(
      "--messages", generate.messages,
      "conversation to answer: JSON file of [{\"role\": ..., \"content\": ...}, ...]");
  prompt->require_option(1);
  generate_command->add_flag("--chat", generate.chat,
                             "the prompt is what a user says: put into the model's chat template");
  generate_command->add_option("--system", generate.system,
                               "with --chat or --messages: what the model is told first");
  generate_command->add_option("--template", generate.template_name,
                               "with --chat or --messages: one of several templates, by name");
  generate_command->add_option("--max-tokens", generate.max_tokens, "stop after so many")
      ->capture_default_str();
  generate_command->add_option("--temperature", generate.sampling.temperature, "0 is greedy")
      ->capture_default_str();
  generate_command
      ->add_option("--top-k", generate.sampling.top_k,
                   "draw from the k most probable tokens, 0 for all")
      ->capture_default_str();
  generate_command
      ->add_option("--top-p", generate.sampling.top_p,
                   "draw from the most probable tokens that have this probability together")
      ->capture_default_str();
  generate_command
      ->add_option("--repetition-penalty", generate.sampling.repetition_penalty,
                   "makes tokens seen before less probable when above 1")
      ->capture_default_str();
  generate_command
      ->add_option("--seed", generate.sampling.seed, "of the draw, when temperature > 0")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  generate_command->add_flag("--ignore-eos", generate.ignore_eos,
                             "do not stop at the end of the text, e.g. to measure the speed");
  add_run(*generate_command, generate.activations, generate.json);

  perplexity_options perplexity;
  CLI::App* perplexity_command = app.add_subcommand("perplexity", "measure a model on a text");
  add_common(*perplexity_command, perplexity.model, perplexity.threads, device);
  perplexity_command->add_option("--text", perplexity.text, "text file")->required();
  perplexity_command->add_option("--reference", perplexity.reference,
                                 "model directory, such as the full-precision one: also print the "
                                 "KL divergence from it and how often the top tokens agree");
  perplexity_command->add_option("--seq-len", perplexity.seq_len, "tokens per window")
      ->capture_default_str();
  perplexity_command->add_option("--tokens", perplexity.tokens, "evaluate about so many, 0 for all")
      ->check(CLI::NonNegativeNumber)
      ->capture_default_str();
  add_run(*perplexity_command, perplexity.activations, perplexity.json);

  std::string inspected;
  bool inspect_json = false;
  CLI::App* inspect_command = app.add_subcommand("inspect", "a table of a model's layers");
  inspect_command->add_option("model", inspected, "directory or config.json")->required();
  add_json(*inspect_command, inspect_json);

  merge_options merge;
  CLI::App* merge_command = app.add_subcommand("merge", "add adapters to a model");
  add_merge(*merge_command, merge);

  unmerge_options unmerge;
  CLI::App* unmerge_command =
      app.add_subcommand("unmerge", "the model that merge started from, bit for bit");
  unmerge_command->add_option("--model", unmerge.model, "directory that merge wrote")->required();
  unmerge_command->add_option("--out", unmerge.out, "directory to write")->required();

  CLI11_PARSE(app, argc, argv);
  try {
    if (device == "cuda") {
      qeft::fail(qeft::errc::unsupported, "--device cuda is not built in; use --device cpu");
    }
    communicator& ranks = mpi.ranks();
    if (ranks.size() > 1 && !*finetune_command && !*heal_command) {
      qeft::fail(qeft::errc::unsupported,
                 "mpirun started several processes, but only finetune and heal share their work");
    }
    int result = 0;
    if (*quantize_command) {
      const auto given = [&](const std::string& name) { return quantize_command->count(name) > 0; };
      apply(quantize_preset, given, quantize);
      result = run_quantize(quantize);
    }
    if (*finetune_command) result = run_finetune(finetune, ranks);
    if (*heal_command) result = run_heal(heal, ranks);
    if (*generate_command) result = run_generate(generate);
    if (*perplexity_command) result = run_perplexity(perplexity);
    if (*inspect_command) result = run_inspect(inspected, inspect_json);
    if (*merge_command) result = run_merge(merge);
    if (*unmerge_command) result = run_unmerge(unmerge);
    if (std::fflush(stdout) != 0 || std::ferror(stdout) != 0) {
      qeft::fail(qeft::errc::io_error, "cannot write to the standard output");
    }
    return result;
  } catch (const std::bad_alloc&) {
    signals.settle();
    mpi.report_failure("out of memory");
    return 1;
  } catch (const std::exception& e) {
    signals.settle();
    mpi.report_failure(e.what());
    return 1;
  }
}
