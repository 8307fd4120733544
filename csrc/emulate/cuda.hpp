// Stand-ins for CUDA's built-ins: the project's own .cu files compile with a host compiler and run on the
// CPU, under the address and undefined-behaviour sanitizers where those are asked for.
//
//     g++ -x c++ -std=c++17 -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all
//         -fno-strict-aliasing -ffp-contract=off -Wall -Wextra -Wno-unknown-pragmas -Icsrc kernel.cu
//
// A launch runs the whole grid before it returns: blocks one after another, the threads of a block as fibres,
// both in an order drawn from FASTMERGE_EMULATE_SEED (see machine.hpp). What CUDA leaves undefined ends the
// program with one line that names kernel, block and thread.
//
// Not seen: a race whose accesses have no barrier, collective, atomic or fence between them shows under some
// seeds as a wrong result, or never; blocks never overlap, so a race between blocks shows through their order
// alone; two calls of a barrier in one line of a template count as one; a spin on memory without __nanosleep,
// a fence or an atomic never ends; global memory is whatever the host gave, so allocate it at its exact size.
#pragma once

// IWYU pragma: begin_exports
#include "emulate/atomics.hpp"
#include "emulate/intrinsics.hpp"
#include "emulate/language.hpp"
#include "emulate/runtime.hpp"
#include "emulate/synchronise.hpp"
// IWYU pragma: end_exports
