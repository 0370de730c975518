// SPDX-License-Identifier: Apache-2.0
// `qeft-llm merge` and `qeft-llm unmerge`.
#include "merge.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <deque>
#include <filesystem>
#include <map>
#include <optional>
#include <set>
#include <utility>

#include "llama_graph.hpp"
#include "model_copy.hpp"
#include "model_match.hpp"
#include "qeft/io/atomic_directory.hpp"
#include "qeft/io/checkpoint.hpp"
#include "qeft/io/json.hpp"

namespace qeft_llm {

namespace fs = std::filesystem;
namespace io = qeft::io;
using nlohmann::json;
using qeft::errc;
using qeft::fail;
using qeft::index_t;

namespace {

constexpr const char* before_file = "before_merge.qeft";
constexpr const char* before_kind = "qeft.before_merge";
constexpr const char* before_version = "1";

/// The order in which a model's files keep the original channels.
qeft::reorder_plan plan_of(const model_source& source) {
  const model_config& c = source.config();
  const llama_graph g = describe(c);
  qeft::reorder_plan plan(g.graph);
  const auto set = [&](qeft::space_id id, const std::string& space, index_t channels) {
    plan.set(id, io::read_permutation(source.weights().reader(), space, channels));
  };
  set(g.stream, "stream", c.hidden_size);
  for (std::size_t l = 0; l < g.mlp.size(); ++l) {
    set(g.mlp[l], "mlp." + std::to_string(l), c.intermediate_size);
    set(g.value[l], "value." + std::to_string(l), c.num_key_value_heads * c.head_dim);
  }
  return plan;
}

/// The values of a linear's weak columns in its 16-bit type.
std::vector<std::byte> rounded(const float* values, const qeft::matrix_descriptor& d) {
  const index_t count = d.out_channels * d.weak_columns;
  std::vector<std::byte> bytes(static_cast<std::size_t>(2 * count));
  for (index_t i = 0; i < count; ++i) {
    io::store_number(io::dtype_of(d.scalar), static_cast<double>(values[i]), bytes.data(), i);
  }
  return bytes;
}

/// Columns of a 2-D tensor, in ascending order.
struct column_set {
  io::dtype type = io::dtype::f16;
  index_t rows = 0;
  std::vector<std::int32_t> columns;
  std::vector<std::byte> values;  // (rows, columns)

