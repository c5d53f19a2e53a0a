// What ends a launch. The thread that notices writes the failure and switches to the stack of the
// process; its own is abandoned. A signal handler, which runs on a stack of its own, does the same,
// and so do the functions that g++'s checks of undefined behaviour call.
#include "shim_machine.h"

#include <signal.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>

namespace {

// ---- The message ----

size_t describe_place(char* text, size_t size) {
    const uint3 b = blockIdx;
    size_t used = snprintf(text, size, "kernel %s, block (%u, %u, %u)", machine.launch->kernel, b.x,
                           b.y, b.z);
    if (machine.current != nullptr && used < size) {
        const uint3 t = machine.current->index;
        used += snprintf(text + used, size - used, ", thread (%u, %u, %u)", t.x, t.y, t.z);
    }
    return used;
}

void write_report(const char* format, va_list values) {
    if (machine.failed) return;
    machine.failed = true;
    char* text = machine.failure->message;
    const size_t size = sizeof machine.failure->message;
    size_t used = describe_place(text, size);
    if (used < size) used += snprintf(text + used, size - used, ": ");
    if (used < size) vsnprintf(text + used, size - used, format, values);
}

[[noreturn]] void abandon_launch() {
    machine.current->fiber.switch_to(machine.process);
    abort();  // an abandoned fiber is never resumed
}

// A sanitizer that ends the process says where in the source, but not which thread.
void tell_last_words() {
    if (machine.current == nullptr) return;
    char text[256];
    const size_t used = std::min(describe_place(text, sizeof text), sizeof text - 1);
    text[used] = '\n';
    if (write(STDERR_FILENO, text, used + 1) < 0) return;
}

// ---- Signals ----

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL};
constexpr int kNumSignals = 4;
struct sigaction previous_actions[kNumSignals];
unsigned char signal_stack[64 * 1024];
thread_local bool is_launching = false;

const void* code_address([[maybe_unused]] const void* context) {
#if defined(__x86_64__)
    const auto& state = static_cast<const ucontext_t*>(context)->uc_mcontext;
    return reinterpret_cast<const void*>(state.gregs[REG_RIP]);
#elif defined(__aarch64__)
    return reinterpret_cast<const void*>(static_cast<const ucontext_t*>(context)->uc_mcontext.pc);
#else
    return nullptr;
#endif
}

const char* access_kind([[maybe_unused]] const void* context) {
#if defined(__x86_64__)
    constexpr long long kWrite = 2;
    const auto& state = static_cast<const ucontext_t*>(context)->uc_mcontext;
    return state.gregs[REG_ERR] & kWrite ? "writes" : "reads";
#else
    return "accesses";
#endif
}

void report_address(const unsigned char* address, const char* kind) {
    machine.failure->address = address;
    const ptrdiff_t past = address - machine.dynamic_end;
    if (machine.current->fiber.guard_contains(address))
        report("overflows its stack of %zu KiB", kStackBytes / 1024);
    else if (past >= 0 && past < ptrdiff_t(kPageBytes))
        report("%s %td bytes past the end of its dynamic shared memory", kind, past);
    else
        report("%s memory that is not its own, at %p", kind, static_cast<const void*>(address));
}

void handle_signal(int number, siginfo_t* info, void* context) {
    if (!is_launching || machine.current == nullptr) {
        // Not ours: put back what was there, and let it happen again.
        for (int i = 0; i < kNumSignals; ++i) sigaction(kSignals[i], &previous_actions[i], nullptr);
        return;
    }
    machine.failure->code = code_address(context);
    if (number == SIGFPE)
        report("integer division by zero, or an overflow in one");
    else if (number == SIGILL)
        report("runs into a trap");
    else
        report_address(static_cast<const unsigned char*>(info->si_addr), access_kind(context));
    abandon_launch();
}

}  // namespace

