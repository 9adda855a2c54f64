#define AEROGEL_ISA avx512
#define AEROGEL_ISA_NAME "avx512"
#define AEROGEL_USE_AVX512 1
#include "isa.inl"
