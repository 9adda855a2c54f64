// Operations that run for a group of images at a time. Where planes have become small, a plane's row
// of columns ends in the middle of a vector, and each image alone would stream all weights through the
// caches again: the planes of several images lie side by side in one row, image i's columns behind
// those of image i - 1. Operations that treat every column alike see them as one plane, and so do
// sparse convolutions that keep a plane's size; the others take them one by one, in ascending order,
// because whole vectors that they write run over into the next image's columns. Of larger planes that a
// product with a stride reads, its columns are picked first.
//
// What lies in a group is closed: from the first small planes to the end of a network's planes.
#pragma once

#include "plan.h"

namespace aerogel {

struct Grouping {
  std::vector<bool> ops;  // which of a graph's operations run on groups
  int64_t images = 1;     // of a group, at most; 1: none do
};

// Among the operations that do not run jointly. Sets `on_group` of those that see a group as one.
Grouping find_groups(const Graph& graph, const std::vector<bool>& joint);

// Whether a large plane's columns are to be picked for an operation on groups.
bool picks(const Op& op, const std::vector<Value>& values);

// Images of a group of planes of so many columns, at most: one thread's share of the batch in groups
// of nearly equal sizes.
int64_t group_images(int64_t columns, int64_t batch, int64_t threads);

// Where a value of a group lies: planes side by side, vectors one after the other.
void place_in_group(int64_t images, Value* value);

}  // namespace aerogel
