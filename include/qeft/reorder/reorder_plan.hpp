// SPDX-License-Identifier: Apache-2.0
// Offline Global Reordering over a described graph (METHOD section 4).
//
// A model is described by its channel spaces (the residual stream, the inner channels of each MLP,
// the channels of each layer's value heads) and by the tensors whose rows or columns run over them.
// A permutation per space then tells, for every tensor, how to permute it so that the model's
// function does not change: whoever writes a space and whoever reads it are permuted alike.
#pragma once

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "qeft/core/text.hpp"
#include "qeft/reorder/permutation.hpp"

namespace qeft {
inline namespace QEFT_TARGET {

/// Index of a channel space in its graph.
using space_id = int;

/// "These rows (or columns) are not reordered", e.g. the rows of an embedding or of q and k, whose
/// order rotary embeddings fix.
inline constexpr space_id no_space = -1;

class reorder_graph {
 public:
  /// A space of channels that may be permuted freely, or within `heads` equal heads only.
  space_id add_space(std::string name, index_t channels, index_t heads = 1) {
    if (channels < 1 || heads < 1 || channels % heads != 0) {
      fail(errc::invalid_argument,
           text("reorder_graph: space ", name, " has ", channels, " channels in ", heads,
                " heads, but both must be positive and heads a divisor"));
    }
    detail::check_size("reorder_graph", channels);
    spaces_.push_back({std::move(name), channels, heads, no_space, 1});
    return static_cast<space_id>(spaces_.size()) - 1;
  }

  /// A space in which every head of `base` stands `repeats` times in a row: the attention output
  /// under grouped-query attention. Its permutation follows from that of `base`.
  space_id add_repeated_space(std::string name, space_id base, index_t repeats) {
    const space& b = at(base);
    if (repeats < 1 || b.base != no_space) {
      fail(errc::invalid_argument,
           text("reorder_graph: space ", name, " repeats ", b.name, " ", repeats,
                " times, but repeats must be positive and ", b.name, " not a repetition itself"));
    }
    const index_t channels = checked_product(b.channels, repeats, "reorder_graph: repeats");
    detail::check_size("reorder_graph", channels);
    spaces_.push_back({std::move(name), channels, b.heads * repeats, base, repeats});
    return static_cast<space_id>(spaces_.size()) - 1;
  }

  /// A tensor (rows, columns): its rows run over one space, its columns over another. A norm's
  /// weight or a bias is one row, whose columns run over the space.
  void add_tensor(std::string name, space_id rows, space_id columns) {
    if (rows != no_space) at(rows);
    if (columns != no_space) at(columns);
    if (!tensors_.emplace(name, std::make_pair(rows, columns)).second) {
      fail(errc::invalid_argument, text("reorder_graph: tensor ", name, " is described twice"));
    }
  }

 private:
  friend class reorder_plan;
  struct space {
    std::string name;
    index_t channels;
    index_t heads;
    space_id base;
    index_t repeats;
  };
  const space& at(space_id id) const {
    if (id < 0 || static_cast<std::size_t>(id) >= spaces_.size()) {
      fail(errc::invalid_argument,
           text("reorder_graph: space ", id, " does not exist; there are ", spaces_.size()));
    }
    return spaces_[static_cast<std::size_t>(id)];
  }

  std::vector<space> spaces_;
  std::map<std::string, std::pair<space_id, space_id>> tensors_;
};

/// A graph and one permutation per space (identity until set).
class reorder_plan {
 public:
  explicit reorder_plan(reorder_graph graph) : graph_(std::move(graph)) {
    for (const auto& s : graph_.spaces_) {
      permutations_.push_back(permutation::identity(s.channels));
    }
  }

  /// Sets the permutation of a space and of the spaces that repeat it; throws when sizes differ, a
  /// channel leaves its head, or the space follows another one.
  void set(space_id id, permutation p) {
    const auto& s = graph_.at(id);
    if (s.base != no_space) {
      fail(errc::invalid_argument, text("reorder_plan: space ", s.name, " follows ",
                                        graph_.at(s.base).name, " and cannot be set itself"));
    }
    if (p.size() != s.channels) {
      fail(errc::invalid_argument, text("reorder_plan: the permutation of space ", s.name, " has ",
                                        p.size(), " entries, but must have ", s.channels));
    }
    const index_t head_dim = s.channels / s.heads;
    for (index_t i = 0; i < p.size() && s.heads > 1; ++i) {
      if (p[i] / head_dim != i / head_dim) {
        fail(errc::invalid_argument,
             text("reorder_plan: channel ", p[i], " of space ", s.name, " leaves its head"));
      }
    }
    for (std::size_t f = 0; f < permutations_.size(); ++f) {
      const auto& follower = graph_.spaces_[f];
      if (follower.base == id) permutations_[f] = repeat_heads(p, s.heads, follower.repeats);
    }
    permutations_[static_cast<std::size_t>(id)] = std::move(p);
  }

  const permutation& of(space_id id) const {
    graph_.at(id);
    return permutations_[static_cast<std::size_t>(id)];
  }

  /// How to permute the rows / columns of a tensor; null when they are not reordered. Throws for a
  /// tensor that the graph does not describe: forgetting one would change the model.
  const permutation* rows(const std::string& tensor) const { return lookup(find(tensor).first); }
  const permutation* columns(const std::string& tensor) const {
    return lookup(find(tensor).second);
  }

 private:
  const std::pair<space_id, space_id>& find(const std::string& tensor) const {
    const auto it = graph_.tensors_.find(tensor);
    if (it == graph_.tensors_.end()) {
      fail(errc::invalid_argument, text("reorder_plan: tensor ", tensor, " is not in the graph"));
    }
    return it->second;
  }
  const permutation* lookup(space_id id) const {
    return id == no_space ? nullptr : &permutations_[static_cast<std::size_t>(id)];
  }

  reorder_graph graph_;
  std::vector<permutation> permutations_;
};

}  // namespace QEFT_TARGET
}  // namespace qeft
