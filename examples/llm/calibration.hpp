// SPDX-License-Identifier: Apache-2.0
// Drives calibration samples through a model whose linears are replaced one after the other, each
// by what was made from the inputs that those before it produce (METHOD section 3).
#pragma once

#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "llama.hpp"
#include "qeft/core/host_buffer.hpp"
#include "qeft/core/on_host.hpp"
#include "qeft/reorder/permutation.hpp"
#include "qeft/solver/hessian.hpp"
#include "qeft/solver/target.hpp"
#include "sample_store.hpp"

namespace qeft_llm {

/// Token ids of the calibration samples, all of the same length.
using token_windows = std::vector<std::vector<int>>;

/// Writes the embeddings of the tokens, (tokens, hidden_size) per sample, to `stream`.
void embed(const qeft::on_host& exec, const model_source& source, const token_windows& windows,
           sample_store& stream);

/// Throws errc::not_finite naming the linear, where its input (tokens, channels) holds a NaN or an
/// infinity.
void require_finite_activations(const std::string& linear, qeft::index_t sample, const float* x,
                                qeft::index_t tokens, qeft::index_t channels);

/// sum.add(x), with an error that names the linear where x is not finite.
template <class Accumulator>
void add_sample(const qeft::on_host& exec, Accumulator& sum, const std::string& linear,
                qeft::index_t sample, const float* x, qeft::index_t tokens,
                qeft::index_t channels) {
  try {
    sum.add(exec, x, tokens);
  } catch (const qeft::error&) {
    require_finite_activations(linear, sample, x, tokens, channels);
    throw;
  }
}

/// Reads activations of a sample, (tokens, channels). The pointer is valid until the next call.
using sample_reader = std::function<const float*(qeft::index_t sample)>;

/// Activations of the same place in the model at work and in the original one.
struct reader_pair {
  sample_reader here;
  sample_reader original;  // none where the original model does not run beside
};

/// The residual stream around a linear that adds to it.
struct stream_readers {
  reader_pair before;
  sample_reader original_after;  // of the original model, the linear's output added
  std::vector<float> bias;       // of the linear, (OC), or empty
};

/// The calibration inputs of linears that read the same activations, made when first asked for.
class layer_inputs {
 public:
  /// @param name   of the first linear that reads them, for errors
  /// @param input  of the linears, (tokens, IC)
  /// @param stream that the output is added to, (tokens, OC); none for linears that do not write to
  ///               it, and where the original model does not run beside
  layer_inputs(const qeft::on_host& exec, std::string name, qeft::index_t in_channels,
               qeft::index_t samples, qeft::index_t tokens, reader_pair input,
               stream_readers stream = {});

  /// (IC), the diagonal of the Hessian.
  /// @throws qeft::error naming the linear when activations are not finite, or their Hessian is not
  const std::vector<double>& diagonal() const;
  /// (IC, IC), see qeft::solver::hessian_accumulator.
  qeft::span<const float> hessian() const;

  /// M = 2/T sum (a W (x_original - x) + r (h_original - h)) x^T of METHOD section 9, (OC, IC), for
  /// the original weight W, (OC, IC): h is the stream, without which r counts as 0. Empty where the
  /// original model does not run beside.
  qeft::host_buffer<float> mismatch(qeft::span<const float> w, qeft::index_t out_channels,
                                    const qeft::solver::asymmetric_options& options) const;

 private:
  void accumulate() const;
  qeft::host_buffer<float> mismatch_with_stream(
      qeft::span<const float> w, qeft::index_t out_channels,
      const qeft::solver::asymmetric_options& options) const;

  const qeft::on_host& exec_;
  std::string name_;
  qeft::index_t in_channels_;
  qeft::index_t samples_;
  qeft::index_t tokens_;
  reader_pair input_;
  stream_readers stream_;
  mutable std::vector<double> diagonal_;
  mutable qeft::host_buffer<float> hessian_;
  mutable qeft::host_buffer<float> input_mismatch_;  // D, shared by linears without a stream
};

/// The weight that is to stand in the place of a linear from now on.
struct linear_replacement {
  packed_matrix weight;
  qeft::permutation order;  // of its columns: input channel order[i] is column i
};
using replace_linear = std::function<linear_replacement(qeft::index_t block, linear_kind kind,
                                                        const layer_inputs& inputs)>;

/// The activations of a calibration on their way through the model. One sample is resident at a
/// time.
class calibration {
 public:
  /// @param directory for files of activations. Those that a calibration of the same samples left
  ///                  there are used where it had got to.
  /// @param beside    run the original model beside, for the mismatches of layer_inputs
  /// @param first     blocks that are finished: run_block must have returned for all below
  calibration(const qeft::on_host& exec, const model_source& source, const token_windows& windows,
              const std::filesystem::path& directory, bool beside, qeft::index_t first = 0);

  /// Replaces the linears of the next block in the order q k v, o, gate up, down. When it returns,
  /// the block's output is on the disk.
  void run_block(const replace_linear& replace);

  /// The number of finished blocks.
  qeft::index_t blocks() const noexcept { return block_; }

 private:
  /// What a model has computed of all samples.
  struct activations {
    activations(const std::filesystem::path& directory, const model_config& config,
                qeft::index_t samples, qeft::index_t tokens);

    // The residual stream before and after the block at work, exchanged from block to block: the
    // first is only read, so that a block can be begun again.
    sample_store streams[2];
    sample_store middle;     // the stream between attention and MLP
    sample_store attention;  // o_proj's input
    sample_store inner;      // down_proj's input
  };
  class phases;

  const qeft::on_host& exec_;
  const model_source& source_;
  qeft::index_t samples_;
  qeft::index_t tokens_;  // per sample
  rope_table rope_;
  block_cache cache_;
  qeft::index_t block_;
  activations here_;
  std::optional<activations> original_;
};

}  // namespace qeft_llm
