// Native execution of a whole network: a list of operations over one arena planned in advance.
//
// A value is a tensor of one image, channels x columns (columns = height * width, or tokens). In the
// arena a value of several columns is planar with rows of `ld` floats: whole cache lines, an odd
// number of them, so that neighbouring channels never fall into the same cache set. A value of one
// column (a vector) is contiguous. Values that do not live at the same time share memory.
//
// A batch is run image by image, which keeps an image's planes in cache: first as many whole images
// as the threads can take one each, then the remaining ones together, operation by operation with a
// barrier in between. The last operations on planes, where these have become so small that they do
// not fill vectors, follow for a few images at a time (plan_group.h). Operations at the end (or
// start) of a network that treat every column alike, such as the linear layers of a classifier, see
// the whole batch as columns of one value ("joint").
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "kernels.h"
#include "layers_weights.h"

namespace aerogel {

constexpr int64_t kLineFloats = 16;  // of a cache line

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

enum class Layout : int32_t { kChannels = 0, kTokens = 1 };  // (C, ...) or (T, F) in user memory

enum class Place : int32_t {
  kImage,   // arena of one image
  kGroup,   // arena of a group of images: planes side by side in every channel's row
  kStaged,  // joint arena, one vector per image: made per image, read jointly
  kJoint,   // joint arena, all images of a chunk as columns
  kInput,   // the caller's tensors
  kOutput,
  kConstant,  // the plan's own, the same for every image
};

struct Value {
  int64_t channels = 0, height = 1, width = 1;
  int64_t ld = 1;       // floats from channel to channel; 1: a vector
  bool tokens = false;  // columns are tokens: no operation looks at their neighbourhood
  Place place = Place::kImage;
  int64_t offset = 0;  // floats from the start of its arena, or the number of the caller's tensor
  int64_t stride = 0;  // floats from image to image (kGroup, kStaged, kInput, kOutput)
  int64_t images = 1;  // of a group
  float* constant = nullptr;
  // Rows that are apart, a part for each thread, with room for rows of its neighbours (plan_parts.h).
  int64_t parts = 1, part_floats = 0;
  int64_t part_stride = 0, odd_shift = 0;  // from part to part; of every second one, beyond that
  int64_t lead = 0;              // floats of a channel before the part's own rows
  int64_t above = 0, below = 0;  // rows of the neighbours

  int64_t columns() const { return height * width; }
  // Of one piece; vectors of a group lie one after the other.
  int64_t floats() const { return ld == 1 && images > 1 ? images * stride : channels * ld; }
  int64_t part_offset(int64_t part) const { return part * part_stride + part % 2 * odd_shift; }
};

// Where a value is at run time.
struct Operand {
  float* data;
  int64_t ld;
  int64_t channels, columns;
};

// One execution of an operation: of one image, of a group, or jointly of all images of a chunk.
struct Frame {
  const Value* values;
  float* image_arena;
  float* group_arena;
  float* joint_arena;
  const float* const* inputs;
  float* const* outputs;
  int64_t image;        // number of the (first) image in the batch
  int64_t staged;       // number of the image in its chunk
  int64_t joint_count;  // images of the chunk
  int threads;          // that share this execution
  int64_t slot = 0;     // number of the (first) image in its group
  int64_t slots = 1;    // images of a group that are seen as one

  Operand operand(int value) const;
};

// Which input rows an operation's output rows need: kernel rows from row * stride - pad on, of in_rows.
// kernel 0: it cannot make rows by themselves. So many rows, `tile`, are best made together.
struct RowReach {
  int64_t kernel = 0, stride = 1, pad = 0, in_rows = 0, tile = 1;
};

// The first row of the input, and the one past the last, that output rows [first, end) need.
inline int64_t first_needed(const RowReach& r, int64_t first) {
  return std::max<int64_t>(0, first * r.stride - r.pad);
}

inline int64_t end_needed(const RowReach& r, int64_t end) {
  return std::clamp<int64_t>((end - 1) * r.stride - r.pad + r.kernel, 0, r.in_rows);
}

struct Span {
  int64_t first, last;
};

// Output rows to make, and where: data of x, y and the residual is where row 0 of each would be. x has
// the rows within reach.
struct RowPlaces {
  Operand x, y, residual;
  Span rows;
  bool spare = false;  // what follows the new rows of y in its channels may be overwritten
  int64_t part = 0, parts = 1;  // threads that make rows of y begin with different channels
  std::vector<double>* seconds = nullptr;  // of each of several stages, if they are to be timed
};

class Op;
using Ops = std::vector<std::unique_ptr<Op>>;

// A task is a share of one operation; tasks of one operation are independent of each other.
class Op {
 public:
  std::string name;
  std::vector<int> inputs;
  int output = -1;
  bool on_group = false;  // all images of a group are seen as one, set before `prepare`

