// Switching between stacks on one thread. On x86-64 in a few instructions; elsewhere through ucontext, which also makes
// a system call each time.
#pragma once
#include <stddef.h>
#include <stdint.h>
#include <ucontext.h>

namespace emulator {

#if defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)
struct Context {
    void* stack_pointer = nullptr;
};

extern "C" void emulator_switch(void** from, void* to);
// What a function keeps for its caller goes onto the stack that is left, and comes from the one that is entered.
asm(R"(
    .pushsection .text
    .hidden emulator_switch
    .globl emulator_switch
emulator_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .popsection
)");

inline void prepare(Context& context, char* stack, size_t bytes, void (*entry)()) {
    void** top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(stack) + bytes) & ~uintptr_t{15});
    *--top = nullptr;  // no return address: `entry` does not return
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    context.stack_pointer = top;
}

inline void switch_context(Context& from, Context& to) { emulator_switch(&from.stack_pointer, to.stack_pointer); }
#else
struct Context {
    ucontext_t state;
};

inline void prepare(Context& context, char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context.state);
    context.state.uc_stack.ss_sp = stack;
    context.state.uc_stack.ss_size = bytes;
    context.state.uc_link = nullptr;
    makecontext(&context.state, entry, 0);
}

inline void switch_context(Context& from, Context& to) { swapcontext(&from.state, &to.state); }
#endif

}  // namespace emulator
