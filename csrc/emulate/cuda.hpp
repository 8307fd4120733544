// Stand-ins for CUDA's built-ins: the project's own .cu files compile with a host compiler and run on the
// CPU, under the address and undefined-behaviour sanitizers where those are asked for.
//
//     g++ -x c++ -std=c++17 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all
//         -fno-strict-aliasing -ffp-contract=off -Icsrc kernel.cu
//
// A launch runs the whole grid before it returns: blocks one after another, the threads of a block as fibres,
// both in an order drawn from FASTMERGE_EMULATE_SEED (see machine.hpp). What CUDA leaves undefined ends the
// program with one line that names kernel, block and thread. A race between plain accesses shows as a wrong
// result under some seed or not at all; a spin on memory without __nanosleep, a fence or an atomic never
// ends.
#pragma once

// IWYU pragma: begin_exports
#include "emulate/atomics.hpp"
#include "emulate/intrinsics.hpp"
#include "emulate/language.hpp"
#include "emulate/runtime.hpp"
#include "emulate/synchronise.hpp"
// IWYU pragma: end_exports
