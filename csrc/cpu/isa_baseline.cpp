#define FM_ISA baseline
#include "cpu/kernels.inl"
