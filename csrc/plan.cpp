// From a graph to a plan: which operations run jointly, where every value lives, what is copied in
// and out.
#include "plan.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "plan_arena.h"
#include "plan_bands.h"
#include "plan_group.h"
#include "plan_ops.h"
#include "plan_parts.h"

namespace aerogel {

namespace {

constexpr int64_t kJointTokens = 64;    // images of fewer tokens share a panel of columns
constexpr int64_t kJointColumns = 512;  // columns of a chunk: its planes should stay in L2

std::vector<std::vector<int>> consumers_of(const Graph& graph) {
  std::vector<std::vector<int>> consumers(graph.values.size());
  for (size_t i = 0; i < graph.ops.size(); ++i) {
    for (int v : graph.ops[i]->inputs) {
      consumers[static_cast<size_t>(v)].push_back(static_cast<int>(i));
    }
  }
  return consumers;
}

// Which operations see a whole chunk of images as columns: those that treat columns alike, lead
// only to such operations and to outputs whose layout allows it, on values of few columns. The
// set is found by starting from all candidates and dropping what does not fit until nothing drops.
std::vector<bool> find_joint(const Graph& graph) {
  const size_t count = graph.ops.size();
  std::vector<bool> joint(count, false);
  if (graph.batch == 1) return joint;
  const auto consumers = consumers_of(graph);
  std::vector<int> producer(graph.values.size(), -1);
  std::vector<bool> token_input(graph.values.size(), false), plane_output = token_input;
  for (size_t i = 0; i < count; ++i) producer[graph.ops[i]->output] = static_cast<int>(i);
  for (const Graph::Port& port : graph.inputs) {
    token_input[port.value] = port.layout == Layout::kTokens;
  }
  for (const Graph::Port& port : graph.outputs) {
    if (port.layout == Layout::kChannels) plane_output[port.value] = true;
  }
  const auto few_columns = [&](int v) {
    const Value& value = graph.values[v];
    return value.ld == 1 || (value.tokens && value.columns() < kJointTokens);
  };
  const auto fits = [&](size_t i) {
    const Op& op = *graph.ops[i];
    const Value& out = graph.values[op.output];
    if (!few_columns(op.output) || (out.ld != 1 && plane_output[op.output])) return false;
    for (int consumer : consumers[op.output]) {
      if (!joint[consumer]) return false;
    }
    for (int v : op.inputs) {
      if (!few_columns(v) || graph.values[v].constant) return false;
      const bool made_jointly = producer[v] >= 0 && joint[producer[v]];
      if (graph.values[v].ld != 1 && !made_jointly && !token_input[v]) return false;
    }
    return true;
  };
  for (size_t i = 0; i < count; ++i) joint[i] = graph.ops[i]->columnwise();
  for (bool dropped = true; dropped;) {
    dropped = false;
    for (size_t i = 0; i < count; ++i) {
      if (joint[i] && !fits(i)) {
        joint[i] = false;
        dropped = true;
      }
    }
  }
  return joint;
}

// Rewrites a graph into operations on images, on groups of images and jointly on all of them, with
// copies at every border.
class Lowering {
 public:
  explicit Lowering(Graph& graph)
      : graph_(graph), joint_(find_joint(graph)), groups_(find_groups(graph, joint_)) {
    for (const Value& v : graph.values) planar_.push_back(v.ld != 1);
  }

  int64_t group_images() const { return groups_.images; }

  void lower(int64_t chunk, Ops* image_ops, Ops* group_ops, Ops* joint_ops) {
    values_ = &graph_.values;
    chunk_ = chunk;
    const size_t count = graph_.values.size();
    joint_form_.assign(count, -1);
    image_form_.assign(count, -1);
    group_form_.assign(count, -1);
    made_on_group_.assign(count, false);
    for (size_t i = 0; i < graph_.inputs.size(); ++i) place_input(i);
    for (size_t i = 0; i < graph_.ops.size(); ++i) {
      std::unique_ptr<Op>& op = graph_.ops[i];
      if (joint_[i]) {
        make_joint(*op, joint_ops);
        joint_ops->push_back(std::move(op));
      } else if (groups_.ops[i]) {
        make_group(*op, image_ops);
        group_ops->push_back(std::move(op));
      } else {
        make_image(*op, image_ops);
        image_ops->push_back(std::move(op));
      }
    }
    for (size_t i = 0; i < graph_.outputs.size(); ++i) {
      const bool on_group = made_on_group_[static_cast<size_t>(graph_.outputs[i].value)];
      place_output(i, on_group ? group_ops : image_ops, joint_ops);
    }
  }

 private:
  Value& value(int v) { return (*values_)[static_cast<size_t>(v)]; }

  int add(const Value& like, Place place) {
    Value copy = like;
    copy.place = place;
    values_->push_back(copy);
    joint_form_.push_back(-1);
    image_form_.push_back(-1);
    group_form_.push_back(-1);
    return static_cast<int>(values_->size()) - 1;
  }

