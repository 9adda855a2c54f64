#define AEROGEL_ISA neon
#define AEROGEL_ISA_NAME "neon"
#define AEROGEL_USE_NEON 1
#include "isa.inl"
