// Steps: up to kStepKeys keys that consecutive tiles of a query tile name, and their rows.

namespace aerogel::AEROGEL_ISA {
namespace {

AEROGEL_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Hands out scratch in whole cache lines.
struct Carver {
  float* at;
  AEROGEL_INLINE float* take(int64_t floats) {
    float* const taken = at;
    at += padded_dim(floats);
    return taken;
  }
};

// Keys under the same rules, N at most.
template <int64_t N>
struct KeyList {
  static constexpr int64_t kMost = N;
  int64_t count;
  bool edge, window;  // whether positions matter, and whether the window cuts
  int32_t keys[N];
  int32_t tiles[N];  // which tile named the key, relative to the first of the query tile
};
using Step = KeyList<kStepKeys>;

// Keys that are padding or not in the task's share are passed over.
class StepReader {
 public:
  AEROGEL_INLINE explicit StepReader(const AttendTask& t)
      : a_(*t.args),
        first_(t.tile_begin),
        tile_(t.tile_begin),
        end_(t.tile_end),
        key_begin_(t.key_begin),
        key_end_(t.key_end),
        padding_(t.args->key_padding ? t.args->key_padding + t.batch * t.args->k_len : nullptr),
        filter_(padding_ || key_begin_ > 0 || key_end_ < t.args->k_len) {}

  // As many as fit and are under the same rules; false if there are no more keys.
  template <class List>
  AEROGEL_NOINLINE bool next(List& s) {
    s.count = 0;
    uint8_t kind = 0;
    for (; tile_ < end_; ++tile_, at_ = 0) {
      const uint8_t own = a_.kind[tile_];
      if (s.count == 0) kind = own;
      if ((own ^ kind) & (kTileEdge | kTileNoWindow)) break;
      const int64_t length = a_.length[tile_], start = a_.start[tile_];
      while (at_ < length) {
        if (s.count == List::kMost) return finish(s, kind);
        const int64_t count = least(length - at_, List::kMost - s.count);
        take(s, own & kTileGather, start + at_, count);
        at_ += count;
      }
    }
    return finish(s, kind);
  }

 private:
  template <class List>
  AEROGEL_INLINE void take(List& s, bool gather, int64_t from, int64_t count) const {
    int32_t* const keys = s.keys + s.count;
    int32_t* const tiles = s.tiles + s.count;
    const int32_t tile = static_cast<int32_t>(tile_ - first_);
    if (gather) {
      for (int64_t i = 0; i < count; ++i) keys[i] = a_.gather_idx[from + i];
    } else {
      for (int64_t i = 0; i < count; ++i) keys[i] = static_cast<int32_t>(from + i);
    }
    for (int64_t i = 0; i < count; ++i) tiles[i] = tile;
    if (!filter_) {
      s.count += count;
      return;
    }
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int32_t key = keys[i];
      keys[kept] = key;
      kept += key >= key_begin_ && key < key_end_ && (!padding_ || padding_[key]);
    }
    s.count += kept;
  }
  template <class List>
  AEROGEL_INLINE bool finish(List& s, uint8_t kind) const {
    s.edge = kind & kTileEdge && (a_.causal || a_.window);
    s.window = s.edge && a_.window && !(kind & kTileNoWindow);
    return s.count > 0;
  }

  const AttendArgs& a_;
  const int64_t first_;
  int64_t tile_, at_ = 0;
  const int64_t end_, key_begin_, key_end_;
  const uint8_t* const padding_;
  const bool filter_;
};

// A bijection of 32 bits with full avalanche (Murmur3's finaliser) of a hash and an index: what a
// pair is dropped by depends on its batch element, head, query and key alone.
AEROGEL_INLINE uint32_t mixed(uint32_t hash, uint32_t index) {
  uint32_t x = (hash ^ index) + 0x9e3779b9u;
  x = (x ^ x >> 16) * 0x85ebca6bu;
  x = (x ^ x >> 13) * 0xc2b2ae35u;
  return x ^ x >> 16;
}

// Where the rows of a step's keys are, as float32; `copy` holds those that are not.
AEROGEL_NOINLINE void find_rows(AttendType type, const AttendTensor& from, int64_t batch,
                                int64_t head, int64_t dim, const Step& s, float* copy,
                                const float** rows) {
  const int64_t bytes = bytes_of(type);
  const char* const base =
      static_cast<const char*>(from.data) + (batch * from.batch + head * from.head) * bytes;
  for (int64_t j = 0; j < s.count; ++j) {
    const char* const row = base + s.keys[j] * from.row * bytes;
    if (type == AttendType::kFloat32) {
      rows[j] = reinterpret_cast<const float*>(row);
    } else {
      widen_row(type, row, copy, dim);
      rows[j] = copy;
      copy += padded_dim(dim);
    }
  }
}

AEROGEL_INLINE int64_t group_of(const AttendArgs& a) { return a.q_heads / a.kv_heads; }

AEROGEL_INLINE int64_t plan_head(const AttendArgs& a, int64_t head) {
  return a.plan_heads == 1 ? 0 : a.plan_heads == a.q_heads ? head : head / group_of(a);
}

// Queries of one task as columns: head by head, query by query. Positions count from the first query
// of the tile.
struct Columns {
  int64_t rows, count, first_query, base;