  index_t count() const { return static_cast<index_t>(columns.size()); }
};
using column_sets = std::map<std::string, column_set>;  // by the tensor's name in the files

/// The bytes of a tensor with some columns replaced.
std::vector<std::byte> with_columns(const io::tensor_view& t, const column_set& set) {
  std::vector<std::byte> bytes(t.data.begin(), t.data.end());
  const auto size = static_cast<std::size_t>(size_of(t.type));
  for (index_t n = 0; n < set.rows; ++n) {
    for (index_t i = 0; i < set.count(); ++i) {
      const index_t to = n * t.shape[1] + set.columns[static_cast<std::size_t>(i)];
      std::memcpy(bytes.data() + static_cast<std::size_t>(to) * size,
                  set.values.data() + static_cast<std::size_t>(n * set.count() + i) * size, size);
    }
  }
  return bytes;
}

/// Copies all files of a model but config.json, with columns of some tensors replaced.
/// @return the fingerprint of the copy
std::string copy_with(const column_sets& sets, const fs::path& model,
                      const io::safetensors_reader& reader, const fs::path& to) {
  return copy_model(model, reader, to, [&](const io::tensor_view& t) {
    const auto set = sets.find(t.name);
    return set == sets.end() ? std::nullopt : std::optional(with_columns(t, set->second));
  });
}

/// Keeps what `unmerge` needs beside a merged model.
void write_before(const fs::path& directory, const column_sets& before, const std::string& base,
                  const fs::path& config) {
  io::safetensors_writer writer(std::map<std::string, std::string>{
      {"format", before_kind}, {"format_version", before_version}, {"base", base}});
  for (const auto& [name, set] : before) {
    io::add_i32(writer, name + ".columns", set.columns);
    writer.add(name + ".before", set.type, {set.rows, set.count()}, io::as_bytes(set.values));
  }
  const io::mapped_file text(config);
  writer.add("config.json", io::dtype::u8, {text.bytes().size()}, text.bytes());
  writer.write(directory / before_file);
}

/// The counterpart of write_before. Nothing in the file is trusted.
column_sets read_before(const io::safetensors_reader& kept, const io::safetensors_reader& model) {
  const std::string suffix = ".before";
  column_sets before;
  for (const std::string& stored : kept.names()) {
    if (stored.size() <= suffix.size() ||
        stored.compare(stored.size() - suffix.size(), suffix.size(), suffix) != 0) {
      continue;
    }
    const std::string name = stored.substr(0, stored.size() - suffix.size());
    const io::tensor_view& values = kept.at(stored);
    const io::tensor_view& t = model.at(name);
    if (t.shape.size() != 2 || values.shape.size() != 2 || values.type != t.type ||
        values.shape[0] != t.shape[0]) {
      io::fail_corrupt(kept.where(), "tensor '" + stored + "' is " + to_string(values.type) + " " +
                                         io::to_string(values.shape) +
                                         ", but must be columns of a " + to_string(t.type) + " " +
                                         io::to_string(t.shape));
    }
    const index_t count = values.shape[1];
    column_set set{t.type,
                   t.shape[0],
                   io::read_i32(kept, name + ".columns", count),
                   {values.data.begin(), values.data.end()}};
    if (const auto s = qeft::validate_weak_index(set.columns, count, t.shape[1]); !s.ok()) {
      io::fail_corrupt(kept.where(), "tensor '" + name + ".columns': " + std::string(s.message()));
    }
    before.emplace(name, std::move(set));
  }
  return before;
}

/// What merging did to a layer.
struct layer_report {
  std::string name;
  index_t columns = 0;  // changed, over all adapters
  index_t missing = 0;  // not weak in the model
};

class merger {
 public:
  explicit merger(const merge_options& options)
      : o_(options), source_(o_.model), config_(source_.config()), plan_(plan_of(source_)) {}

  void run() {
    check_options();
    io::atomic_directory out(o_.out);
    source_.weights().require(expected_tensors(config_));
    const std::string base = io::weights_fingerprint(source_.weights().reader());
    for (const std::string& file : o_.adapters) add_adapter(file, base);
    check_kinds();
    for (index_t l = 0; l < config_.num_hidden_layers; ++l) {
      for (const linear_kind kind : all_linears) merge_linear(l, kind);
    }
    report_missing();
    const fs::path model = o_.model;
    const std::string merged = copy_with(after_, model, source_.weights().reader(), out.partial());
    json config = io::load_json(model / "config.json");
    json& all = config["qeft_adapters"];  // a model may be quantised after a merge
    if (!all.is_array()) all = json::array();
    for (json& added : provenance()) all.push_back(std::move(added));
    io::write_text_file(out.partial() / "config.json", io::dump_json(config, 2) + "\n");
    write_before(out.partial(), before_, base, model / "config.json");
    out.commit();
    if (o_.json) print_json(merged);
  }

 private:
  void check_options() const {
    const auto refuse = [](const std::string& what) {
      fail(errc::invalid_argument, "merge: " + what);
    };
    if (o_.adapters.empty()) refuse("--adapter is missing, but must be given");
    if (!o_.weights.empty() && o_.weights.size() != o_.adapters.size()) {
      refuse(qeft::text("--weight is given ", o_.weights.size(),
                        " times, but must be for none or "
                        "each of ",
                        o_.adapters.size(), " adapters"));
    }
    for (const double w : o_.weights) {
      if (!std::isfinite(w)) refuse(qeft::text("--weight is ", w, ", but must be finite"));
    }
    if (is_merged(o_.model)) {
      refuse("--model " + o_.model +
             " is merged already, but must be its base (see unmerge); "
             "several adapters are merged at once");
    }
  }