  int64_t joint_row(const Value& v) const { return padded_row(chunk_ * v.columns()); }

  void place_input(size_t slot) {
    const Graph::Port port = graph_.inputs[slot];
    Value& v = value(port.value);
    v.place = Place::kInput;
    v.offset = static_cast<int64_t>(slot);
    v.stride = v.channels * v.columns();
    if (v.ld != 1) v.ld = v.columns();
    layout_.resize(values_->size(), Layout::kChannels);
    layout_[static_cast<size_t>(port.value)] = port.layout;
  }

  bool token_major(int v) const {
    return static_cast<size_t>(v) < layout_.size() &&
           layout_[static_cast<size_t>(v)] == Layout::kTokens;
  }

  void copy(int from, int to, bool transpose, bool to_planes, const std::string& name, Ops* ops) {
    std::unique_ptr<Op> op;
    if (transpose) {
      op = std::make_unique<TransposeOp>(to_planes);
    } else {
      op = std::make_unique<CopyOp>();
    }
    op->name = name;
    op->inputs = {from};
    op->output = to;
    ops->push_back(std::move(op));
  }

  // The caller's tensor as a padded plane, or itself where the reader allows.
  int image_form(int v, bool bare_is_fine, Ops* ops) {
    if (value(v).place != Place::kInput) return v;
    const bool tokens = token_major(v) && value(v).ld != 1;
    if (!tokens && bare_is_fine) return v;
    if (image_form_[v] < 0) {
      const int to = add(value(v), Place::kImage);
      if (value(to).ld != 1) value(to).ld = padded_row(value(to).columns());
      copy(v, to, tokens, true, "input", ops);
      image_form_[v] = to;
    }
    return image_form_[v];
  }

  int joint_form(int v, Ops* ops) {
    if (value(v).place == Place::kJoint) return v;
    if (joint_form_[v] < 0) {
      const bool made_before = value(v).place == Place::kImage || value(v).place == Place::kGroup;
      if (made_before) {
        value(v).place = Place::kStaged;
        value(v).images = 1;
        value(v).stride = round_up(value(v).channels, kLineFloats);
      }
      const int to = add(value(v), Place::kJoint);
      value(to).ld = joint_row(value(to));
      copy(v, to, true, true, "gather", ops);
      joint_form_[v] = to;
    }
    return joint_form_[v];
  }

  void make_image(Op& op, Ops* ops) {
    for (size_t i = 0; i < op.inputs.size(); ++i) {
      op.inputs[i] = image_form(op.inputs[i], op.reads_bare(i), ops);
    }
  }

  // A plane or vector of a group; the caller's tensors are copied to it image by image.
  int group_form(int v, bool bare_is_fine, Ops* image_ops) {
    if (value(v).place == Place::kImage) place_in_group(groups_.images, &value(v));
    if (value(v).place != Place::kInput || bare_is_fine) return v;
    if (group_form_[v] < 0) {
      const int to = add(value(v), Place::kGroup);
      // The caller's plane of one column looks like a vector, and would lie in a group like one.
      if (planar_[static_cast<size_t>(v)]) value(to).ld = padded_row(value(to).columns());
      place_in_group(groups_.images, &value(to));
      copy(v, to, token_major(v) && value(v).ld != 1, true, "input", image_ops);
      group_form_[v] = to;
    }
    return group_form_[v];
  }

  // Its large input's columns, picked image by image.
  void pick_columns(Op& op, Ops* image_ops) {
    const int from = image_form(op.inputs[0], false, image_ops);
    Value picked = value(op.output);
    picked.channels = value(from).channels;
    std::unique_ptr<Op> pick = op.pick_columns();
    pick->name = "pick";
    pick->inputs = {from};
    pick->output = op.inputs[0] = add(picked, Place::kGroup);
    place_in_group(groups_.images, &value(pick->output));
    image_ops->push_back(std::move(pick));
  }

  void make_group(Op& op, Ops* image_ops) {
    if (op.on_group && picks(op, graph_.values)) pick_columns(op, image_ops);
    for (size_t i = 0; i < op.inputs.size(); ++i) {
      const int v = op.inputs[i];
      const bool bare_is_fine = !op.on_group && op.reads_bare(i) &&
                                (!token_major(v) || value(v).ld == 1);
      op.inputs[i] = group_form(v, bare_is_fine, image_ops);
    }
    place_in_group(groups_.images, &value(op.output));
    made_on_group_[static_cast<size_t>(op.output)] = true;
  }

  void make_joint(Op& op, Ops* ops) {
    for (int& v : op.inputs) v = joint_form(v, ops);
    value(op.output).place = Place::kJoint;
    value(op.output).ld = joint_row(value(op.output));
  }

