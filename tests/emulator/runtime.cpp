// CUDA's execution model on a CPU, as far as the kernels use it. A CTA is an OS thread, so its thread_local objects are
// its shared memory; its CUDA threads are fibers that switch only where they meet.
//
// This file is compiled without sanitizers and finds them, if they are loaded, through weak symbols. It must not call
// what they intercept for memory that kernels use: a memset here would be a write like any other.
#include "runtime.h"

#include <link.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "context.h"

extern "C" {
#define OPTIONAL __attribute__((weak))
OPTIONAL void __asan_poison_memory_region(const volatile void*, size_t);
OPTIONAL void __asan_unpoison_memory_region(const volatile void*, size_t);
OPTIONAL void __asan_set_error_report_callback(void (*)(const char*));
OPTIONAL void __sanitizer_start_switch_fiber(void**, const void*, size_t);
OPTIONAL void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
OPTIONAL void* __tsan_get_current_fiber();
OPTIONAL void* __tsan_create_fiber(unsigned);
OPTIONAL void __tsan_destroy_fiber(void*);
OPTIONAL void __tsan_switch_to_fiber(void*, unsigned);
OPTIONAL void __tsan_acquire(void*);
OPTIONAL void __tsan_release(void*);
OPTIONAL void __tsan_write_range(void*, unsigned long);
#undef OPTIONAL
}

dim3 threadIdx, blockIdx, blockDim, gridDim;

constexpr size_t kMostSharedBytes = 228 * 1024;
thread_local __attribute__((aligned(1024))) unsigned char shared[kMostSharedBytes];

namespace emulator {
namespace {

constexpr size_t kStackBytes = 128 * 1024;
constexpr unsigned kNoSync = 1;  // __tsan_switch_to_fiber_no_sync

void acquire(void* token) {
    if (__tsan_acquire) __tsan_acquire(token);
}
void release(void* token) {
    if (__tsan_release) __tsan_release(token);
}
void poison(const void* from, size_t bytes) {
    if (__asan_poison_memory_region) __asan_poison_memory_region(from, bytes);
}
void unpoison(const void* from, size_t bytes) {
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(from, bytes);
}

// Bytes that no sanitizer sees being written.
void fill(unsigned char* to, unsigned char value, size_t bytes) {
    for (volatile unsigned char* at = to; at < to + bytes; at++) *at = value;
}

// A place where fibers wait for each other. Its tokens carry what TSan has to know; two, so that who comes to the next
// meeting does not hand over its writes to who has not left this one.
struct Point {
    const char* operation = nullptr;
    Site site = {};
    int arrived = 0;
    unsigned generation = 0;
    char tokens[2] = {};
};

struct Fiber {
    Context context;
    char* stack;
    void* asan_stack = nullptr;
    void* tsan = nullptr;
    bool done = false;
    // It waits while `point` is still in this generation.
    const Point* point = nullptr;
    unsigned generation = 0;
    // For fences: what it has written before the last one, and what it has read from.
    bool fenced = false;
    std::vector<void*> read_from;
};

struct Warp : Point {
    const void* in[32];
    void* out[32];
    int alive = 32;
};

// What tests/emulator/__init__.py makes of an array, in place of the driver's tensor map. Innermost axis first.
struct BoxMap {
    unsigned char* address;
    unsigned long long strides[4];  // of the axes from the second on
    unsigned sizes[5], box[5];      // in words of four bytes, on the first axis
    unsigned swizzle_bytes;         // length of the lines whose 16-byte chunks are exchanged, or 0
};

// Of a box, or without a map of `bytes` in one piece.
struct Copy {
    unsigned char* dst;
    const BoxMap* map;
    int first[5];
    const unsigned char* from;
    unsigned bytes;
};

// The generation of the point is the number of phases that have ended. Copies lie in an array, because TSan would see
// one fiber free what another has allocated.
struct CountingBarrier : Point {
    int arrivals = 0;
    int pending = 0;
    long long bytes = 0;
    Copy copies[32];
    int copy_count = 0;
};

struct Run {
    void (*entry)(void*);
    const Launch& launch;
    unsigned order;
    char error[512] = "";
    char ended = 0;  // what every thread wrote before it ended
    std::atomic<int> finished{0};
};

struct Cta {
    Run& run;
    unsigned index;
    pthread_t thread;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    Point barrier, first_barrier;
    std::map<const void*, CountingBarrier> counting;
    Context scheduler;
    char* stacks = nullptr;
    void* asan_stack = nullptr;
    const void* scheduler_stack = nullptr;
    size_t scheduler_stack_bytes = 0;
    void* scheduler_tsan = nullptr;
    unsigned current = 0;
    int alive = 0;
    std::atomic<int> state{0};