  double weight(std::size_t adapter) const { return o_.weights.empty() ? 1 : o_.weights[adapter]; }

  void check_architecture(const std::string& path, const std::string& theirs) const {
    const std::string ours = architecture_of(config_);
    if (theirs == ours) return;
    fail(errc::invalid_argument,
         "merge: " + path + " is for " + theirs + ", but " + o_.model + " is " + ours);
  }

  /// @param made_of the fingerprint that the model must have; empty when it is not known
  void check_base(const std::string& path, const std::string& made_of, const std::string& base) {
    if (made_of == base) return;
    const std::string what = path + " was made of " +
                             (made_of.empty() ? "a model that it does not name" : made_of) +
                             ", but " + o_.model + " is " + base;
    if (!made_of.empty() && !o_.other_base) {
      fail(errc::invalid_argument,
           "merge: " + what + "; --other-base adds an adapter of another model");
    }
    // What is known to be of another model outweighs what is not known.
    if (!made_of.empty()) same_base_ = false;
    if (made_of.empty() && same_base_ == true) same_base_.reset();
    std::fprintf(stderr, "notice: %s; it is added all the same\n", what.c_str());
  }

  /// Reads an adapter and checks whether it fits the model.
  void add_adapter(const std::string& path, const std::string& base) {
    if (is_lora_adapter(path)) {
      add_lora(path, base);
      return;
    }
    io::adapter a = io::read_adapter(path);
    check_architecture(path, a.architecture);
    std::map<std::string, linear_shape> shapes;
    for (index_t l = 0; l < config_.num_hidden_layers; ++l) {
      for (const linear_kind kind : all_linears) {
        shapes[linear_name(l, kind)] = shape_of(config_, kind);
      }
    }
    for (const auto& [name, linear] : a.linears) {
      const auto s = shapes.find(name);
      if (s == shapes.end() || s->second.out_channels != linear.out_channels ||
          s->second.in_channels != linear.in_channels) {
        fail(errc::invalid_argument,
             qeft::text("merge: ", path, " changes ", name, " of ", linear.out_channels, " x ",
                        linear.in_channels, ", but ", o_.model,
                        " has no linear of that name and shape"));
      }
    }
    check_base(path, config_.quantization ? a.base : a.full_precision, base);
    bases_.push_back(a.base);
    low_rank_.emplace_back();
    adapters_.push_back(std::move(a));
  }

  void add_lora(const std::string& path, const std::string& base) {
    lora_adapter a = read_lora_adapter(path);
    check_architecture(path, a.architecture);
    if (a.groupwise != config_.quantization.has_value()) {
      fail(errc::invalid_argument,
           "merge: " + path +
               (a.groupwise ? " is of QA-LoRA, for the quantised model it was made of"
                            : " is of LoRA, for a model in full precision") +
               ", but " + o_.model + " is not one");
    }
    // Another checkpoint may have its columns in other groups.
    if (a.groupwise && a.base != base) {
      fail(errc::invalid_argument, "merge: " + path + " was made of " + a.base + ", but " +
                                       o_.model + " is " + base +
                                       "; an adapter of QA-LoRA fits no other model");
    }
    if (!a.groupwise) check_base(path, a.base, base);
    std::map<std::string, linear_shape> targets;
    for (index_t l = 0; l < config_.num_hidden_layers; ++l) {
      for (const linear_kind kind : all_linears) {
        const std::string name = linear_name(l, kind);
        linear_shape& s = targets[name] = shape_of(config_, kind);
        if (!a.groupwise) continue;
        const qeft::matrix_descriptor* d = config_.quantization->find(name);
        s.in_channels = d == nullptr ? 0 : d->groups();
      }
    }
    for (const auto& [name, linear] : a.linears) {
      const auto s = targets.find(name);
      if (s != targets.end() && s->second.out_channels == linear.out_channels &&
          s->second.in_channels == linear.width) {
        continue;
      }
      fail(errc::invalid_argument,
           qeft::text("merge: ", path, " changes ", name, " by ", linear.out_channels, " x ",
                      linear.width, " numbers, but ", o_.model, " has no such linear"));
    }
    bases_.push_back(a.base);
    low_rank_.push_back(std::move(a));
    adapters_.emplace_back();
  }