const char* name_of(ShimOperation operation) {
    static const char* const names[] = {"__syncwarp",        "__shfl_sync",
                                        "__ballot_sync",     "mma.m16n8k16.f16",
                                        "mma.m16n8k16.bf16", "mma.m16n8k32.s8",
                                        "mma.m8n8k16.s8"};
    return names[operation];
}

void report(const char* format, ...) {
    va_list values;
    va_start(values, format);
    write_report(format, values);
    va_end(values);
}

void fail(const char* format, ...) {
    va_list values;
    va_start(values, format);
    write_report(format, values);
    va_end(values);
    abandon_launch();
}

SignalGuard::SignalGuard() {
    stack_t alternate = {};
    alternate.ss_sp = signal_stack;
    alternate.ss_size = sizeof signal_stack;
    sigaltstack(&alternate, &previous_stack_);
    struct sigaction action = {};
    action.sa_sigaction = handle_signal;
    // No signal is blocked in the handler, since the handler never returns.
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < kNumSignals; ++i) sigaction(kSignals[i], &action, &previous_actions[i]);
    is_launching = true;
    if (__sanitizer_set_death_callback) __sanitizer_set_death_callback(tell_last_words);
}

SignalGuard::~SignalGuard() {
    is_launching = false;
    for (int i = 0; i < kNumSignals; ++i) sigaction(kSignals[i], &previous_actions[i], nullptr);
    sigaltstack(&previous_stack_, nullptr);
}

// ---- What g++ calls where it checks for undefined behaviour. It passes the site first. ----

extern "C" {

struct UndefinedSite {
    const char* file;
    unsigned line;
    unsigned column;
};

struct UndefinedType {
    unsigned short kind;
    unsigned short info;
    char name[1];
};

struct MisalignedAccess {
    UndefinedSite site;
    const UndefinedType* type;
    unsigned char log_alignment;
    unsigned char kind;
};

void __ubsan_handle_type_mismatch_v1_abort(const MisalignedAccess* access, uintptr_t address) {
    const size_t alignment = size_t(1) << access->log_alignment;
    machine.failure->address = reinterpret_cast<const void*>(address);
    const UndefinedSite& site = access->site;
    if (address % alignment == 0)
        fail("undefined behaviour at %s:%u:%u: no %s is at 0x%zx", site.file, site.line,
             site.column, access->type->name, address);
    fail("misaligned access at %s:%u:%u: address 0x%zx of %s is not a multiple of %zu", site.file,
         site.line, site.column, address, access->type->name, alignment);
}

#define SHIM_UNDEFINED(handler, what)                                                          \
    void __ubsan_handle_##handler(const UndefinedSite* site) {                                 \
        fail("undefined behaviour at %s:%u:%u: " what, site->file, site->line, site->column);  \
    }
SHIM_UNDEFINED(out_of_bounds_abort, "index out of bounds of its array")
SHIM_UNDEFINED(shift_out_of_bounds_abort, "shift by a negative or too large number")
SHIM_UNDEFINED(divrem_overflow_abort, "division by zero, or an overflow in one")
SHIM_UNDEFINED(add_overflow_abort, "signed overflow in +")
SHIM_UNDEFINED(sub_overflow_abort, "signed overflow in -")
SHIM_UNDEFINED(mul_overflow_abort, "signed overflow in *")
SHIM_UNDEFINED(negate_overflow_abort, "signed overflow in a negation")
SHIM_UNDEFINED(pointer_overflow_abort, "pointer arithmetic overflows")
SHIM_UNDEFINED(float_cast_overflow_abort, "float out of range of the integer type")
SHIM_UNDEFINED(load_invalid_value_abort, "value that its type does not have")
SHIM_UNDEFINED(invalid_builtin_abort, "builtin with an invalid argument")
SHIM_UNDEFINED(nonnull_arg_abort, "null where it must not be")
SHIM_UNDEFINED(vla_bound_not_positive_abort, "array of no positive size")
SHIM_UNDEFINED(builtin_unreachable, "unreachable code is reached")
SHIM_UNDEFINED(missing_return, "function ends without returning a value")
}
