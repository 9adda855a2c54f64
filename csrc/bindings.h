// What module.cpp assembles into aerogel.kernels._native; one bind_*.cpp each.
#pragma once

#include <nanobind/nanobind.h>

namespace aerogel {

void bind_spmm(nanobind::module_& m);
void bind_sddmm(nanobind::module_& m);
void bind_gemv(nanobind::module_& m);
void bind_masks(nanobind::module_& m);
void bind_sparse_conv(nanobind::module_& m);
void bind_fft_conv(nanobind::module_& m);
void bind_roofline(nanobind::module_& m);
void bind_plan(nanobind::module_& m);
void bind_attention(nanobind::module_& m);
void bind_attention_select(nanobind::module_& m);
void bind_attention_codes(nanobind::module_& m);
void bind_ring_step(nanobind::module_& m);
#ifdef AEROGEL_STD_THREADS
void bind_race(nanobind::module_& m);
#endif

}  // namespace aerogel