  /// In a checkpoint they change weak columns or zero points, not both.
  void check_kinds() const {
    if (!config_.quantization) return;
    for (const auto& a : low_rank_) {
      if (a.has_value() == low_rank_.front().has_value()) continue;
      fail(errc::invalid_argument,
           "merge: --adapter is given for adapters of QA-LoRA and of weak columns, but for a "
           "quantised model all must be of one kind");
    }
  }

  /// What an adapter adds to a linear, or null; `made` keeps what is made for it.
  const io::adapter_linear* linear_of(std::size_t adapter, const std::string& name,
                                      std::deque<io::adapter_linear>& made) const {
    if (!low_rank_[adapter]) {
      const auto found = adapters_[adapter].linears.find(name);
      return found == adapters_[adapter].linears.end() ? nullptr : &found->second;
    }
    const lora_adapter& a = *low_rank_[adapter];
    const auto found = a.linears.find(name);
    if (found == a.linears.end()) return nullptr;
    const lora_linear& l = found->second;
    made.push_back(
        {l.out_channels, l.width, qeft::permutation::identity(l.width).source(), product(a, l)});
    if (a.groupwise) {
      // A mean over a group is a sum divided by its size.
      const qeft::matrix_descriptor& d = *config_.quantization->find(name);
      for (index_t i = 0; i < l.out_channels * l.width; ++i) {
        const index_t first = i % l.width * d.columns_per_group();
        const index_t size = std::min(d.columns_per_group(), d.dense_columns() - first);
        made.back().delta[static_cast<std::size_t>(i)] /= static_cast<double>(size);
      }
    }
    return &made.back();
  }

  /// The tensor that holds a linear's columns, and which of the original model they are; ascending.
  struct target {
    const io::tensor_view* tensor = nullptr;  // null when there are none
    std::vector<std::int32_t> columns;
    const qeft::permutation* rows = nullptr;  // row i is row rows[i] of the original model
  };

  target target_of(const std::string& name, const linear_shape& s) const {
    if (!config_.quantization) {
      return {&source_.weights().view(name + ".weight", {s.out_channels, s.in_channels}),
              qeft::permutation::identity(s.in_channels).source(), nullptr};
    }
    const io::safetensors_reader& reader = source_.weights().reader();
    // Also checks everything about it.
    io::stored_linear stored = io::read_linear(reader, name, *config_.quantization);
    if (low_rank_.front()) {
      const index_t groups = stored.matrix.descriptor().groups();
      if (groups == 0) return {};
      return {&reader.at(name + ".zeros"), qeft::permutation::identity(groups).source(), nullptr};
    }
    if (stored.weak_index.empty()) return {};
    return {&reader.at(name + ".weak"), std::move(stored.weak_index), plan_.rows(name)};
  }

  /// A column of an adapter.
  struct term {
    const io::adapter_linear* linear;
    index_t column;  // among those it has
    double weight;
  };

