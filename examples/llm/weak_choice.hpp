// SPDX-License-Identifier: Apache-2.0
// Which columns of each linear are weak (METHOD section 2).
#pragma once

#include <filesystem>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "calibration.hpp"
#include "llama.hpp"
#include "qeft/core/on_host.hpp"
#include "quantize.hpp"

namespace qeft_llm {

/// Ascending input columns, in the coordinates of the original model.
using column_list = std::vector<std::int32_t>;

/// Whether a linear's input is the (normed) residual stream: all such linears share their weak
/// columns when the model is reordered.
bool reads_stream(linear_kind kind);

/// What the choice does for the layers.
class weak_choice {
 public:
  weak_choice(const quantize_options& options, const qeft::on_host& exec,
              const model_source& source);

  /// Whether a linear's weak columns lie in each head equally.
  bool per_head(linear_kind kind) const;
  /// k of a linear: with per_head placement the next multiple of the heads.
  qeft::index_t count(linear_kind kind) const;

  /// Takes over the choice of another checkpoint of the same architecture; throws qeft::error for
  /// one that does not fit.
  void take_from(const std::filesystem::path& checkpoint);
  /// Chooses what depends on the full-precision model alone: by the gradient metric all columns,
  /// else those of the residual stream when the model is reordered (Algorithm 1, with every
  /// sample).
  /// @param directory for activations
  void choose_ahead(const token_windows& windows, const std::filesystem::path& directory);

  /// The weak columns of a linear, chosen now if they are not known yet.
  /// @param inputs of the linear; asked only where the choice depends on them
  const column_list& of(qeft::index_t block, linear_kind kind, const layer_inputs* inputs);
  /// Those known already; throws std::out_of_range.
  const column_list& of(const std::string& linear) const { return known_.at(linear); }

  void set(const std::string& linear, column_list columns) { known_[linear] = std::move(columns); }

  /// Columns that are known, for an interrupted quantisation to go on with.
  nlohmann::json to_json() const { return known_; }
  void restore(const nlohmann::json& known);

 private:
  std::vector<double> by_hessian(qeft::index_t block, linear_kind kind,
                                 const std::vector<double>& diagonal) const;
  column_list top(linear_kind kind, const std::vector<double>& sensitivity) const;
  void choose_by_gradient(const token_windows& windows);
  void choose_stream_by_hessian(const token_windows& windows,
                                const std::filesystem::path& directory);
  void set_stream(const column_list& columns);

  const quantize_options& o_;
  const qeft::on_host& exec_;
  const model_source& source_;
  const model_config& config_;
  std::map<std::string, column_list> known_;  // by linear
};

/// The weight of a linear as numbers, (OC, IC).
std::vector<float> weight_of(const model_source& source, qeft::index_t block, linear_kind kind);

/// The layer options of a linear with these weak columns: those of the command, stored as the type
/// that loses least (qeft::solver::choose_scalar).
qeft::solver::layer_options options_for(const qeft::on_host& exec, const quantize_options& options,
                                        const std::vector<float>& weight, linear_shape shape,
                                        const column_list& weak);

}  // namespace qeft_llm
