#define FM_ISA avx2
#include "cpu/kernels.inl"