  void merge_linear(index_t block, linear_kind kind) {
    layer_report report{linear_name(block, kind)};
    const target to = target_of(report.name, shape_of(config_, kind));
    std::map<std::int32_t, std::vector<term>> terms;  // by column of the tensor
    std::deque<io::adapter_linear> made;
    for (std::size_t a = 0; a < adapters_.size(); ++a) {
      const io::adapter_linear* found = linear_of(a, report.name, made);
      if (found == nullptr) continue;
      const std::vector<std::int32_t>& columns = found->columns;
      for (std::size_t j = 0; j < columns.size(); ++j) {
        const auto at = std::lower_bound(to.columns.begin(), to.columns.end(), columns[j]);
        if (at == to.columns.end() || *at != columns[j]) {
          ++report.missing;
          continue;
        }
        ++report.columns;
        terms[static_cast<std::int32_t>(at - to.columns.begin())].push_back(
            {found, static_cast<index_t>(j), weight(a)});
      }
    }
    if (report.columns > 0) change(report.name, to, terms);
    layers_.push_back(std::move(report));
  }

  void change(const std::string& name, const target& to,
              const std::map<std::int32_t, std::vector<term>>& terms) {
    const io::tensor_view& t = *to.tensor;
    column_set before{t.type, t.shape[0], {}, {}};
    for (const auto& [column, unused] : terms) before.columns.push_back(column);
    const auto count = static_cast<index_t>(terms.size());
    before.values.resize(static_cast<std::size_t>(t.shape[0] * count * size_of(t.type)));
    column_set after = before;
    for (index_t n = 0; n < t.shape[0]; ++n) {
      const index_t row = to.rows == nullptr ? n : (*to.rows)[n];
      index_t i = n * count;
      for (const auto& [column, all] : terms) {
        double value = io::number_at(t.type, t.data.data(), n * t.shape[1] + column);
        io::store_number(t.type, value, before.values.data(), i);
        for (const term& x : all) {
          value += x.weight * x.linear->at(row, x.column);
        }
        io::store_number(t.type, value, after.values.data(), i);
        if (!std::isfinite(io::number_at(t.type, after.values.data(), i))) {
          fail(errc::not_finite,
               qeft::text("merge: ", name, ", row ", row, ", column ",
                          to.columns[static_cast<std::size_t>(column)], " becomes ", value,
                          ", but must be finite in ", to_string(t.type)));
        }
        ++i;
      }
    }
    before_.emplace(t.name, std::move(before));
    after_.emplace(t.name, std::move(after));
  }

  /// Columns that do not fit are never dropped in silence.
  void report_missing() const {
    index_t columns = 0;
    index_t missing = 0;
    std::string list;
    for (const layer_report& r : layers_) {
      columns += r.columns;
      missing += r.missing;
      if (r.missing == 0) continue;
      list += qeft::text("\n  ", r.name, ": ", r.missing, " of ", r.columns + r.missing);
    }
    const std::string what = qeft::text(missing, " of ", columns + missing,
                                        " columns are not weak in ", o_.model, ":", list);
    if (missing > 0 && !o_.skip_missing) {
      fail(errc::invalid_argument, "merge: " + what + "\n--skip-missing leaves them out");
    }
    if (columns == 0) {
      fail(errc::invalid_argument, "merge: the adapters change no column of " + o_.model);
    }
    if (missing > 0) std::fprintf(stderr, "notice: left out: %s\n", what.c_str());
  }

  json provenance() const {
    json list = json::array();
    for (std::size_t a = 0; a < adapters_.size(); ++a) {
      list.push_back({{"file", fs::path(o_.adapters[a]).filename().string()},
                      {"weight", weight(a)},
                      {"base", bases_[a]}});
    }
    return list;
  }

  void print_json(const std::string& fingerprint) const {
    nlohmann::ordered_json result = {
        {"out", o_.out}, {"fingerprint", fingerprint}, {"adapters", provenance()}};
    result["same_base"] = same_base_ ? json(*same_base_) : json();
    index_t columns = 0;
    index_t missing = 0;
    nlohmann::ordered_json layers = nlohmann::ordered_json::array();
    for (const layer_report& r : layers_) {
      columns += r.columns;
      missing += r.missing;
      layers.push_back({{"name", r.name}, {"columns", r.columns}, {"missing", r.missing}});
    }
    result["columns"] = columns;
    result["missing"] = missing;
    result["layers"] = std::move(layers);
    std::printf("%s\n", result.dump(-1, ' ', false, json::error_handler_t::replace).c_str());
  }