  // ops: those that the value's own images are copied out with, unless it is a joint one.
  void place_output(size_t slot, Ops* ops, Ops* joint_ops) {
    const Graph::Port port = graph_.outputs[slot];
    const bool joint = value(port.value).place == Place::kJoint;
    const int from = joint ? port.value : image_form(port.value, true, ops);
    const bool transpose = joint || (port.layout == Layout::kTokens && value(from).ld != 1);
    const int to = add(value(from), Place::kOutput);
    Value& out = value(to);
    out.ld = out.columns();
    out.offset = static_cast<int64_t>(slot);
    out.stride = out.channels * out.columns();
    copy(from, to, transpose, false, "output", joint ? joint_ops : ops);
  }

  Graph& graph_;
  std::vector<bool> joint_, planar_;
  Grouping groups_;
  std::vector<Value>* values_ = nullptr;
  int64_t chunk_ = 1;
  std::vector<int> joint_form_, image_form_, group_form_;
  std::vector<bool> made_on_group_;
  std::vector<Layout> layout_;
};

}  // namespace

int64_t padded_row(int64_t columns) {
  const int64_t lines = (columns + kLineFloats - 1) / kLineFloats;
  return (lines | 1) * kLineFloats;
}

int Graph::add_value(int64_t channels, int64_t height, int64_t width, bool vector, bool tokens) {
  Value value;
  value.channels = channels;
  value.height = height;
  value.width = width;
  value.ld = vector ? 1 : padded_row(height * width);
  value.tokens = tokens;
  values.push_back(value);
  return static_cast<int>(values.size()) - 1;
}

int Graph::add_constant(const float* data, int64_t channels, int64_t height, int64_t width,
                        bool vector) {
  const int id = add_value(channels, height, width, vector, false);
  Value& value = values[static_cast<size_t>(id)];
  constants.emplace_back(value.floats() + 2 * kReadSlack);
  value.place = Place::kConstant;
  value.constant = constants.back().data() + kReadSlack;
  const int64_t columns = value.columns();
  for (int64_t c = 0; c < channels; ++c) {
    std::copy_n(data + c * columns, columns, value.constant + c * value.ld);
  }
  return id;
}

Operand Frame::operand(int id) const {
  const Value& v = values[id];
  switch (v.place) {
    case Place::kImage: return {image_arena + v.offset, v.ld, v.channels, v.columns()};
    case Place::kGroup:
      return {group_arena + v.offset + slot * v.stride, v.ld, v.channels, slots * v.columns()};
    case Place::kStaged:
      return {joint_arena + v.offset + staged * v.stride, v.ld, v.channels, v.columns()};
    case Place::kJoint: return {joint_arena + v.offset, v.ld, v.channels, joint_count * v.columns()};
    case Place::kInput:
      return {const_cast<float*>(inputs[v.offset]) + image * v.stride, v.ld, v.channels,
              v.columns()};
    case Place::kOutput:
      return {outputs[v.offset] + image * v.stride, v.ld, v.channels, v.columns()};
    case Place::kConstant: return {v.constant, v.ld, v.channels, v.columns()};
  }
  return {};
}

Plan::Plan(Graph graph)
    : batch_(graph.batch),
      chunk_(graph.batch),
      graph_inputs_(graph.inputs.size()),
      graph_outputs_(graph.outputs.size()) {
  int64_t widest = 1;
  for (const Value& v : graph.values) {
    if (v.tokens && v.columns() < kJointTokens) widest = std::max(widest, v.columns());
  }
  const int64_t most = std::max<int64_t>(1, kJointColumns / widest);
  chunk_ = (batch_ + (batch_ + most - 1) / most - 1) / ((batch_ + most - 1) / most);
  Lowering lowering(graph);
  lowering.lower(chunk_, &image_ops_, &group_ops_, &joint_ops_);
  group_ = lowering.group_images();
  values_ = std::move(graph.values);
  constants_ = std::move(graph.constants);

  if (graph.bands.from > 0) band_operations(&image_ops_, &values_, graph.bands);
  if (graph.parts > 1 && batch_ == 1) part_planes(&image_ops_, &values_, graph.parts);
  image_floats_ = lay_out_arena(image_ops_, Place::kImage, &values_);
  group_floats_ = lay_out_arena(group_ops_, Place::kGroup, &values_);
  joint_floats_ = lay_out_arena(joint_ops_, Place::kJoint, &values_);
  for (Value& v : values_) {
    if (v.place != Place::kStaged) continue;
    v.offset = joint_floats_;
    joint_floats_ += chunk_ * v.stride;
  }
  const KernelTable& table = active_table();
  for (const Ops* ops : {&image_ops_, &group_ops_, &joint_ops_}) {
    for (const std::unique_ptr<Op>& op : *ops) {
      op->prepare(values_, table);
      scratch_floats_ = std::max(scratch_floats_, op->scratch_floats());
    }
  }
}

}  // namespace aerogel
