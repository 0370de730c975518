// SPDX-License-Identifier: Apache-2.0
// `qeft-llm perplexity`.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "commands.hpp"
#include "divergence.hpp"
#include "elementwise.hpp"
#include "llama.hpp"
#include "model_match.hpp"
#include "progress.hpp"
#include "text_windows.hpp"
#include "tokenizer.hpp"

namespace qeft_llm {

using qeft::errc;
using qeft::fail;
using qeft::index_t;

namespace {

// Rows of logits held at a time: 64 x 49152 floats are 12 MiB.
constexpr index_t logit_rows = 64;

/// -log softmax(logits)[target]
double negative_log_likelihood(const float* logits, index_t vocabulary, int target) {
  const float largest = *std::max_element(logits, logits + vocabulary);
  double sum = 0;
  for (index_t v = 0; v < vocabulary; ++v) {
    sum += static_cast<double>(exp_clamped(logits[v] - largest));
  }
  return std::log(sum) + static_cast<double>(largest) - static_cast<double>(logits[target]);
}

/// A model in the middle of a window.
class window_reader {
 public:
  /// @param name what errors of the model begin with
  window_reader(const qeft::on_host& exec, const model_source& source, activation_type activations,
                std::string name)
      : name_(std::move(name)),
        model_(exec, source, activations),
        logits_(static_cast<std::size_t>(logit_rows * vocabulary())) {}

  index_t vocabulary() const noexcept { return model_.config().vocab_size; }

  void read(const std::vector<int>& window) {
    model_.reset(static_cast<index_t>(window.size()));
    normed_ = model_.forward(window).data();
  }

  /// Finds the logits behind the tokens [first, first + rows) of the window.
  /// @pre rows <= logit_rows
  void find_logits(index_t first, index_t rows) {
    try {
      model_.logits(normed_ + first * model_.config().hidden_size, rows, logits_.data());
    } catch (const qeft::error& e) {
      fail(e.code(), name_ + e.what());
    }
  }
  /// Those behind token first + row, (vocabulary).
  const float* logits(index_t row) const noexcept { return logits_.data() + row * vocabulary(); }

 private:
  std::string name_;
  llama_model model_;
  std::vector<float> logits_;  // (logit_rows, vocabulary)
  const float* normed_ = nullptr;
};

/// Of one token, or summed over many.
struct token_scores {
  double loss = 0;        // -log of the probability of what follows
  double divergence = 0;  // from the reference, if there is one
  index_t agreeing = 0;   // whether the most probable token is the reference's