  merge_options o_;
  model_source source_;
  const model_config& config_;
  qeft::reorder_plan plan_;
  std::vector<io::adapter> adapters_;
  std::vector<std::optional<lora_adapter>> low_rank_;  // beside adapters_: the one or the other
  std::vector<std::string> bases_;
  std::optional<bool> same_base_ = true;  // of all adapters; nothing when one does not name it
  std::vector<layer_report> layers_;
  column_sets before_;
  column_sets after_;
};

}  // namespace

io::adapter make_adapter(const model_source& base,
                         const std::function<const float*(const std::string& linear)>& tuned) {
  const model_config& config = base.config();
  const io::safetensors_reader& reader = base.weights().reader();
  const qeft::reorder_plan plan = plan_of(base);
  io::adapter result;
  for (index_t l = 0; l < config.num_hidden_layers; ++l) {
    for (const linear_kind kind : all_linears) {
      const std::string name = linear_name(l, kind);
      const auto* d = config.quantization ? config.quantization->find(name) : nullptr;
      const float* values = d != nullptr && d->weak_columns > 0 ? tuned(name) : nullptr;
      if (values == nullptr) continue;
      result.linears.emplace(name, io::make_adapter_linear(name, io::read_linear(reader, name, *d),
                                                           rounded(values, *d), plan.rows(name)));
    }
  }
  if (result.linears.empty()) {
    fail(errc::invalid_argument,
         "make_adapter: no weak column of " + reader.where() + " was tuned, but one must be");
  }
  result.base = io::weights_fingerprint(reader);
  const json& how = config.quantization->provenance;
  const auto model = how.find("model_fingerprint");
  if (model != how.end() && model->is_string()) result.full_precision = model->get<std::string>();
  result.architecture = architecture_of(config);
  return result;
}

lora_adapter make_lora_adapter(const model_source& base, const std::vector<parameter>& parameters,
                               index_t rank, double alpha) {
  return {base.config().quantization.has_value(),
          rank,
          alpha,
          io::weights_fingerprint(base.weights().reader()),
          architecture_of(base.config()),
          lora_linears(parameters)};
}

bool is_merged(const fs::path& model) { return fs::exists(model / before_file); }

int run_merge(const merge_options& options) {
  merger(options).run();
  return 0;
}

int run_unmerge(const unmerge_options& options) {
  const fs::path model = options.model;
  if (!is_merged(model)) {
    fail(errc::invalid_argument, "unmerge: --model " + options.model + " has no " + before_file +
                                     ": merge did not write it");
  }
  const io::safetensors_reader kept(model / before_file);
  const auto& metadata = kept.files().front().metadata();
  const auto entry = [&](const char* key) {
    const auto found = metadata.find(key);
    return found == metadata.end() ? std::string("missing") : found->second;
  };
  if (entry("format") != before_kind || entry("format_version") != before_version) {
    fail(errc::unsupported, kept.where() + ": format and version are " + entry("format") + " and " +
                                entry("format_version") + ", but must be " + before_kind + " and " +
                                before_version);
  }
  if (!kept.verify_checksum()) io::fail_corrupt(kept.where(), "has no checksum");
  io::atomic_directory out(options.out);
  const io::safetensors_reader merged(model);
  const std::string found = copy_with(read_before(kept, merged), model, merged, out.partial());
  if (found != entry("base")) {
    io::fail_corrupt(options.model, "without the adapters the model is " + found + ", but was " +
                                        entry("base") + ": it changed since it was merged");
  }
  const io::tensor_view& config = kept.at("config.json");
  io::write_text_file(out.partial() / "config.json",
                      {reinterpret_cast<const char*>(config.data.data()),
                       static_cast<std::size_t>(config.data.size())});
  out.commit();
  return 0;
}

}  // namespace qeft_llm