  virtual ~Op() = default;
  // Every column is treated alike, so that the images of a batch may stand side by side.
  virtual bool columnwise() const { return false; }
  // The images of a group may stand side by side, with so many columns each: the same bits as alone.
  virtual bool takes_group(int64_t /*columns*/) const { return columnwise(); }
  // The input whose place the output may take if nobody needs it afterwards, or -1.
  virtual int replaced_input() const { return -1; }
  // Reads exactly its i-th input's elements, so that this may be the caller's unpadded tensor.
  virtual bool reads_bare(size_t) const { return true; }
  // Reads only some columns of its first input, one for each of its own: whether it does, and an
  // operation that picks them, from whose output it then reads them.
  virtual bool reads_picked() const { return false; }
  virtual std::unique_ptr<Op> pick_columns() { return nullptr; }
  // Called once the places of all values are known; afterwards borrowed weights are not needed.
  virtual void prepare(const std::vector<Value>&, const KernelTable&) {}
  virtual int64_t scratch_floats() const { return 0; }
  virtual int64_t tasks(const Frame& frame) const = 0;
  virtual void run(const Frame& frame, int64_t task, int64_t tasks, float* scratch) const = 0;
  // Of operations on planes: which rows of the first input. A residual's are those of the output.
  virtual RowReach row_reach() const { return {}; }
  // Those that it runs one after the other, if there are several.
  virtual const Ops* stages() const { return nullptr; }
  // The same, with the seconds that each stage took added to seconds[stage].
  virtual void run_timed(const Frame& frame, int64_t task, int64_t tasks, float* scratch,
                         std::vector<double>* /*seconds*/) const {
    run(frame, task, tasks, scratch);
  }
  // Makes some output rows.
  virtual void run_rows(const Frame&, const RowPlaces&, float* /*scratch*/) const {}
  // From now on only rows are made, all outputs of them by one thread. Called before `prepare`.
  virtual void keep_outputs_together() {}
  // A stage of a chain that runs on bands, if planes are large.
  virtual bool in_bands() const { return row_reach().kernel > 0; }
  // run_rows takes inputs that lie in parts.
  virtual bool reads_parts() const { return false; }
  // run takes inputs that lie in parts: it puts their rows together.
  virtual bool joins_parts() const { return false; }
  // Writes its output once, not sum upon sum.
  virtual bool writes_once() const { return true; }
};

// Which chains of operations run on bands of rows (plan_bands.h).
struct Bands {
  int64_t from = 0;    // bytes of a value that is not to be whole; 0: all may be
  int64_t budget = 0;  // bytes of all bands of a chain, unless its shortest bands take more
};

// What a builder collects: operations in execution order over numbered values.
struct Graph {
  struct Port {
    int value;
    Layout layout;
  };
  int64_t batch = 1;
  Bands bands;
  int64_t parts = 1;  // threads: planes that several of them share are in as many parts
  std::vector<Value> values;
  Ops ops;
  std::vector<Port> inputs, outputs;
  std::vector<FloatBuffer> constants;

  // A value filled from channels x (height * width) floats.
  int add_constant(const float* data, int64_t channels, int64_t height, int64_t width, bool vector);
  int add_value(int64_t channels, int64_t height, int64_t width, bool vector, bool tokens);
};

// What the threads of a run share while there is an image for each: the batch, every one working on
// images of its own in an arena of its own; or every operation of one image after the other, whose
// single arena may stay in a cache that several would overflow.
enum class Sharing : int32_t { kImages = 0, kOperations = 1 };

struct StepTime {
  std::string name;
  double seconds;
};

class Plan {
 public:
  explicit Plan(Graph graph);

  // inputs[i]: the i-th input of the whole batch, contiguous; outputs likewise. Thread-safe.
  // If `times` is given, images are run one after the other and each step is timed.
  void run(const float* const* inputs, float* const* outputs, int threads,
           Sharing sharing = Sharing::kImages, std::vector<StepTime>* times = nullptr);

  int64_t arena_bytes() const { return 4 * (image_floats_ + group_floats_ + joint_floats_); }
  size_t input_count() const { return graph_inputs_; }
  size_t output_count() const { return graph_outputs_; }
  // Overwrites memory between runs: results may not depend on what the arena holds.
  void fill_idle_arenas(float value);

 private:
  // The memory of one run. Kept for the next one.
  struct Workspace {
    std::vector<FloatBuffer> images, groups;  // one arena per thread, made when first needed
    std::vector<FloatBuffer> scratch;
    FloatBuffer joint;

    float* image(size_t i) { return images[i].data() + kReadSlack; }
    float* group(size_t i) { return groups[i].data() + kReadSlack; }
  };
  struct Call;
  class Worker;

  std::unique_ptr<Workspace> take_workspace(int threads, Sharing sharing);
  void worker(Call& call, int thread) const;

  int64_t batch_, chunk_, group_ = 1;
  size_t graph_inputs_, graph_outputs_;
  std::vector<Value> values_;
  std::vector<FloatBuffer> constants_;
  Ops image_ops_, group_ops_, joint_ops_;
  int64_t image_floats_ = 0, group_floats_ = 0, joint_floats_ = 0, scratch_floats_ = 0;
  std::mutex pool_mutex_;
  std::vector<std::unique_ptr<Workspace>> pool_;
};

// Floats per row of a planar value of so many columns.
int64_t padded_row(int64_t columns);

}  // namespace aerogel