    Cta(Run& run, unsigned index) : run(run), index(index) {}
    size_t stacks_bytes() const { return fibers.size() * kStackBytes; }
};

Cta* cta = nullptr;
bool reported = false;  // AddressSanitizer has said something about this launch

void wait_for(std::atomic<int>& word, int value) {
    for (int now; (now = word.load()) < value;) syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, now, nullptr, nullptr, 0);
}
void set(std::atomic<int>& word, int value) {
    word.store(value);
    syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 1 << 30, nullptr, nullptr, 0);
}

void yield() {
    Fiber& self = cta->fibers[cta->current];
    if (__sanitizer_start_switch_fiber)
        __sanitizer_start_switch_fiber(&self.asan_stack, cta->scheduler_stack, cta->scheduler_stack_bytes);
    if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(cta->scheduler_tsan, kNoSync);
    switch_context(self.context, cta->scheduler);
    if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(self.asan_stack, nullptr, nullptr);
}

void wait_at(const Point& point) {
    Fiber& self = cta->fibers[cta->current];
    self.point = &point;
    self.generation = point.generation;
    while (point.generation == self.generation) yield();
    self.point = nullptr;
}

void open(Point& point) {
    point.arrived = 0;
    point.generation++;
}

void fiber_main() {
    if (__sanitizer_finish_switch_fiber)
        __sanitizer_finish_switch_fiber(nullptr, &cta->scheduler_stack, &cta->scheduler_stack_bytes);
    cta->run.entry(cta->run.launch.params);
    release(&cta->run.ended);
    Warp& warp = cta->warps[cta->current / 32];
    if (warp.arrived) fail("a lane has left the kernel while others of its warp wait for it", warp.site);
    warp.alive--;
    cta->alive--;
    cta->fibers[cta->current].done = true;
    // Threads that have left no longer count at the barrier.
    if (cta->alive && cta->barrier.arrived == cta->alive) open(cta->barrier);
    for (;;) yield();
}

void resume(unsigned index) {
    Fiber& fiber = cta->fibers[index];
    cta->current = index;
    threadIdx = {index, 0, 0};
    if (__sanitizer_start_switch_fiber)
        __sanitizer_start_switch_fiber(&cta->asan_stack, fiber.stack, kStackBytes);
    if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(fiber.tsan, kNoSync);
    switch_context(cta->scheduler, fiber.context);
    if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(cta->asan_stack, nullptr, nullptr);
}

// The thread_local objects of this library on this thread: all shared memory, static and dynamic.
int fill_thread_local(dl_phdr_info* info, size_t, void*) {
    unsigned char* begin = static_cast<unsigned char*>(info->dlpi_tls_data);
    for (int i = 0; i < info->dlpi_phnum && begin; i++) {
        const ElfW(Phdr)& header = info->dlpi_phdr[i];
        if (header.p_type != PT_TLS || shared < begin || shared >= begin + header.p_memsz) continue;
        fill(begin, 0xff, header.p_memsz);  // NaN: nothing may count on what was there
        return 1;
    }
    return 0;
}

