// SPDX-License-Identifier: Apache-2.0
// Training of a model's parameters, step by step, with a state that can be saved and gone on with.
#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "communicator.hpp"
#include "parameter.hpp"
#include "qeft/core/on_host.hpp"
#include "qeft/training/adamw.hpp"
#include "qeft/training/schedule.hpp"
#include "qeft/training/weak_dropout.hpp"
#include "tuned_model.hpp"

namespace qeft_llm {

/// What a trainer needs of a model; the meaning is that of tuned_model's members.
class trainable {
 public:
  virtual ~trainable() = default;
  virtual const std::vector<parameter>& parameters() const = 0;
  virtual void clear_gradients() = 0;
  virtual double backward(const training_sample& sample, double factor) = 0;
  virtual double loss(const training_sample& sample) = 0;
  virtual void update() = 0;
};

struct trainer_options {
  qeft::index_t steps = 1;    // of the optimiser
  qeft::index_t batch = 16;   // samples per step
  qeft::index_t samples = 0;  // of all steps, the last of which may have fewer; 0: steps * batch
  qeft::rate_schedule rate;   // its steps are those above
  double clip = 0.3;          // limit of the gradient's global norm, 0 for none
  qeft::adamw_options adamw;
  double weak_dropout = 0;       // see qeft::weak_dropout
  qeft::index_t eval_every = 0;  // steps; 0: before the first and after the last step only
  std::uint64_t seed = 0;        // of the order of samples and of the dropout
};

/// Of one step.
struct step_report {
  qeft::index_t step = 0;  // from 1
  double loss = 0;         // mean over the counted tokens of the batch, before the step
  double rate = 0;
  double gradient_norm = 0;               // before clipping
  double seconds = 0;                     // without validation
  qeft::index_t tokens = 0;               // of the batch, counted or not
  std::optional<double> validation_loss;  // mean over the counted tokens, after the step
};

/// The number of steps that take so many samples, `batch` each; the last may take fewer.
qeft::index_t steps_of(qeft::index_t samples, qeft::index_t batch);

/// A member of two settings: its values as they are shown, "nothing" where it is missing.
struct setting_difference {
  std::string key;
  std::string first;
  std::string second;
};
/// The first member that is not the same in two objects.
std::optional<setting_difference> find_difference(const nlohmann::json& first,
                                                  const nlohmann::json& second);

/// Trains with AdamW. The gradient of a step is that of the mean loss of the counted tokens of its
/// batch: the sum over its samples, one after the other, of what each has by itself. The samples
/// are taken in a new random order in every pass, which the seed decides.
///
/// With validation samples the best parameters are kept, beginning with the initial ones.
///
/// Weak-column dropout acts through the parameters' values: during backward they are those of the
/// step's dropped columns; at every other time, also behind an error, they are the trained ones.
///
/// Ranks share the samples of a batch and those to validate with. Each has a model of its own and
/// is given the same; the functions that change or measure the model are called on all, and then
/// all models are the same. Between ranks go the gradients, of every sample that is not rank 0's
/// own, to rank 0, which takes the step, and the values of the parameters back.
///
/// The same for any number of threads and of ranks, and whether it runs in one go or is gone on
/// with.
class trainer {
 public:
  /// @param model lives as long as this object, as ranks do, and is as at the start
  /// @throws qeft::error naming an option that is out of range, or a sample without counted tokens
  trainer(const qeft::on_host& exec, trainable& model, const trainer_options& options,
          std::vector<training_sample> training, std::vector<training_sample> validation,
          communicator& ranks = one_process());

  communicator& ranks() const noexcept { return ranks_; }

  /// Steps done.
  qeft::index_t step() const noexcept { return step_; }
  bool done() const noexcept { return step_ == options_.steps; }
  /// Steps in all.
  qeft::index_t steps() const noexcept { return options_.steps; }

  /// Measures the model before training; nothing where it is measured already, or there are no
  /// validation samples. Called by advance().
  /// @throws qeft::error errc::not_finite when the loss of the model as it came is NaN or infinite
  std::optional<double> measure_start();

  /// One step. @pre not done()
  /// @throws qeft::error errc::not_finite, naming the step and what to do, when loss or gradient
  ///         or a trained value is NaN or infinite
  step_report advance();

  /// The validation loss of the best parameters and the step behind which they were found; nothing
  /// without validation samples.
  struct best_result {
    double loss;
    qeft::index_t step;
  };
  const std::optional<best_result>& best() const noexcept { return best_; }

  /// The validation loss before training, once it is measured.
  const std::optional<double>& start_loss() const noexcept { return start_loss_; }

  /// Gives the model its best parameters; without validation samples it keeps the last.
  void take_best();

  /// Writes the whole state to one file, replacing it when it is complete on the disk. For rank 0,
  /// which has it.
  /// @param setting what load() must be given again, an object of the names and values of whatever
  ///                decides the result
  void save(const std::filesystem::path& file, const nlohmann::json& setting) const;

  /// Goes on with a state that save() wrote, which rank 0 reads.
  /// @throws qeft::error errc::invalid_argument naming the member of `setting` that differs,
  ///         errc::corrupt_file for a file that is damaged or does not fit the model; then nothing
  ///         has changed
  void load(const std::filesystem::path& file, const nlohmann::json& setting);

 private:
  using numbers = std::vector<float>;

  const training_sample& sample_at(qeft::index_t position);
  void drop_columns();
  void restore_columns();
  void check_finite(double value, const char* what) const;
  void share_values();
  void add_to_sum(qeft::index_t ranks);
  double take_step(double rate);
  void read_state(const std::filesystem::path& file, const nlohmann::json& setting);
  template <class Action>
  auto explained(qeft::index_t step, const Action& action) const;
  double backward(qeft::index_t first, qeft::index_t last, qeft::index_t counted);
  double add_gradients(qeft::index_t first, qeft::index_t last, qeft::index_t counted);
  double validate();
  bool validates_now() const;
  void keep_if_best(double loss);

  qeft::on_host exec_;
  trainable& model_;
  trainer_options options_;
  std::vector<training_sample> training_;
  std::vector<training_sample> validation_;
  communicator& ranks_;
  qeft::weak_dropout dropout_;
  qeft::index_t step_ = 0;
  std::vector<numbers> initial_;  // with l2_sp or dropout; one per parameter, and so below
  std::vector<numbers> trained_;  // while columns are dropped
  // Of rank 0 alone.
  std::vector<numbers> sum_;  // of the gradients of a batch's samples so far
  std::vector<numbers> m_;
  std::vector<numbers> v_;
  std::vector<numbers> best_values_;
  std::optional<best_result> best_;
  std::optional<double> start_loss_;
  std::vector<qeft::index_t> order_;  // of the samples in pass pass_
  qeft::index_t pass_ = -1;
};

}  // namespace qeft_llm
