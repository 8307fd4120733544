// A fibre: a stack of its own and a switch to it that costs a few nanoseconds.
//
// ucontext would do everywhere, but each of its switches is a system call for the signal mask: 20 barriers of
// a 256-thread block take 1.4 ms with it and 0.07 ms with the one below. It stays as the way for other
// processors, and FASTMERGE_EMULATE_UCONTEXT forces it. The address sanitizer is told of every switch.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#define FM_EMULATE_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define FM_EMULATE_ASAN 1
#endif
#endif

#if defined(FM_EMULATE_ASAN)
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(FASTMERGE_EMULATE_UCONTEXT) && !defined(__x86_64__) && !defined(__aarch64__)
#define FASTMERGE_EMULATE_UCONTEXT 1
#endif

#if defined(FASTMERGE_EMULATE_UCONTEXT)
#include <ucontext.h>
#endif

namespace fastmerge::emulate {

struct Fibre {
    void* stack_pointer = nullptr;
    void* mapping = nullptr;          // null for the host's own stack
    const void* stack_low = nullptr;  // what the address sanitizer knows the stack by
    size_t stack_bytes = 0;
    void* fake_stack = nullptr;
#if defined(FASTMERGE_EMULATE_UCONTEXT)
    ucontext_t context;
#endif

    Fibre() = default;
    Fibre(const Fibre&) = delete;
    Fibre& operator=(const Fibre&) = delete;
    ~Fibre();
};

#if defined(FM_EMULATE_ASAN)
constexpr size_t fibre_bytes = 512 << 10;  // red zones around every local make frames several times larger
#else
constexpr size_t fibre_bytes = 128 << 10;
#endif

inline Fibre::~Fibre() {
    if (mapping) munmap(mapping, fibre_bytes);
}

// ---- the switch -----------------------------------------------------------------------------------------

#if !defined(FASTMERGE_EMULATE_UCONTEXT)
// Everything but the frame pointer is declared clobbered, so the compiler saves what is live and no more.
// A suspended stack holds the frame pointer and the address to go on at.
inline void switch_stack(void** save, void* load) {
#if defined(__x86_64__)
    asm volatile(
        "leaq -128(%%rsp), %%rsp\n\t"  // steps over the red zone
        "pushq %%rbp\n\t"
        "leaq 1f(%%rip), %%rax\n\t"
        "pushq %%rax\n\t"
        "movq %%rsp, (%%rdi)\n\t"
        "movq %%rsi, %%rsp\n\t"
        "popq %%rax\n\t"
        "popq %%rbp\n\t"
        "jmpq *%%rax\n"
        "1:\n\t"
        "leaq 128(%%rsp), %%rsp\n\t"
        : "+D"(save), "+S"(load)
        :
        : "rax", "rbx", "rcx", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "xmm0", "xmm1",
          "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13",
          "xmm14", "xmm15", "cc", "memory");
#else
    register void** first asm("x0") = save;
    register void* second asm("x1") = load;
    asm volatile(
        "adr x9, 1f\n\t"
        "stp x29, x9, [sp, #-16]!\n\t"
        "mov x9, sp\n\t"
        "str x9, [x0]\n\t"
        "mov sp, x1\n\t"
        "ldp x29, x9, [sp], #16\n\t"
        "ret x9\n"  // not br: a branch target identification guard would want a landing pad
        "1:\n\t"
        : "+r"(first), "+r"(second)
        :
        : "x2", "x3", "x4", "x5", "x6", "x7", "x8", "x9", "x10", "x11", "x12", "x13", "x14", "x15", "x16",
          "x17", "x19", "x20", "x21", "x22", "x23", "x24", "x25", "x26", "x27", "x28", "x30", "v0", "v1",
          "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9", "v10", "v11", "v12", "v13", "v14", "v15", "v16",
          "v17", "v18", "v19", "v20", "v21", "v22", "v23", "v24", "v25", "v26", "v27", "v28", "v29", "v30",
          "v31", "cc", "memory");
#endif
}
#endif

inline Fibre* switched_from = nullptr;

/// To be called first on every stack that gets the processor: closes the sanitizer's books on the switch.
inline void arrive_on_fibre(void* fake_stack) {
#if defined(FM_EMULATE_ASAN)
    __sanitizer_finish_switch_fiber(fake_stack, &switched_from->stack_low, &switched_from->stack_bytes);
#else
    (void)fake_stack;
#endif
}

[[gnu::noinline]] inline void switch_fibre(Fibre& from, Fibre& to) {
    switched_from = &from;
#if defined(FM_EMULATE_ASAN)
    __sanitizer_start_switch_fiber(&from.fake_stack, to.stack_low, to.stack_bytes);
#endif
#if defined(FASTMERGE_EMULATE_UCONTEXT)
    swapcontext(&from.context, &to.context);
#else
    switch_stack(&from.stack_pointer, to.stack_pointer);
#endif
    arrive_on_fibre(from.fake_stack);
}

/// Gives a fibre its stack, guarded below; `entry` runs at the first switch to it and never returns.
inline void prepare_fibre(Fibre& fibre, size_t number, void (*entry)()) {
    const size_t page = size_t(sysconf(_SC_PAGESIZE));
    void* mapping = mmap(nullptr, fibre_bytes, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping == MAP_FAILED || mprotect(mapping, page, PROT_NONE) != 0) {
        fputs("emulate: no memory for a thread's stack\n", stderr);
        abort();
    }
    // Stacks that all start at the same place in a page fight for the same cache sets.
    const size_t shift = number % 61 * 192;
    auto* low = static_cast<unsigned char*>(mapping) + page;
    fibre.mapping = mapping, fibre.stack_low = low, fibre.stack_bytes = fibre_bytes - page - shift;
#if defined(FASTMERGE_EMULATE_UCONTEXT)
    getcontext(&fibre.context);
    fibre.context.uc_stack.ss_sp = low, fibre.context.uc_stack.ss_size = fibre.stack_bytes;
    fibre.context.uc_link = nullptr;
    makecontext(&fibre.context, entry, 0);
#else
    auto** top = reinterpret_cast<void**>(low + (fibre.stack_bytes & ~size_t(63)));
    void* const address = reinterpret_cast<void*>(entry);
    *--top = nullptr;  // in place of a return address: a stack trace ends here
#if defined(__x86_64__)
    *--top = nullptr, *--top = address;  // what switch_stack pops: address, frame pointer
#else
    *--top = nullptr;                    // keeps the stack at a multiple of 16
    *--top = address, *--top = nullptr;  // frame pointer, address
#endif
    fibre.stack_pointer = top;
#endif
}

}  // namespace fastmerge::emulate
