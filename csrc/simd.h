// A thin SIMD vocabulary. Each isa_*.cpp translation unit defines AEROGEL_ISA and is compiled with
// that instruction set's flags; everything that depends on it lives in namespace
// aerogel::AEROGEL_ISA, so the linker never mixes code of two instruction sets.
#pragma once
