#define AEROGEL_ISA avx2
#define AEROGEL_ISA_NAME "avx2"
#define AEROGEL_USE_AVX2 1
#include "isa.inl"