  AEROGEL_INLINE explicit Columns(const AttendTask& t) {
    const AttendArgs& a = *t.args;
    first_query = t.q_tile * a.block_q;
    rows = least(a.block_q, a.q_len - first_query);
    count = rows * t.heads;
    base = a.q_offset + first_query;
  }
  AEROGEL_INLINE int64_t head(const AttendTask& t, int64_t column) const {
    return t.head + column / rows;
  }
  AEROGEL_INLINE int64_t query(int64_t column) const { return first_query + column % rows; }
  // Position, and the first key that the window leaves.
  AEROGEL_INLINE void limits(const AttendTask& t, int64_t column, float* position,
                             float* lower) const {
    const AttendArgs& a = *t.args;
    const int64_t at = column % rows;
    *position = static_cast<float>(at);
    *lower = -kInfinity;
    if (!a.window) return;
    const int64_t window = a.window[plan_head(a, t.head + column / rows)];
    if (window <= 0) return;
    *lower = static_cast<float>(window_begin(base + at, window, a.window_block) - base);
  }
};

AEROGEL_INLINE void* row_of(const AttendArgs& a, const AttendTensor& x, int64_t batch,
                            int64_t head, int64_t row) {
  return static_cast<char*>(x.data) +
         (batch * x.batch + head * x.head + row * x.row) * bytes_of(a.type);
}

AEROGEL_INLINE float* lse_of(const AttendArgs& a, int64_t batch, int64_t head, int64_t query) {
  return a.lse + (batch * a.q_heads + head) * a.q_len + query;
}

// A query's maximum (base 2) and total become its factor for the sums of values, and its lse.
AEROGEL_INLINE float finish_total(const AttendArgs& a, int64_t head, float maximum, float total,
                                  float* lse) {
  float factor = 1.0f;
  if (a.sink_logit && a.sink_logit[head] > -kInfinity) {
    const float sink = a.sink_logit[head] * kLog2e;
    const float top = maximum > sink ? maximum : sink;
    factor = __builtin_exp2f(maximum - top);
    total = total * factor + __builtin_exp2f(sink - top);
    maximum = top;
  }
  if (total == 0.0f) {
    *lse = -kInfinity;
    return 0.0f;
  }
  *lse = maximum * kLn2 + __builtin_logf(total);
  return factor / total;
}

// Into the second cache, which waits for more lines at once than the first: 1.5 times as fast from
// memory.
AEROGEL_INLINE void prefetch_row(const char* row, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row + at, 0, 2);
}

// The rows of one key head: where key j's row is.
struct HeadRows {
  const char* base;
  int64_t stride, bytes;  // between rows, and of a row

  AEROGEL_INLINE HeadRows(const AttendArgs& a, const AttendTensor& x, int64_t batch, int64_t head,
                          int64_t dim)
      : base(static_cast<const char*>(row_of(a, x, batch, head, 0))),
        stride(x.row * bytes_of(a.type)),
        bytes(dim * bytes_of(a.type)) {}
  AEROGEL_INLINE HeadRows(const char* first, int64_t row_bytes)
      : base(first), stride(row_bytes), bytes(row_bytes) {}
  AEROGEL_INLINE const char* row(int32_t key) const { return base + key * stride; }
};

// The rows of a task's queries in a tensor, of its first head; none by default.
struct QueryRows {
  const char* base = nullptr;
  int64_t stride = 0, bytes = 0, count = 0;

  QueryRows() = default;
  AEROGEL_INLINE QueryRows(const AttendTask& t, const AttendTensor& x, int64_t dim) {
    const Columns columns(t);
    base = static_cast<const char*>(row_of(*t.args, x, t.batch, t.head, columns.first_query));
    stride = x.row * bytes_of(t.args->type);
    bytes = dim * bytes_of(t.args->type);
    count = columns.rows;
  }
};

// The rows that are wanted next, fetched a few at a time while a product runs.
struct Ahead {
  HeadRows rows;
  const Step* step;  // null for nothing

  // Rows [at, at + count); whoever comes last, of `all`, fetches what is left.
  AEROGEL_INLINE void fetch(int64_t at, int64_t count, int64_t all) const {
    if (!step) return;
    const int64_t end = at + count < all ? least(at + count, step->count) : step->count;
    for (int64_t j = at; j < end; ++j) prefetch_row(rows.row(step->keys[j]), rows.bytes);
  }
};

// The same, and rows of queries besides.
struct PanelAhead {
  HeadRows rows;
  const Step* step;
  QueryRows queries{};

  AEROGEL_INLINE void fetch(int64_t at, int64_t count, int64_t all) const {
    Ahead{rows, step}.fetch(at, count, all);
    const int64_t end = at + count < all ? least(at + count, queries.count) : queries.count;
    for (int64_t i = at; i < end; ++i) {
      prefetch_row(queries.base + i * queries.stride, queries.bytes);
    }
  }
};

}  // namespace
}  // namespace aerogel::AEROGEL_ISA
