// Which instruction set's kernels run: the highest level that both this build and this machine have.
#include <cstdlib>
#include <cstring>
#include <string>

#include "cpu/kernels.hpp"

namespace fastmerge {

namespace baseline {
extern const KernelTable table;
}
#ifdef FM_X86
namespace avx2 {
extern const KernelTable table;
}
namespace avx512 {
extern const KernelTable table;
}
#endif

namespace {

struct Level {
    const KernelTable* table;
    bool (*supported)();
};

// The compiler's checks include the operating system's: no zmm state, no avx512.
const Level levels[] = {
    {&baseline::table, [] { return true; }},
#ifdef FM_X86
    {&avx2::table,
     [] {
         return bool(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") &&
                     __builtin_cpu_supports("f16c"));
     }},
    {&avx512::table,
     [] {
         return bool(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"));
     }},
#endif
};

const KernelTable* best() {
    const KernelTable* found = levels[0].table;
    for (const Level& l : levels)
        if (l.supported()) found = l.table;
    return found;
}

const KernelTable* current = nullptr;

}  // namespace

const char* best_isa() {
    return best()->isa;
}

const char* available_isas() {
    static const std::string text = [] {
        std::string names;
        for (const Level& l : levels)
            if (l.supported()) names += (names.empty() ? "" : " ") + std::string(l.table->isa);
        return names;
    }();
    return text.c_str();
}

bool set_isa(const char* name) {
    for (const Level& l : levels)
        if (!std::strcmp(l.table->isa, name) && l.supported()) {
            current = l.table;
            return true;
        }
    return false;
}

const KernelTable& kernels() {
    if (!current) current = best();
    return *current;
}

}  // namespace fastmerge
