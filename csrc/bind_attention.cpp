// Thin: a filled AttendArgs from addresses, sizes and strides; tiles are checked in attention.cpp.
#include "attention.h"
#include "attention_lower.h"
#include "bindings.h"

namespace nb = nanobind;

namespace aerogel {
namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void set_tensor(AttendTensor& to, uintptr_t data, int64_t batch, int64_t head, int64_t row) {
  to = {pointer<void>(data), batch, head, row};
}

void set_sizes(AttendArgs& a, int32_t type, int64_t batches, int64_t q_heads, int64_t kv_heads,
               int64_t q_len, int64_t k_len, int64_t dim, int64_t value_dim) {
  a.type = static_cast<AttendType>(type);
  a.batches = batches;
  a.q_heads = q_heads;
  a.kv_heads = kv_heads;
  a.q_len = q_len;
  a.k_len = k_len;
  a.dim = dim;
  a.value_dim = value_dim;
}

void set_stream(AttendArgs& a, uintptr_t tile_ptr, uintptr_t kind, uintptr_t start,
                uintptr_t length, uintptr_t gather_idx, uintptr_t tile_bias, int64_t plan_batches,
                int64_t plan_heads, int64_t block_q, int64_t tiles, int64_t gathers) {
  a.tile_ptr = pointer<const int64_t>(tile_ptr);
  a.kind = pointer<const uint8_t>(kind);
  a.start = pointer<const int32_t>(start);
  a.length = pointer<const int16_t>(length);
  a.gather_idx = pointer<const int32_t>(gather_idx);
  a.tile_bias = pointer<const float>(tile_bias);
  a.plan_batches = plan_batches;
  a.plan_heads = plan_heads;
  a.block_q = block_q;
  a.tiles = tiles;
  a.gathers = gathers;
}

void set_rules(AttendArgs& a, int64_t q_offset, float scale, bool causal, uintptr_t window,
               int64_t window_block, uintptr_t key_padding, float softcap, uintptr_t sink_logit) {
  a.q_offset = q_offset;
  a.scale = scale;
  a.causal = causal;
  a.window = pointer<const int64_t>(window);
  a.window_block = window_block;
  a.key_padding = pointer<const uint8_t>(key_padding);
  a.softcap = softcap;
  a.sink_logit = pointer<const float>(sink_logit);
}

}  // namespace

void bind_attention(nb::module_& m) {
  nb::class_<AttendArgs>(m, "AttendArgs")
      .def("__init__", [](AttendArgs* a) { new (a) AttendArgs{}; })
      .def("sizes", &set_sizes)
      .def("stream", &set_stream)
      .def("rules", &set_rules)
      .def("linear", [](AttendArgs& a) { a.linear = true; })
      .def("dropout",
           [](AttendArgs& a, uint32_t seed, uint32_t drop_below, float kept_factor) {
             a.seed = seed;
             a.drop_below = drop_below;
             a.kept_factor = kept_factor;
           })
      .def("q", [](AttendArgs& a, uintptr_t data, int64_t b, int64_t h,
                   int64_t r) { set_tensor(a.q, data, b, h, r); })
      .def("k", [](AttendArgs& a, uintptr_t data, int64_t b, int64_t h,
                   int64_t r) { set_tensor(a.k, data, b, h, r); })
      .def("v", [](AttendArgs& a, uintptr_t data, int64_t b, int64_t h,
                   int64_t r) { set_tensor(a.v, data, b, h, r); })
      .def("o", [](AttendArgs& a, uintptr_t data, int64_t b, int64_t h,
                   int64_t r) { set_tensor(a.o, data, b, h, r); })
      .def("grad_o", [](AttendArgs& a, uintptr_t data, int64_t b, int64_t h,
                        int64_t r) { set_tensor(a.grad_o, data, b, h, r); })
      .def("grad_q", [](AttendArgs& a, uintptr_t data, int64_t b, int64_t h,
                        int64_t r) { set_tensor(a.grad_q, data, b, h, r); })
      .def("lse", [](AttendArgs& a, uintptr_t data) { a.lse = pointer<float>(data); })
      .def("grads",
           [](AttendArgs& a, uintptr_t grad_lse, uintptr_t grad_k, uintptr_t grad_v,
              uintptr_t grad_bias) {
             a.grad_lse = pointer<const float>(grad_lse);
             a.grad_k = pointer<float>(grad_k);
             a.grad_v = pointer<float>(grad_v);
             a.grad_bias = pointer<float>(grad_bias);
           })
      .def("bias_copies", &attend_bias_copies)
      .def("step",  // of a call that is prepared once: what changes is where these lie
           [](AttendArgs& a, uintptr_t q, uintptr_t o, uintptr_t lse, int threads) {
             a.q.data = pointer<void>(q);
             a.o.data = pointer<void>(o);
             a.lse = pointer<float>(lse);
             attend_forward(a, threads);
           },
           nb::call_guard<nb::gil_scoped_release>())
      .def("again",  // on other memory; as often at once as one likes
           [](const AttendArgs& a, uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t o,
              uintptr_t lse, uintptr_t tile_ptr, uintptr_t kind, uintptr_t start,
              uintptr_t length, uintptr_t gather_idx, int64_t tiles, int64_t gathers,
              int threads) {
             AttendArgs own = a;
             own.q.data = pointer<void>(q);
             own.k.data = pointer<void>(k);
             own.v.data = pointer<void>(v);
             own.o.data = pointer<void>(o);
             own.lse = pointer<float>(lse);
             set_stream(own, tile_ptr, kind, start, length, gather_idx, 0, a.plan_batches,
                        a.plan_heads, a.block_q, tiles, gathers);
             attend_forward(own, threads);
           },
           nb::call_guard<nb::gil_scoped_release>())
      .def("forward", &attend_forward, nb::call_guard<nb::gil_scoped_release>())
      .def("backward", &attend_backward, nb::call_guard<nb::gil_scoped_release>());
  bind_attention_lowering(m);
}

}  // namespace aerogel
