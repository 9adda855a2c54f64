#define AEROGEL_ISA generic
#define AEROGEL_ISA_NAME "generic"
#define AEROGEL_USE_GENERIC 1
#include "isa.inl"
