#include "plan_group.h"

#include <algorithm>

namespace aerogel {

namespace {

// Larger planes waste little of their last vector, and a group of them would leave the second cache.
constexpr int64_t kMostColumns = 64;
constexpr int64_t kGroupColumns = 208;  // of a group

bool is_small(const Value& v) {
  return v.ld == 1 || (!v.tokens && v.columns() <= kMostColumns);
}

}  // namespace

bool picks(const Op& op, const std::vector<Value>& values) {
  const Value& out = values[op.output];
  const Value& in = values[op.inputs[0]];
  return op.reads_picked() && !is_small(in) && is_small(out);
}

int64_t group_images(int64_t columns, int64_t batch, int64_t threads) {
  if (columns > kMostColumns) return 1;
  const int64_t own = batch < threads ? batch : batch / threads;
  const int64_t most = std::clamp<int64_t>(kGroupColumns / columns, 1, own);
  const int64_t groups = (own + most - 1) / most;
  return (own + groups - 1) / groups;
}

void place_in_group(int64_t images, Value* value) {
  Value& v = *value;
  v.place = Place::kGroup;
  v.images = images;
  if (v.ld == 1) {
    v.stride = round_up(v.channels, kLineFloats);
    return;
  }
  v.stride = v.columns();
  // Whole lines may be written from the last image's columns on.
  v.ld = padded_row((images - 1) * v.stride + round_up(v.stride, kLineFloats));
}

namespace {

class GroupFinder {
 public:
  GroupFinder(const Graph& graph, const std::vector<bool>& joint)
      : graph_(graph), joint_(joint), group_(graph.ops.size()), read_alone_(graph.values.size()) {
    for (size_t i = 0; i < group_.size(); ++i) group_[i] = !joint_[i] && small(*graph_.ops[i]);
    // From the end: what an operation outside of the set reads is made before it.
    for (size_t i = group_.size(); i-- > 0;) {
      if (read_alone_[graph_.ops[i]->output]) group_[i] = false;
      if (group_[i] || joint_[i]) continue;
      for (int v : graph_.ops[i]->inputs) read_alone_[v] = true;
    }
  }

  Grouping grouping() {
    int64_t columns = 0;
    bool any = false;
    for (size_t i = 0; i < group_.size(); ++i) {
      if (!group_[i]) continue;
      Op& op = *graph_.ops[i];
      op.on_group = as_one(op);
      any = any || op.on_group;
      columns = std::max(columns, graph_.values[op.output].columns());
      for (int v : op.inputs) {
        if (!value(v).constant && is_small(value(v))) {
          columns = std::max(columns, value(v).columns());
        }
      }
    }
    Grouping grouping{group_, any ? group_images(columns, graph_.batch, graph_.parts) : 1};
    if (grouping.images == 1) {
      grouping.ops.assign(group_.size(), false);
      for (const std::unique_ptr<Op>& op : graph_.ops) op->on_group = false;
    }
    return grouping;
  }

 private:
  const Value& value(int v) const { return graph_.values[static_cast<size_t>(v)]; }

  bool small(const Op& op) const {
    const auto fits = [&](int v) {
      const bool picked = v == op.inputs[0] && picks(op, graph_.values);
      return value(v).constant || is_small(value(v)) || picked;
    };
    return is_small(value(op.output)) && std::all_of(op.inputs.begin(), op.inputs.end(), fits);
  }

  bool as_one(const Op& op) const {
    const Value& out = value(op.output);
    if (picks(op, graph_.values)) return true;
    const auto fits = [&](int v) {
      return value(v).ld != 1 && !value(v).constant && value(v).columns() == out.columns();
    };
    return out.ld != 1 && op.takes_group(out.columns()) &&
           std::all_of(op.inputs.begin(), op.inputs.end(), fits);
  }

  const Graph& graph_;
  const std::vector<bool>& joint_;
  std::vector<bool> group_, read_alone_;
};

}  // namespace

Grouping find_groups(const Graph& graph, const std::vector<bool>& joint) {
  if (graph.batch == 1) return {std::vector<bool>(graph.ops.size(), false), 1};
  return GroupFinder(graph, joint).grouping();
}

}  // namespace aerogel
