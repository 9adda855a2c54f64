// Thin: arguments from addresses and sizes; shapes are checked in Python.
#include "attention_select.h"
#include "bindings.h"

namespace nb = nanobind;

namespace aerogel {
namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

LabelArgs label_args(uintptr_t query, float scale, uintptr_t labels, int64_t label_batch,
                     int64_t label_head, int32_t type, uintptr_t span, int64_t span_batch,
                     int64_t span_head, int64_t batches, int64_t q_heads, int64_t label_heads,
                     int64_t q_len, int64_t k_len, int64_t width) {
  LabelArgs a{};
  a.query = pointer<const float>(query);
  a.scale = scale;
  a.labels = pointer<const void>(labels);
  a.label_batch = label_batch;
  a.label_head = label_head;
  a.type = static_cast<LabelType>(type);
  a.span = pointer<const float>(span);
  a.span_batch = span_batch;
  a.span_head = span_head;
  a.batches = batches;
  a.q_heads = q_heads;
  a.label_heads = label_heads;
  a.q_len = q_len;
  a.k_len = k_len;
  a.width = width;
  return a;
}

void choose(const LabelArgs& args, uintptr_t padding, int64_t q_offset, bool causal,
            int64_t window, bool keep_own, int64_t count, int64_t run, uintptr_t keys,
            uintptr_t found, int threads) {
  choose_by_labels(args,
                   {pointer<const uint8_t>(padding), q_offset, causal, window, keep_own, count, run},
                   pointer<int32_t>(keys), pointer<int64_t>(found), threads);
}

void pool(uintptr_t x, int64_t batch, int64_t head, int64_t row, int32_t type, int64_t batches,
          int64_t heads, int64_t length, int64_t dim, int64_t block, uintptr_t most,
          uintptr_t least, uintptr_t mean, int64_t stride, int threads) {
  pool_rows({pointer<const void>(x), batch, head, row, type, batches, heads, length, dim, block,
             pointer<float>(most), pointer<float>(least), pointer<float>(mean), stride},
            threads);
}

}  // namespace

void bind_attention_select(nb::module_& m) {
  const nb::call_guard<nb::gil_scoped_release> free;
  nb::class_<LabelArgs>(m, "LabelArgs").def_static("of", &label_args);
  m.def("label_scores",
        [](const LabelArgs& args, uintptr_t scores, int threads) {
          label_scores(args, pointer<float>(scores), threads);
        }, free);
  m.def("choose_by_labels", &choose, free);
  m.def("tile_lengths",
        [](uintptr_t found, int64_t rows, int64_t most, int64_t tile, uintptr_t lengths) {
          tile_lengths(pointer<const int64_t>(found), rows, most, tile,
                       pointer<int16_t>(lengths));
        });
  m.def("largest_keys",
        [](uintptr_t scores, int64_t rows, int64_t n, int64_t k, uintptr_t keys, int threads) {
          largest_keys(pointer<const float>(scores), rows, n, k, pointer<int64_t>(keys), threads);
        }, free);
  m.def("choose_blocks",
        [](uintptr_t scores, int64_t planes, int64_t heads, int64_t n, int64_t count, bool own,
           uintptr_t dense_from, uintptr_t row_ptr, uintptr_t col, int threads) {
          return choose_blocks({pointer<const float>(scores), planes, heads, n, count, own,
                                pointer<const int64_t>(dense_from)},
                               pointer<int64_t>(row_ptr), pointer<int32_t>(col), threads);
        }, free);
  m.def("pool_rows", &pool, free);
  m.def("pack_codes",
        [](uintptr_t x, int64_t rows, int64_t width, int bits, uintptr_t codes, uintptr_t span,
           int threads) {
          pack_codes(pointer<const float>(x), rows, width, bits, pointer<uint8_t>(codes),
                     pointer<float>(span), threads);
        }, free);
}

}  // namespace aerogel
