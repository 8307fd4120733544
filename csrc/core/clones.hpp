// FM_CLONES: compile a small loop outside the kernel table for several instruction sets; the loader chooses.
// Where that is not possible the build's own instruction set has to do.
#pragma once

#if defined(__x86_64__) && defined(__GLIBC__) && (defined(__GNUC__) && !defined(__clang__))
#define FM_CLONES __attribute__((target_clones("default", "avx2", "arch=x86-64-v4")))
#else
#define FM_CLONES
#endif
