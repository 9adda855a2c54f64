// Dense rows out of a table whose rows keep their nonzeros only, an embedding lookup; and the
// search for the best rows among their scores.
//
// Plain data and function pointers only: the files compiled once per instruction set include this one.
#pragma once

#include <stdint.h>

namespace aerogel {

struct GatherRowsArgs {
  const void* values = nullptr;   // float32, or float16 bits if `half`
  const void* columns = nullptr;  // uint8 if `narrow`, else int32
  const int64_t* row_ptr = nullptr;
  const void* ids = nullptr;  // int64 if `wide_ids`, else int32
  float* out = nullptr;       // [count][dim]
  int64_t count = 0, dim = 0;
  int64_t rows = 0;      // of the table
  int64_t nonzeros = 0;  // of values and of columns
  bool half = false, narrow = false, wide_ids = false;
};

struct AboveArgs {
  const float* matrix;  // [rows][columns]
  int64_t rows, columns;
  const float* limits;  // [columns]
  int64_t *found_rows, *found_columns;
  float* found;
  int64_t room;  // of the three
};

struct GatherRowsKernels {
  // Ids from begin to end; false, and nothing done, if one is not among the rows.
  bool (*gather)(const GatherRowsArgs& args, int64_t begin, int64_t end);
  int64_t (*above)(const AboveArgs& args);
};

// False if an id is not among the rows: what was written then is of no use. Places and columns out
// of range are passed over: a damaged table gives wrong rows, no more.
bool gather_rows(const GatherRowsArgs& args, int threads);

// The entries of a matrix above their column's limit, row by row, up to `room` of them; returns how
// many there are. Few are expected: this reads the matrix at the cache's pace.
int64_t entries_above(const AboveArgs& args);

}  // namespace aerogel
