// SPDX-License-Identifier: Apache-2.0
#include "quantized_writer.hpp"

#include <algorithm>
#include <string>
#include <utility>

#include "llama_graph.hpp"
#include "qeft/io/atomic_file.hpp"
#include "qeft/io/checkpoint.hpp"
#include "qeft/io/json.hpp"
#include "qeft/reorder/permute_matrix.hpp"

namespace qeft_llm {

namespace io = qeft::io;
using qeft::index_t;

void check_heads(const model_config& config, const column_choice& columns) {
  if (!columns.per_head(linear_kind::o)) return;
  const index_t repeats = config.num_attention_heads / config.num_key_value_heads;
  for (index_t l = 0; l < config.num_hidden_layers; ++l) {
    const column_list& weak = columns.weak(linear_name(l, linear_kind::o));
    const auto is_weak = [&](index_t head, index_t channel) {
      return std::binary_search(weak.begin(), weak.end(), head * config.head_dim + channel);
    };
    std::vector<index_t> count(static_cast<std::size_t>(config.num_attention_heads));
    bool same = true;
    for (index_t head = 0; head < config.num_attention_heads; ++head) {
      for (index_t c = 0; c < config.head_dim; ++c) {
        same = same && is_weak(head, c) == is_weak(head / repeats * repeats, c);
        count[static_cast<std::size_t>(head)] += is_weak(head, c) ? 1 : 0;
      }
    }
    if (same && count == std::vector<index_t>(count.size(), count[0])) continue;
    qeft::fail(qeft::errc::invalid_argument,
               "quantize: --weak-placement per_head needs the same weak columns in all query heads "
               "of a value head, and equally many in all heads, but those of " +
                   linear_name(l, linear_kind::o) + " in --weak-columns-from differ");
  }
}

namespace {

/// The order of a linear's columns, then weak ones last.
qeft::permutation stored_order(const column_choice& columns, const std::string& linear) {
  const qeft::permutation& order = columns.order(linear);
  return compose(order, qeft::weak_last(order.size(), places_of(columns.weak(linear), order)));
}

/// The order of a block's value channels that puts o_proj's columns in theirs, weak ones last in
/// each head.
qeft::permutation value_order(const model_config& config, const column_choice& columns,
                              index_t block) {
  const std::string o = linear_name(block, linear_kind::o);
  const qeft::permutation& order = columns.order(o);
  const qeft::permutation stored =
      compose(order, qeft::weak_last_per_head(order.size(), config.num_attention_heads,
                                              places_of(columns.weak(o), order)));
  // The query heads of a value head share their order: take the first of each group.
  const index_t repeats = config.num_attention_heads / config.num_key_value_heads;
  std::vector<std::int32_t> value;
  for (index_t head = 0; head < config.num_key_value_heads; ++head) {
    for (index_t c = 0; c < config.head_dim; ++c) {
      const index_t channel = stored[head * repeats * config.head_dim + c] % config.head_dim;
      value.push_back(static_cast<std::int32_t>(head * config.head_dim + channel));
    }
  }
  return qeft::permutation(std::move(value));
}

}  // namespace

qeft::reorder_plan reorder(const quantize_options& o, const model_config& config,
                           const column_choice& columns) {
  const llama_graph g = describe(config);
  qeft::reorder_plan plan(g.graph);
  if (!o.reorder) return plan;
  plan.set(g.stream, stored_order(columns, linear_name(0, linear_kind::q)));
  for (index_t l = 0; l < config.num_hidden_layers; ++l) {
    const auto at = static_cast<std::size_t>(l);
    plan.set(g.mlp[at], stored_order(columns, linear_name(l, linear_kind::down)));
    if (columns.per_head(linear_kind::o)) plan.set(g.value[at], value_order(config, columns, l));
  }
  return plan;
}

namespace {

class model_writer {
 public:
  model_writer(const quantize_options& options, const model_source& source,
               const column_choice& columns, const work_directory& finished)
      : source_(source),
        config_(source.config()),
        columns_(columns),
        finished_(finished),
        plan_(reorder(options, config_, columns)),
        writer_(std::map<std::string, std::string>{{"format", "pt"}}) {}

  io::quantization_config write(const std::filesystem::path& directory, nlohmann::json provenance) {
    quantization_.provenance = std::move(provenance);
    add_full_precision("model.embed_tokens");
    if (!config_.tie_word_embeddings) add_full_precision("lm_head");
    add_vector("model.norm.weight", "model.norm", config_.hidden_size);
    for (index_t l = 0; l < config_.num_hidden_layers; ++l) add_block(l);
    add_permutations();
    quantization_.defaults = quantization_.layers.begin()->second;
    writer_.write_directory(directory);

    nlohmann::json config = config_.source;
    config["quantization_config"] = io::to_json(quantization_);
    io::write_text_file(directory / "config.json", io::dump_json(config, 2) + "\n");
    return std::move(quantization_);
  }

