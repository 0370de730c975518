// SPDX-License-Identifier: Apache-2.0
// qeft-llm: quantise, run and measure language models.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>
#include <map>
#include <string>

#include "commands.hpp"
#include "qeft/core/status.hpp"
#include "quantize.hpp"

namespace {

using namespace qeft_llm;

template <class Enum>
CLI::CheckedTransformer one_of(const std::map<std::string, Enum>& names) {
  return CLI::CheckedTransformer(names, CLI::ignore_case);
}

void add_common(CLI::App& command, std::string& model, int& threads, std::string& device) {
  command.add_option("--model", model, "model directory (Hugging Face or QEFT)")->required();
  command.add_option("--threads", threads, "CPU threads, 0 for all")->check(CLI::NonNegativeNumber);
  command.add_option("--device", device, "where to run")->check(CLI::IsMember({"cpu", "cuda"}));
}

void add_quantize(CLI::App& command, quantize_options& o, std::string& device) {
  add_common(command, o.model, o.threads, device);
  command.add_option("--out", o.out, "directory to write")->required();
  command.add_option("--calibration", o.calibration, "text file of calibration data");
  command.add_option("--bits", o.bits, "bits per code")
      ->check(CLI::IsMember({2, 3, 4, 8}))
      ->capture_default_str();
  command.add_option("--group-size", o.group_size, "columns per scale, -1 for one per channel")
      ->capture_default_str();
  command.add_option("--weak-columns", o.weak_columns, "k, full-precision columns per layer")
      ->capture_default_str();
  command
      .add_option("--weak-placement", o.o_proj_placement,
                  "weak columns of o_proj: indexed or per_head (default indexed)")
      ->transform(one_of<qeft::weak_kind>({{"per_head", qeft::weak_kind::per_head},
                                           {"indexed", qeft::weak_kind::indexed}}));
  command.add_option("--zero", o.zero, "zero points: integer, scaled or symmetric")
      ->transform(one_of<qeft::zero_kind>({{"integer", qeft::zero_kind::integer},
                                           {"scaled", qeft::zero_kind::scaled},
                                           {"symmetric", qeft::zero_kind::symmetric}}));
  command.add_option("--method", o.method, "optq or rtn")
      ->transform(one_of<quantize_method>(
          {{"optq", quantize_method::optq}, {"rtn", quantize_method::rtn}}));
  command.add_option("--search", o.search, "ranges of groups: grid or minmax")
      ->transform(one_of<range_search>(
          {{"grid", range_search::grid}, {"minmax", range_search::minmax}}));
  command.add_option("--steps", o.steps, "steps of the grid search")->capture_default_str();
  command.add_option("--norm", o.norm, "p of the grid search's error |w - Q(w)|^p")
      ->capture_default_str();
  command.add_option("--damping", o.damping, "of the Hessian, as a fraction of its mean diagonal")
      ->capture_default_str();
  command
      .add_option("--selection", o.selection,
                  "weak columns by: hessian, hessian_perturbation or gradient")
      ->transform(one_of<column_selection>(
          {{"hessian", column_selection::hessian},
           {"hessian_perturbation", column_selection::hessian_perturbation},
           {"gradient", column_selection::gradient}}));
  command
      .add_option("--accumulation", o.accumulation,
                  "global selection adds a layer's top-k (paper) or all columns (reference)")
      ->transform(one_of<score_accumulation>({{"paper", score_accumulation::paper},
                                              {"reference", score_accumulation::reference}}));
  command.add_option("--reorder", o.reorder, "Offline Global Reordering: on or off (default on)")
      ->transform(one_of<bool>({{"on", true}, {"off", false}}));
  command.add_option("--samples", o.samples, "calibration samples")->capture_default_str();
  command.add_option("--seq-len", o.seq_len, "tokens per sample")->capture_default_str();
  command.add_option("--weak-columns-from", o.weak_columns_from,
                     "QEFT model whose choice of weak columns is taken over");
  command.add_option("--seed", o.seed, "of the choice of samples")->capture_default_str();
  command.add_flag("--act-order", o.act_order,
                   "quantise columns by falling Hessian diagonal (implies --static-groups)");
  command.add_flag("--static-groups", o.static_groups,
                   "group parameters from the weights before any compensation");
  command.add_flag("--compare-rtn", o.compare_rtn, "also report each layer's error under RTN");
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Quantises, runs and measures language models with QEFT");
  app.require_subcommand(1);
  app.option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  std::string device = "cpu";

  quantize_options quantize;
  CLI::App* quantize_command = app.add_subcommand("quantize", "quantise a model");
  add_quantize(*quantize_command, quantize, device);

  generate_options generate;
  CLI::App* generate_command = app.add_subcommand("generate", "continue a prompt");
  add_common(*generate_command, generate.model, generate.threads, device);
  generate_command->add_option("--prompt", generate.prompt, "text to continue")->required();
  generate_command->add_option("--max-tokens", generate.max_tokens)->capture_default_str();
  generate_command->add_option("--temperature", generate.temperature, "0 is greedy")
      ->capture_default_str();
  generate_command->add_option("--seed", generate.seed)->capture_default_str();
  generate_command->add_flag("--chat", generate.chat, "the prompt is a question to a chat model");
  generate_command->add_flag("--ignore-eos", generate.ignore_eos,
                             "do not stop at the end of the text, e.g. to measure the speed");

  perplexity_options perplexity;
  CLI::App* perplexity_command = app.add_subcommand("perplexity", "measure a model on a text");
  add_common(*perplexity_command, perplexity.model, perplexity.threads, device);
  perplexity_command->add_option("--text", perplexity.text, "text file")->required();
  perplexity_command->add_option("--seq-len", perplexity.seq_len, "tokens per window")
      ->capture_default_str();
  perplexity_command->add_option("--tokens", perplexity.tokens, "evaluate about so many, 0 for all")
      ->capture_default_str();

  std::string inspected;
  CLI::App* inspect_command = app.add_subcommand("inspect", "a table of a model's layers");
  inspect_command->add_option("model", inspected, "directory or config.json")->required();

  CLI11_PARSE(app, argc, argv);
  try {
    if (device == "cuda") {
      qeft::fail(qeft::errc::unsupported, "--device cuda is not built in; use --device cpu");
    }
    if (*quantize_command) return run_quantize(quantize);
    if (*generate_command) return run_generate(generate);
    if (*perplexity_command) return run_perplexity(perplexity);
    return run_inspect(inspected);
  } catch (const std::exception& e) {
    std::fprintf(stderr, "qeft-llm: %s\n", e.what());
    return 1;
  }
}
