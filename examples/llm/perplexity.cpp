// SPDX-License-Identifier: Apache-2.0
// `qeft-llm perplexity`.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>
#include <vector>

#include "commands.hpp"
#include "elementwise.hpp"
#include "llama.hpp"
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

}  // namespace

int run_perplexity(const perplexity_options& o) {
  if (o.seq_len < 2) {
    fail(errc::invalid_argument,
         "perplexity: --seq-len is " + std::to_string(o.seq_len) + ", but must be at least 2");
  }
  const qeft::on_host exec(o.threads);
  const model_source source(o.model);
  if (o.seq_len > source.config().max_position_embeddings) {
    fail(errc::invalid_argument, "perplexity: --seq-len is " + std::to_string(o.seq_len) +
                                     ", but the model has max_position_embeddings = " +
                                     std::to_string(source.config().max_position_embeddings));
  }
  llama_model model(exec, source, o.activations);
  const model_config& config = model.config();
  const tokenizer tok = tokenizer::from_file(o.model + "/tokenizer.json");
  auto windows = text_windows(tok, o.text, o.seq_len, 1);
  if (o.tokens > 0) {
    const auto wanted = static_cast<std::size_t>(qeft::ceil_div(o.tokens, o.seq_len));
    windows.resize(std::min(windows.size(), wanted));
  }
  // A prefix is context, not text to predict.
  const index_t context = std::max<index_t>(1, static_cast<index_t>(tok.prefix().size()));

  double total = 0;
  std::vector<float> logits(static_cast<std::size_t>(logit_rows * config.vocab_size));
  {
    progress bar("perplexity", static_cast<index_t>(windows.size()));
    for (const std::vector<int>& window : windows) {
      model.reset(o.seq_len);
      const std::vector<float>& normed = model.forward(window);
      for (index_t t = context - 1; t < o.seq_len - 1; t += logit_rows) {
        const index_t rows = std::min(logit_rows, o.seq_len - 1 - t);
        model.logits(normed.data() + t * config.hidden_size, rows, logits.data());
        std::vector<double> nll(static_cast<std::size_t>(rows));
        exec.parallel_for(rows, 1, [&](index_t begin, index_t end) {
          for (index_t r = begin; r < end; ++r) {
            nll[static_cast<std::size_t>(r)] =
                negative_log_likelihood(logits.data() + r * config.vocab_size, config.vocab_size,
                                        window[static_cast<std::size_t>(t + r + 1)]);
          }
        });
        for (const double x : nll) total += x;
      }
      bar.advance();
    }
  }
  const index_t counted = static_cast<index_t>(windows.size()) * (o.seq_len - context);
  const double loss = total / static_cast<double>(counted);
  const double perplexity = std::exp(loss);
  if (!std::isfinite(perplexity)) {
    fail(errc::not_finite, "perplexity: the mean loss of a token is " + std::to_string(loss) +
                               ", too large for its exponential");
  }
  if (o.json) {
    const nlohmann::ordered_json all = {{"perplexity", perplexity},
                                        {"tokens", counted},
                                        {"windows", windows.size()},
                                        {"seq_len", o.seq_len}};
    std::printf("%s\n", all.dump().c_str());
  } else {
    std::printf("perplexity %.4f tokens %lld\n", perplexity, static_cast<long long>(counted));
  }
  return 0;
}

}  // namespace qeft_llm
