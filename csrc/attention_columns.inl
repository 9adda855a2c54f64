// Queries as columns: panels of them, what the causal rule leaves each, and how they get there.

namespace aerogel::AEROGEL_ISA {
namespace {

// Rows of `width` vectors, one float per column. Queries are scaled so that scores are exponents
// of 2. Sums alone are rows of their columns, [column][padded dim]: a weight is then broadcast, a
// value or key read as it lies, and nothing has to be transposed in the end.
struct AttendPanel {
  float *queries, *sums, *maximum, *total, *position, *lower, *hash;  // hash: uint32_t
  int64_t first, count;  // columns
  int width;
  bool fresh;            // nothing has been summed yet: sums may hold anything
  float reach[kWide];  // the last position in each vector and those before it
};

// Which vectors the causal rule leaves a key: the keys of a step before bounds[l] need those from
// vector l on, and those from the last bound on none.
struct Leads {
  int64_t bounds[kWide];
  bool run;         // keys cut by the causal rule are neighbours: the first of them,
  float first_key;  // from the tile's first query on

  AEROGEL_INLINE int64_t live(int width) const { return bounds[width - 1]; }
  // How many keys columns [first, end) need; those that need fewer have weights of zero.
  AEROGEL_INLINE int64_t needed(const float* position, int64_t first, int64_t end) const {
    const int64_t bound = bounds[(end - 1) / kLanes];
    if (!run) return bound;
    float last = position[first];
    for (int64_t c = first + 1; c < end; ++c) last = position[c] > last ? position[c] : last;
    const int64_t own = static_cast<int64_t>(last - first_key) + 1;
    return own < 0 ? 0 : own < bound ? own : bound;
  }
};

// Calls f(Size<l>, first, end) for the keys that need the vectors from l on.
template <int W, int L = 0, class F>
AEROGEL_INLINE void for_leads(const Leads& leads, const F& f, int64_t begin = 0) {
  if constexpr (L < W) {
    if (leads.bounds[L] > begin) f(Size<L>{}, begin, leads.bounds[L]);
    for_leads<W, L + 1>(leads, f, leads.bounds[L] > begin ? leads.bounds[L] : begin);
  }
}

// Cuts columns into panels; the last may be narrower.
AEROGEL_INLINE int64_t panels_of(int64_t columns) {
  return (columns + kWide * kLanes - 1) / (kWide * kLanes);
}
AEROGEL_INLINE void cut_panel(int64_t columns, int64_t index, AttendPanel& p) {
  p.first = index * kWide * kLanes;
  p.count = least(columns - p.first, kWide * kLanes);
  p.width = static_cast<int>((p.count + kLanes - 1) / kLanes);
}

// Calls f(Size<width>) for the width of a panel.
template <class F>
AEROGEL_INLINE void for_width(int width, const F& f) {
  if constexpr (kWide >= 4) {
    if (width == 4) return f(Size<4>{});
    if (width == 3) return f(Size<3>{});
  }
  if (width == 2) return f(Size<2>{});
  return f(Size<1>{});
}

// Where a panel's columns lie in x, x.row floats apart, if they are float32 rows of one head; else
// null.
AEROGEL_INLINE float* panel_rows(const AttendTask& t, const Columns& columns, const AttendPanel& p,
                                 const AttendTensor& x) {
  const int64_t last = p.first + p.count - 1;
  if (t.args->type != AttendType::kFloat32 || p.first / columns.rows != last / columns.rows) {
    return nullptr;
  }
  return static_cast<float*>(
      row_of(*t.args, x, t.batch, columns.head(t, p.first), columns.query(p.first)));
}

// Rows in memory, `stride` floats apart.
struct FloatRows {
  const float* data;
  int64_t stride;
  AEROGEL_INLINE FloatRows from(int64_t row) const { return {data + row * stride, stride}; }
};

// The rows of a panel's columns in x as float32: where they lie, or in `copy` [column][padded dim].
AEROGEL_NOINLINE FloatRows find_columns(const AttendTask& t, const Columns& columns,
                                        const AttendPanel& p, const AttendTensor& x, int64_t dim,
                                        float* copy) {
  if (const float* const straight = panel_rows(t, columns, p, x)) return {straight, x.row};
  const AttendArgs& a = *t.args;
  const int64_t stride = padded_dim(dim);
  for (int64_t c = 0; c < p.count; ++c) {
    const int64_t column = p.first + c;
    float* const row = copy + c * stride;
    widen_row(a.type, row_of(a, x, t.batch, columns.head(t, column), columns.query(column)), row,
              dim);
    for (int64_t d = dim; d < stride; ++d) row[d] = 0.0f;
  }
  return {copy, stride};
}

// Rows of a panel's columns become to[dim][width], times `factor`; columns beyond the last are zero.
AEROGEL_NOINLINE void turn_columns(const AttendPanel& p, const FloatRows& rows, int64_t dim,
                                   float factor, float* to) {
  const int64_t width = p.width * kLanes;
  transpose_scaled(rows.data, rows.stride, to, width, p.count, dim, factor);
  if (p.count == width) return;
  for (int64_t d = 0; d < dim; ++d) {
    for (int64_t c = p.count; c < width; ++c) to[d * width + c] = 0.0f;
  }
}

// Sums [column][padded dim], times each column's factor, go to the rows of x.
AEROGEL_NOINLINE void put_columns(const AttendTask& t, const Columns& columns,
                                  const AttendPanel& p, const float* factors, int64_t dim,
                                  const AttendTensor& x) {
  const AttendArgs& a = *t.args;
  const int64_t stride = padded_dim(dim);
  const bool narrow = a.type != AttendType::kFloat32;
  float* row = p.sums;
  for (int64_t c = 0; c < p.count; ++c, row += stride) {
    const int64_t column = p.first + c;
    void* const to = row_of(a, x, t.batch, columns.head(t, column), columns.query(column));
    float* const out = narrow ? row : static_cast<float*>(to);
    const Vec factor = broadcast(p.fresh ? 0.0f : factors[c]);
    for (int64_t d = 0; d < dim; d += kLanes) {
      const Vec sum = p.fresh ? zero() : load(row + d);
      store_upto(out + d, mul(sum, factor), narrow ? kLanes : dim - d);
    }
    if (narrow) narrow_row(a.type, row, to, dim);
  }
}

}  // namespace
}  // namespace aerogel::AEROGEL_ISA
