// Where the values of a plan live: those that are not needed at the same time share memory.
#pragma once

#include "plan.h"

namespace aerogel {

// Offsets for all values that operations make in one arena; returns its size in floats. What one
// thread makes of values in parts lies together: the cache lines stay with its core from one value to
// the next. Every second thread's memory is the other way round, so that what two of them do not use
// is one piece, for whole values.
int64_t lay_out_arena(const Ops& ops, Place place, std::vector<Value>* values);

}  // namespace aerogel