void prepare_fibers() {
    const Launch& launch = cta->run.launch;
    cta->fibers.resize(launch.threads);
    cta->warps.resize(launch.threads / 32);
    cta->alive = launch.threads;
    cta->stacks = static_cast<char*>(
        mmap(nullptr, cta->stacks_bytes(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (cta->stacks == MAP_FAILED) abort();
    unpoison(cta->stacks, cta->stacks_bytes());
    for (unsigned i = 0; i < launch.threads; i++) {
        Fiber& fiber = cta->fibers[i];
        fiber.stack = cta->stacks + i * kStackBytes;
        // The lowest page stays out of reach: an overflow ends here.
        mprotect(fiber.stack, 4096, PROT_NONE);
        prepare(fiber.context, fiber.stack, kStackBytes, fiber_main);
        if (__tsan_create_fiber) fiber.tsan = __tsan_create_fiber(0);
    }
    if (__tsan_get_current_fiber) cta->scheduler_tsan = __tsan_get_current_fiber();
}

void say_deadlock() {
    const Fiber *first = nullptr, *second = nullptr;
    for (const Fiber& fiber : cta->fibers) {
        if (fiber.done) continue;
        if (!first)
            first = &fiber;
        else if (!second && fiber.point != first->point)
            second = &fiber;
    }
    const auto number = [](const Fiber* fiber) { return static_cast<int>(fiber - cta->fibers.data()); };
    if (!second) second = first;
    snprintf(cta->run.error, sizeof cta->run.error,
             "deadlock in CTA %u: thread %d waits at %s (%s:%d), thread %d at %s (%s:%d)", cta->index, number(first),
             first->point->operation, first->point->site.file, first->point->site.line, number(second),
             second->point->operation, second->point->site.file, second->point->site.line);
}

unsigned next_random(unsigned& order, unsigned below) {
    order = order * 1664525u + 1013904223u;
    return (order >> 8) % below;
}

void shuffle(std::vector<unsigned>& turn, unsigned& order) {
    for (size_t i = turn.size(); i > 1; i--) std::swap(turn[i - 1], turn[next_random(order, static_cast<unsigned>(i))]);
}

void schedule() {
    const unsigned threads = static_cast<unsigned>(cta->fibers.size()), warps = threads / 32;
    const bool shuffled = cta->run.launch.order != 0;
    unsigned& order = cta->run.order;
    std::vector<unsigned> turn(warps);
    for (unsigned i = 0; i < warps; i++) turn[i] = i;
    while (cta->alive && !cta->run.error[0]) {
        bool progress = false;
        // Each round in another order of warps, each warp from another lane on and in another direction.
        if (shuffled) shuffle(turn, order);
        for (unsigned warp : turn) {
            const unsigned first = shuffled ? next_random(order, 64) : 0;
            for (unsigned i = 0; i < 32 && !cta->run.error[0]; i++) {
                const unsigned lane = (first + (first < 32 ? i : 64 - i)) % 32;
                const Fiber& fiber = cta->fibers[warp * 32 + lane];
                if (fiber.done || (fiber.point && fiber.point->generation == fiber.generation)) continue;
                progress = true;
                resume(warp * 32 + lane);
            }
        }
        if (!progress && !cta->run.error[0]) say_deadlock();
    }
}

void* cta_main(void* argument) {
    Cta& self = *static_cast<Cta*>(argument);
    cta = &self;
    blockIdx = {self.index, 0, 0};
    shared[0] = 0;  // makes this thread's block exist
    dl_iterate_phdr(fill_thread_local, nullptr);
    poison(shared + self.run.launch.shared_bytes, kMostSharedBytes - self.run.launch.shared_bytes);
    prepare_fibers();
    schedule();
    set(self.state, 1);
    // The thread stays until all CTAs are through: who joins it comes after it, and CTAs do not come after each other.
    wait_for(self.run.finished, 1);
    acquire(&self.run.ended);
    // Not earlier: without a fiber's history TSan drops reports that it is part of.
    if (__tsan_destroy_fiber)
        for (Fiber& fiber : self.fibers) __tsan_destroy_fiber(fiber.tsan);
    unpoison(shared, kMostSharedBytes);
    unpoison(self.stacks, self.stacks_bytes());
    munmap(self.stacks, self.stacks_bytes());
    return nullptr;
}

void mark(const Launch& launch, bool secret) {
    for (int i = 0; i < launch.watched_count; i++) {
        const Watched& w = launch.watched[i];
        for (unsigned long long from = 0, to; from < w.size; from = to) {
            for (to = from; to < w.size && w.readable[to] == w.readable[from];) to++;
            if (!secret)
                unpoison(w.base + from, to - from);
            else if (!w.readable[from])
                poison(w.base + from, to - from);
        }
    }
}

}  // namespace

void fail(const char* message, const Site& at) {
    if (!cta->run.error[0])
        snprintf(cta->run.error, sizeof cta->run.error, "%s (%s:%d, CTA %u, thread %u)", message, at.file, at.line,
                 cta->index, cta->current);
    for (;;) yield();
}

void check_read(const void* address, int bytes, const Site& at) {
    if (reinterpret_cast<unsigned long long>(address) % bytes) fail("a misaligned read", at);
    if (__asan_poison_memory_region) return;  // it sees every read, not only those that come through here
    const unsigned char* from = static_cast<const unsigned char*>(address);
    for (int i = 0; i < cta->run.launch.watched_count; i++) {
        const Watched& w = cta->run.launch.watched[i];
        if (from < w.base || from >= w.base + w.size) continue;
        for (int b = 0; b < bytes; b++)
            if (from + b >= w.base + w.size || !w.readable[from + b - w.base])
                fail("a read of what nobody may read", at);
    }
}

void meet(const char* operation, const void* in, void* out, Combine combine, bool aligned, const Site& at) {
    Warp& warp = cta->warps[cta->current / 32];
    const unsigned lane = cta->current % 32;
    if (reported) fail("AddressSanitizer has reported an error", at);
    if (warp.alive < 32) fail("a lane has left the kernel while others of its warp wait for it", at);
    if (warp.arrived == 0) {
        warp.operation = operation;
        warp.site = at;
    } else if (warp.operation != operation || (aligned && warp.site.line != at.line)) {
        char message[256];
        snprintf(message, sizeof message, "lanes of a warp are at different operations: %s at %s:%d, and %s",
                 warp.operation, warp.site.file, warp.site.line, operation);
        fail(message, at);
    }
    warp.in[lane] = in;
    warp.out[lane] = out;
    if (++warp.arrived < 32) return wait_at(warp);
    combine(warp.in, warp.out);
    open(warp);
}

void sync_warp(const Site& at) {
    Warp& warp = cta->warps[cta->current / 32];
    char* token = &warp.tokens[warp.generation % 2];
    release(token);
    meet("sync_warp", nullptr, nullptr, [](const void* const*, void* const*) {}, !ALIGNED, at);
    acquire(token);
}

void sync_threads(const Site& at) {
    if (reported) fail("AddressSanitizer has reported an error", at);
    Point& barrier = cta->barrier;
    char* token = &barrier.tokens[barrier.generation % 2];
    release(token);
    barrier.operation = "sync_threads";
    barrier.site = at;
    if (++barrier.arrived == cta->alive)
        open(barrier);
    else
        wait_at(barrier);
    acquire(token);
}

void sync_first(int count, const Site& at) {
    if (reported) fail("AddressSanitizer has reported an error", at);
    if (static_cast<int>(cta->current) >= count) fail("a thread beyond the first ones is at their meeting", at);
    Point& barrier = cta->first_barrier;
    char* token = &barrier.tokens[barrier.generation % 2];
    release(token);
    barrier.operation = "sync_first";
    barrier.site = at;
    if (++barrier.arrived == count)
        open(barrier);
    else
        wait_at(barrier);
    acquire(token);
}

namespace {

CountingBarrier& counting(const void* address, const Site& at) {
    const auto found = cta->counting.find(address);
    if (found == cta->counting.end()) fail("a barrier that was not initialised", at);
    return found->second;
}

void end_phase_if_complete(CountingBarrier& barrier) {
    if (barrier.pending || barrier.bytes) return;
    barrier.pending = barrier.arrivals;
    open(barrier);
}

bool is_secret(const unsigned char* address) {
    const Launch& launch = cta->run.launch;
    for (int i = 0; i < launch.watched_count; i++) {
        const Watched& w = launch.watched[i];
        if (address >= w.base && address < w.base + w.size) return !w.readable[address - w.base];
    }
    return false;
}

unsigned box_bytes(const BoxMap& map) {
    unsigned bytes = 4;
    for (unsigned size : map.box) bytes *= size;
    return bytes;
}

// What nobody may read comes as NaN, whatever lies there: a box may cover it as long as nothing depends on it.
void perform(const Copy& copy) {
    if (!copy.map) {
        for (unsigned byte = 0; byte < copy.bytes; byte++)
            static_cast<volatile unsigned char*>(copy.dst)[byte] =
                is_secret(copy.from + byte) ? 0xff : static_cast<const volatile unsigned char*>(copy.from)[byte];
        return;
    }
    const BoxMap& map = *copy.map;
    const unsigned lines = map.swizzle_bytes / 16;
    unsigned at = 0;
    for (unsigned index = 0; at < box_bytes(map); index++) {
        unsigned left = index;
        unsigned char* from = map.address;
        bool inside = true;
        for (int axis = 0; axis < 5; axis++) {
            const long long i = static_cast<long long>(copy.first[axis]) + left % map.box[axis];
            left /= map.box[axis];
            inside = inside && i >= 0 && i < map.sizes[axis];
            from += i * static_cast<long long>(axis ? map.strides[axis - 1] : 4);
        }
        for (int byte = 0; byte < 4; byte++, at++) {
            const unsigned exchanged = lines ? at ^ (at / 128 % lines) * 16 : at;
            volatile unsigned char* to = copy.dst + exchanged;
            *to = !inside ? 0 : is_secret(from + byte) ? 0xff : static_cast<volatile unsigned char*>(from)[byte];
        }
    }
}

void ask_for(const Copy& copy, unsigned alignment, CountingBarrier& barrier, const Site& at) {
    const unsigned long long offset = copy.dst - shared;
    if (copy.dst < shared || offset + copy.bytes > cta->run.launch.shared_bytes) fail("a copy out of shared memory", at);
    if (offset % alignment) fail("a copy to a misaligned place", at);
    if (__tsan_write_range) __tsan_write_range(copy.dst, copy.bytes);
    release(&barrier.tokens[barrier.generation % 2]);
    fill(copy.dst, 0xff, copy.bytes);
    if (barrier.copy_count == static_cast<int>(sizeof barrier.copies / sizeof copy)) fail("too many copies", at);
    barrier.copies[barrier.copy_count++] = copy;
    // Who waits already can go and look.
    for (Fiber& fiber : cta->fibers)
        if (fiber.point == &barrier) fiber.generation = barrier.generation - 1;
}

}  // namespace

void barrier_init(const void* address, int arrivals, const Site& at) {
    CountingBarrier& barrier = cta->counting[address];
    if (barrier.arrivals) fail("a barrier is initialised twice", at);
    barrier.arrivals = barrier.pending = arrivals;
    barrier.operation = "barrier_wait";
}

void barrier_arrive(const void* address, int bytes, const Site& at) {
    CountingBarrier& barrier = counting(address, at);
    release(&barrier.tokens[barrier.generation % 2]);
    if (!barrier.pending) fail("more arrivals at a barrier than it counts", at);
    barrier.bytes += bytes;
    barrier.pending--;
    end_phase_if_complete(barrier);
}

void barrier_wait(const void* address, unsigned parity, const Site& at) {
    CountingBarrier& barrier = counting(address, at);
    if (reported) fail("AddressSanitizer has reported an error", at);
    barrier.site = at;
    while (barrier.generation % 2 == parity) {
        const bool copied = barrier.copy_count > 0;
        for (; barrier.copy_count; barrier.copy_count--) {
            const Copy& copy = barrier.copies[barrier.copy_count - 1];
            perform(copy);
            barrier.bytes -= copy.bytes;
        }
        if (copied) end_phase_if_complete(barrier);
        if (barrier.generation % 2 == parity) wait_at(barrier);
    }
    acquire(&barrier.tokens[parity]);
}

void copy_box(void* dst, const void* map, const int (&first)[5], const void* address, const Site& at) {
    const BoxMap& box = *static_cast<const BoxMap*>(map);
    Copy copy = {static_cast<unsigned char*>(dst), &box, {}, nullptr, box_bytes(box)};
    for (int axis = 0; axis < 5; axis++) copy.first[axis] = first[axis];
    ask_for(copy, box.swizzle_bytes ? 8 * box.swizzle_bytes : 128, counting(address, at), at);
}

void copy_bytes(void* dst, const void* from, int bytes, const void* address, const Site& at) {
    if (bytes % 16 || reinterpret_cast<unsigned long long>(from) % 16) fail("a misaligned copy", at);
    for (int byte = 0; byte < bytes; byte += 16) check_read(static_cast<const unsigned char*>(from) + byte, 16, at);
    const Copy copy = {static_cast<unsigned char*>(dst), nullptr, {}, static_cast<const unsigned char*>(from),
                       static_cast<unsigned>(bytes)};
    ask_for(copy, 16, counting(address, at), at);
}

void fence() {
    Fiber& self = cta->fibers[cta->current];
    self.fenced = true;
    for (void* token : self.read_from) acquire(token);
    self.read_from.clear();
}

void publish(const void* address) {
    Fiber& self = cta->fibers[cta->current];
    if (self.fenced) release(const_cast<void*>(address));
    self.fenced = false;
    self.read_from.push_back(const_cast<void*>(address));
}

const char* launch(void (*entry)(void*), const Launch& launch) {
    static char error[512];
    if (launch.threads % 32 || launch.shared_bytes > kMostSharedBytes) return "threads or shared memory of no CTA here";
    gridDim = {launch.grid, 1, 1};
    blockDim = {launch.threads, 1, 1};
    Run run = {entry, launch, launch.order};
    reported = false;
    if (__asan_set_error_report_callback) __asan_set_error_report_callback([](const char*) { reported = true; });
    mark(launch, true);
    std::vector<std::unique_ptr<Cta>> ctas;
    // TSan follows some 8000 threads, and tells 255 apart at a time: beyond that it goes on finding races within a CTA,
    // but those between CTAs only by chance.
    const size_t together = __tsan_create_fiber ? 6000 : 1;
    const auto end_together = [&] {
        set(run.finished, 1);
        for (auto& block : ctas) pthread_join(block->thread, nullptr);
        ctas.clear();
        run.finished = 0;
    };
    // Any CTA may be the last of those that share something. Not where ThreadSanitizer looks at what threads do: which
    // races it sees depends on the order.
    std::vector<unsigned> turn(launch.grid);
    for (unsigned i = 0; i < launch.grid; i++) turn[i] = i;
    if (launch.order && !__tsan_write_range) shuffle(turn, run.order);
    for (unsigned index : turn) {
        if (run.error[0]) break;
        ctas.emplace_back(new Cta(run, index));
        if (pthread_create(&ctas.back()->thread, nullptr, cta_main, ctas.back().get())) abort();
        wait_for(ctas.back()->state, 1);
        if (ctas.size() * launch.threads >= together) end_together();
    }
    end_together();
    mark(launch, false);
    cta = nullptr;
    memcpy(error, run.error, sizeof error);
    return error;
}

}  // namespace emulator