  void operator+=(const token_scores& other) noexcept {
    loss += other.loss;
    divergence += other.divergence;
    agreeing += other.agreeing;
  }
};

/// @param reference logits as well, or null
token_scores score_token(const float* logits, const float* reference, index_t vocabulary,
                         int target) {
  token_scores scores;
  scores.loss = negative_log_likelihood(logits, vocabulary, target);
  if (reference != nullptr) {
    scores.divergence = kl_divergence(reference, logits, vocabulary);
    scores.agreeing = std::max_element(logits, logits + vocabulary) - logits ==
                      std::max_element(reference, reference + vocabulary) - reference;
  }
  return scores;
}

/// Of what follows the first `context` tokens of a window, one by one. @param reference or null
std::vector<token_scores> score_window(const qeft::on_host& exec, window_reader& model,
                                       window_reader* reference, const std::vector<int>& window,
                                       index_t context) {
  model.read(window);
  if (reference != nullptr) reference->read(window);
  const index_t last = static_cast<index_t>(window.size()) - 1;
  std::vector<token_scores> scores(static_cast<std::size_t>(last - (context - 1)));
  token_scores* next = scores.data();
  for (index_t t = context - 1; t < last; t += logit_rows) {
    const index_t rows = std::min(logit_rows, last - t);
    model.find_logits(t, rows);
    if (reference != nullptr) reference->find_logits(t, rows);
    exec.parallel_for(rows, 1, [&](index_t begin, index_t end) {
      for (index_t r = begin; r < end; ++r) {
        next[r] =
            score_token(model.logits(r), reference == nullptr ? nullptr : reference->logits(r),
                        model.vocabulary(), window[static_cast<std::size_t>(t + r + 1)]);
      }
    });
    next += rows;
  }
  return scores;
}

void check_seq_len(index_t seq_len, const std::string& which, const model_config& config) {
  if (seq_len > config.max_position_embeddings) {
    fail(errc::invalid_argument,
         "perplexity: --seq-len is " + std::to_string(seq_len) + ", but " + which +
             " has max_position_embeddings = " + std::to_string(config.max_position_embeddings));
  }
}

}  // namespace

int run_perplexity(const perplexity_options& o) {
  if (o.seq_len < 2) {
    fail(errc::invalid_argument,
         "perplexity: --seq-len is " + std::to_string(o.seq_len) + ", but must be at least 2");
  }
  const qeft::on_host exec(o.threads);
  const model_source source(o.model);
  check_seq_len(o.seq_len, "the model", source.config());
  const tokenizer tok = tokenizer::from_file(o.model + "/tokenizer.json");
  std::unique_ptr<window_reader> reference;
  if (!o.reference.empty()) {
    const model_source full(o.reference);
    check_seq_len(o.seq_len, "the reference", full.config());
    check_same_vocabulary("perplexity", o.reference, full.config(), source.config(), tok);
    reference = std::make_unique<window_reader>(exec, full, activation_type::exact,
                                                "--reference " + o.reference + ": ");
  }
  window_reader model(exec, source, o.activations, "");
  auto windows = text_windows(tok, o.text, o.seq_len, 1);
  if (o.tokens > 0) {
    const auto wanted = static_cast<std::size_t>(qeft::ceil_div(o.tokens, o.seq_len));
    windows.resize(std::min(windows.size(), wanted));
  }
  // A prefix is context, not text to predict.
  const index_t context = std::max<index_t>(1, static_cast<index_t>(tok.prefix().size()));
  const index_t per_window = o.seq_len - context;

  token_scores total;
  std::vector<double> divergences;  // mean of each window
  {
    progress bar("perplexity", static_cast<index_t>(windows.size()));
    for (const std::vector<int>& window : windows) {
      double divergence = 0;
      for (const token_scores& s : score_window(exec, model, reference.get(), window, context)) {
        total += s;
        divergence += s.divergence;
      }
      divergences.push_back(divergence / static_cast<double>(per_window));
      bar.advance();
    }
  }
  const index_t counted = static_cast<index_t>(windows.size()) * per_window;
  const double loss = total.loss / static_cast<double>(counted);
  const double perplexity = std::exp(loss);
  if (!std::isfinite(perplexity)) {
    fail(errc::not_finite, "perplexity: the mean loss of a token is " + std::to_string(loss) +
                               ", too large for its exponential");
  }
  const estimate kl = estimate_mean(divergences);
  const double top1 = static_cast<double>(total.agreeing) / static_cast<double>(counted);
  if (o.json) {
    nlohmann::ordered_json all = {{"perplexity", perplexity},
                                  {"tokens", counted},
                                  {"windows", windows.size()},
                                  {"seq_len", o.seq_len}};
    if (reference) {
      all["kl"] = kl.mean;
      all["kl_standard_error"] = kl.standard_error;
      all["top1_agreement"] = top1;
    }
    std::printf("%s\n", all.dump().c_str());
  } else {
    std::printf("perplexity %.4f tokens %lld", perplexity, static_cast<long long>(counted));
    if (reference) std::printf(" kl %.6f se %.6f top1 %.4f", kl.mean, kl.standard_error, top1);
    std::printf("\n");
  }
  return 0;
}

}  // namespace qeft_llm