 private:
  void add_block(index_t l) {
    const std::string block = "model.layers." + std::to_string(l);
    for (const char* norm : {".input_layernorm", ".post_attention_layernorm"}) {
      add_vector(block + norm + ".weight", block + norm, config_.hidden_size);
    }
    for (const linear_kind kind : all_linears) {
      const std::string name = linear_name(l, kind);
      add_linear(name, columns_.per_head(kind) ? config_.num_attention_heads : 1);
      const std::string bias = name + ".bias";
      if (has_bias(config_, kind)) {
        add_vector(bias, bias, shape_of(config_, kind).out_channels);
      }
    }
  }

  /// @param heads in which the weak columns lie equally
  void add_linear(const std::string& name, index_t heads) {
    const auto load = [this, name, heads] {
      finished_linear done = finished_.load_linear(name);
      done.matrix = reordered(name, std::move(done.matrix), done.order, heads);
      return done;
    };
    const finished_linear done = load();
    const qeft::matrix_descriptor d = done.matrix.descriptor();
    quantization_.layers[name] = d;
    quantization_.provenance["layers"][name] = done.report;
    io::add_linear(writer_, name, d, columns_.weak(name),
                   [this, name, load]() -> const packed_matrix& {
                     if (at_work_ != name) {
                       matrix_ = load().matrix;
                       at_work_ = name;
                     }
                     return matrix_;
                   });
  }

  /// A tensor that is not quantised, which the writer asks for when it is its turn.
  void add_full_precision(const std::string& name) {
    const auto load = [this, name] {
      return reordered(name, source_.matrix(name, config_.vocab_size, config_.hidden_size),
                       qeft::permutation::identity(config_.hidden_size));
    };
    writer_.add(name + ".weight", io::dtype_of(load().descriptor().scalar),
                {config_.vocab_size, config_.hidden_size},
                [load](const io::safetensors_writer::sink& out) { out(load().weak()); });
  }

  /// A norm or a bias: its channels run over the columns of the described tensor.
  void add_vector(const std::string& tensor, const std::string& described, index_t size) {
    std::vector<float> values = source_.vector(tensor, size);
    if (const auto* p = plan_.columns(described)) {
      qeft::permute_columns(*p, qeft::span<float>(values));
    }
    const qeft::span<const std::byte> bytes = io::as_bytes(values);
    writer_.add(tensor, io::dtype::f32, {size}, std::vector<std::byte>(bytes.begin(), bytes.end()));
  }

  void add_permutations() {
    const llama_graph g = describe(config_);
    const auto add = [&](const std::string& space, qeft::space_id id) {
      if (!plan_.of(id).is_identity()) io::add_permutation(writer_, space, plan_.of(id));
    };
    add("stream", g.stream);
    for (std::size_t l = 0; l < g.mlp.size(); ++l) {
      add("mlp." + std::to_string(l), g.mlp[l]);
      add("value." + std::to_string(l), g.value[l]);
    }
  }

  /// @param order that the columns have already
  packed_matrix reordered(const std::string& name, packed_matrix m, const qeft::permutation& order,
                          index_t heads = 1) const {
    if (const auto* rows = plan_.rows(name); rows != nullptr && !rows->is_identity()) {
      m = qeft::permute_rows(*rows, m);
    }
    if (const auto* columns = plan_.columns(name); columns != nullptr && !columns->is_identity()) {
      m = qeft::permute_columns(compose(order.inverse(), *columns), m, heads);
    }
    return m;
  }

  const model_source& source_;
  const model_config& config_;
  const column_choice& columns_;
  const work_directory& finished_;
  qeft::reorder_plan plan_;
  io::safetensors_writer writer_;
  io::quantization_config quantization_;
  // The layer whose tensors are being written: several stand in a row in the file.
  std::string at_work_;
  packed_matrix matrix_;
};

}  // namespace

io::quantization_config write_quantized_model(
    const std::filesystem::path& directory, const quantize_options& options,
    const model_source& source, const column_choice& columns, const work_directory& finished,
    const std::vector<std::filesystem::path>& side_files, nlohmann::json provenance) {
  auto written =
      model_writer(options, source, columns, finished).write(directory, std::move(provenance));
  for (const auto& file : side_files) {
    const std::filesystem::path to = directory / file.lexically_relative(options.model);
    std::filesystem::create_directories(to.parent_path());
    io::copy_file(file, to);
  }
  return written;
}

}  // namespace qeft_llm
