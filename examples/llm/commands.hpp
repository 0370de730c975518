// SPDX-License-Identifier: Apache-2.0
// The commands of qeft-llm that read a model.
#pragma once

#include <cstdint>
#include <string>

#include "linear.hpp"
#include "qeft/core/config.hpp"
#include "sampler.hpp"

namespace qeft_llm {

struct generate_options {
  std::string model;
  std::string prompt;         // "-" reads the standard input
  std::string prompt_file;    // instead of prompt
  std::string messages;       // JSON list of {"role", "content"}, instead of prompt; implies chat
  std::string system;         // with chat: what the model is told first
  std::string template_name;  // with chat: of several templates
  qeft::index_t max_tokens = 128;
  sampling_options sampling;
  bool chat = false;        // the prompt is what a user says: put into the model's chat template
  bool ignore_eos = false;  // go on to max_tokens
  bool json = false;
  activation_type activations = activation_type::exact;
  int threads = 0;  // 0: one per hardware thread
};

struct perplexity_options {
  std::string model;
  std::string reference;  // model to compare with, always by exact arithmetic; empty: none
  std::string text;
  qeft::index_t seq_len = 512;
  qeft::index_t tokens = 0;  // evaluate about so many; 0: the whole text
  bool json = false;
  activation_type activations = activation_type::exact;
  int threads = 0;
};

/// Streams the answer to stdout and the speed to stderr. Each returns the exit status of its
/// command and throws qeft::error.
///
/// With json, stdout is one object: prompt_tokens (a number), tokens (the ids drawn, without the
/// one that ended the text), text, finish_reason ("stop" for an end token, "length"), and
/// prefill_seconds and decode_seconds.
int run_generate(const generate_options& options);

/// exp of the mean negative log-likelihood over windows of seq_len tokens that tile the text (see
/// text_windows). Without a prefix the first token of a window has no context and is not counted.
/// The last line on stdout is `perplexity X tokens N`; with json, stdout is one object: perplexity,
/// tokens, windows, seq_len.
///
/// A reference, a model with the same token ids, reads the same windows. The line goes on
/// `kl K se S top1 T`, the object kl, kl_standard_error, top1_agreement:
/// - K: mean over the tokens of KL(reference || model) of what follows, in nats;
/// - S: standard error of K, from the spread of the windows' means; of one window nan (JSON: null);
/// - T: the share of tokens, 0 to 1, at which both models find the same token most probable.
int run_perplexity(const perplexity_options& options);

/// A table of a model's linear layers.
///
/// E is the output error of a layer as the quantiser recorded it, tr(dW H dW^T), against what the
/// layer was quantised towards: its weight, or with asymmetric calibration the target that stands
/// in for it; E/RTN is beside the error of RTN against the same.
///
/// With json, one object: model_type, weights, bytes and bits_per_weight of all linears, adapters
/// (what `merge` added: qeft_adapters of config.json) and layers, a list of name, out_channels,
/// in_channels, bits, bits_per_weight and, of a quantised one, group_size, zero, weak,
/// weak_columns, error (E) and rtn_error (null where the quantiser recorded none).
/// @param path a model directory or its config.json
int run_inspect(const std::string& path, bool json);

}  // namespace qeft_llm
