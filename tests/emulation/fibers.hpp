// The threads of a grid as fibers of one process, and what they wait for.
//
// All CTAs of a grid are there at a time. The scheduler picks the next fiber, or the next asynchronous action (a copy
// that lands, a remote arrival, a store that becomes visible), by a seeded generator, in spells of different habits:
// fair or always the last one woken, threads interrupted often or never, actions soon or late. Some threads, some
// actions and all of one warp are held back for as long as anything else can go on. Every seed is thus another
// interleaving, and the same seed the same one. When nothing can go on, all threads are reported with the lines at which
// they wait.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <source_location>
#include <string>
#include <tuple>
#include <vector>

namespace emulation {

using Where = std::source_location;

// Ends the emulation: the kernel did what it must not do.
struct Fault {
    std::string message;
};

inline std::string name_of(const Where& where) {
    const std::string path = where.file_name();
    return path.substr(path.rfind('/') + 1) + ":" + std::to_string(where.line());
}

struct Fiber;
using Sleepers = std::vector<Fiber*>;

// A barrier of threads that is used again and again.
struct ThreadBarrier {
    uint32_t num_arrived = 0;
    uint32_t num_threads = 0;
    uint32_t num_phases = 0;  // completed
    Sleepers sleepers;
};

// An mbarrier. The word in shared memory says which one it is: one overwritten, or never initialised, is found.
struct Mbarrier {
    uint32_t num_arrivals;
    uint32_t missing_arrivals;
    int64_t missing_bytes = 0;  // below zero: bytes that landed before they were expected
    uint32_t num_phases = 0;    // completed
    Sleepers sleepers;
};

// What the lanes of one mask exchange. A lane is at most one exchange ahead of another, so two sets of slots suffice.
struct WarpExchange {
    uint32_t mask;
    uint64_t slot[2][32];
    ThreadBarrier barrier;
};

constexpr uint32_t kSharedBase = 1024;  // the system's, as on sm_90
constexpr uint32_t kSharedBytes = kSharedBase + 232'448;
constexpr uint32_t kStampBytes = 16;

struct Cluster;

struct Cta {
    uint32_t index;
    uint32_t rank;  // in its cluster
    uint32_t num_alive;
    Cluster* cluster;
    uint8_t* shared;
    std::unique_ptr<uint8_t, decltype(&free)> memory{nullptr, &free};
    std::vector<uint64_t> cp_async_clock;  // when cp.async last wrote each 16 bytes; 0: something else did
    ThreadBarrier barriers[16];
    std::vector<std::deque<WarpExchange>> warps;
    std::deque<Mbarrier> mbarriers;
    uint32_t num_stores = 0;  // relaxed stores that are not visible yet
    Sleepers awaiting_stores;
};

struct Cluster {
    std::vector<Cta*> ctas;
    ThreadBarrier barrier;
    uint32_t num_alive;
};

// A product of wgmma whose result nobody may look at yet.
struct PendingProduct {
    float* accumulators;
    void (*finish)(const PendingProduct&, float* sum);
    uint64_t a, b;
    bool adds;
    uint64_t operands;  // digest of the bytes that it reads
    Where where;
};

struct Fiber {
    void* stack_pointer;
    Cta* cta;
    uint32_t thread;
    bool done = false;
    Where where;
    const char* waits_for = "";
    const Mbarrier* mbarrier = nullptr;
    uint32_t parity = 0;
    std::map<uint32_t, uint32_t> num_exchanges;  // by mask
    std::deque<std::function<void()>> cp_async;  // in order
    Sleepers awaiting_cp_async;
    uint32_t num_arrivals = 0;  // at other CTAs, on their way
    uint32_t cluster_phase = 0;  // that it arrived at last
    Sleepers awaiting_arrivals;
    uint32_t num_bulk_stores = 0;
    Sleepers awaiting_bulk_stores;
    uint64_t fenced = 0;  // clock of the last fence.proxy.async
    std::deque<std::vector<PendingProduct>> groups;  // the last one is not committed
    std::map<float*, std::vector<float>> accumulators;  // values of those in flight
};

// Something asynchronous. `target`: the CTA into whose shared memory it writes.
struct Action {
    std::function<void()> act;
    Cta* target;
    const char* name;
};

extern "C" void emulation_switch(void** save, void* load);
#if defined(__x86_64__)
asm(R"(
.text
emulation_switch:
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
)");
#elif defined(__aarch64__)
asm(R"(
.text
emulation_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
)");
#else
#error "the fibers' switch is written for x86-64 and aarch64"
#endif

// A stack on which the first switch enters `entry`.
inline void* fresh_stack(uint8_t* end, void (*entry)()) {
    auto* top = reinterpret_cast<uint64_t*>(end);
#if defined(__x86_64__)
    top -= 8;  // six registers, the entry, and a word that aligns the entry's frame
    std::fill(top, top + 8, 0);
    top[6] = reinterpret_cast<uint64_t>(entry);
#else
    top -= 20;
    std::fill(top, top + 20, 0);
    top[11] = reinterpret_cast<uint64_t>(entry);
#endif
    return top;
}

struct Random {
    uint64_t state;

    uint64_t next() {  // splitmix64
        uint64_t z = state += 0x9e3779b97f4a7c15;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
        z = (z ^ z >> 27) * 0x94d049bb133111eb;
        return z ^ z >> 31;
    }
    uint32_t below(uint64_t bound) { return static_cast<uint32_t>(next() % bound); }
};

// What one launch is made of, as the Python side passes it.
struct Grid {
    uint32_t num_ctas, num_threads, cluster_size, dynamic_smem_bytes;
    uint64_t seed;
    void (*run_previous)();  // the kernel ahead in the stream, if this one overlaps it; else null
};

class Launch;
inline Launch* launch;
inline Fiber* current;

class Launch {
public:
    const Grid grid;
    Random random;
    uint64_t clock = 1;  // of writes by cp.async
    std::map<uint32_t, uint32_t> static_shared;  // line -> offset
    uint32_t num_shared_bytes;

    Launch(const Grid& grid, void (*kernel)(const void*), const void* params)
        : grid(grid), random{grid.seed}, num_shared_bytes(kSharedBase + grid.dynamic_smem_bytes), kernel(kernel),
          params(params), previous_has_run(grid.run_previous == nullptr),
          stacks(nullptr, Unmap{size_t{grid.num_ctas} * grid.num_threads * kStackBytes}) {
        void* const memory = mmap(nullptr, stacks.get_deleter().num_bytes, PROT_READ | PROT_WRITE,
                                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (memory == MAP_FAILED) throw Fault{"no room for the stacks of so many threads"};
        stacks.reset(static_cast<uint8_t*>(memory));
        for (uint32_t c = 0; c < grid.num_ctas / grid.cluster_size; ++c) {
            Cluster& cluster = clusters.emplace_back();
            cluster.num_alive = grid.cluster_size * grid.num_threads;
            for (uint32_t rank = 0; rank < grid.cluster_size; ++rank) add_cta(cluster, rank);
        }
    }

    // Runs the grid to its end, and the kernel before it. Throws what went wrong.
    void run() {
        while (num_alive > 0) step();
        for (; !actions.empty() || !late_actions.empty(); act())
            if (actions.empty()) actions.swap(late_actions);
        if (!previous_has_run) grid.run_previous();
    }

    void sleep(Sleepers& sleepers, const char* waits_for, const Where& where) {
        current->waits_for = waits_for;
        current->where = where;
        sleepers.push_back(current);
        progressed = true;
        emulation_switch(&current->stack_pointer, scheduler);
    }

    void wake(Sleepers& sleepers) {
        ready.insert(ready.end(), sleepers.begin(), sleepers.end());
        sleepers.clear();
    }

    void complete(ThreadBarrier& barrier) {
        barrier.num_arrived = 0;
        ++barrier.num_phases;
        wake(barrier.sleepers);
    }

    // The phase that this arrival is of.
    uint32_t arrive(ThreadBarrier& barrier, uint32_t num_threads) {
        const uint32_t phase = barrier.num_phases;
        if (++barrier.num_arrived == num_threads) complete(barrier);
        return phase;
    }

    void await_phase(ThreadBarrier& barrier, uint32_t phase, const char* name, const Where& where) {
        if (barrier.num_phases == phase) sleep(barrier.sleepers, name, where);
    }

    void arrive_and_wait(ThreadBarrier& barrier, uint32_t num_threads, const char* name, const Where& where) {
        await_phase(barrier, arrive(barrier, num_threads), name, where);
    }

    // Where others may get ahead of this thread.
    void interrupt() {
        if (random.below(256) >= interruptions_of_256) return;
        progressed = true;
        if (random.below(2)) {
            held.push_back(current);
        } else {
            ready.push_back(current);
            std::swap(ready[random.below(ready.size())], ready.back());
        }
        emulation_switch(&current->stack_pointer, scheduler);
    }

    // Before memory is read once more, by a thread that waits for another value there.
    void poll(const Where& where) {
        current->waits_for = "a value in memory";
        current->where = where;
        pollers.push_back(current);
        emulation_switch(&current->stack_pointer, scheduler);
    }

    // A poll found what it looked for.
    void poll_succeeded() { progressed = true; }

    void later(const char* name, Cta* target, std::function<void()> act) {
        (random.below(256) < late_of_256 ? late_actions : actions).push_back({std::move(act), target, name});
    }

    void wait_for_previous_grid(const Where& where) {
        if (!previous_has_run) sleep(awaiting_previous, "the previous kernel", where);
    }

private:
    static constexpr size_t kStackBytes = 64 * 1024;

    struct Unmap {
        size_t num_bytes;
        void operator()(uint8_t* memory) const { munmap(memory, num_bytes); }
    };

    void (*kernel)(const void*);
    const void* params;
    std::deque<Cluster> clusters;
    std::deque<Cta> ctas;
    std::deque<Fiber> fibers;
    std::vector<Fiber*> ready, pollers, held;
    std::vector<Action> actions, late_actions;
    Sleepers awaiting_previous;
    void* scheduler = nullptr;
    uint32_t num_alive = 0;
    bool previous_has_run;
    bool progressed = true;  // since pollers last had their turn
    uint32_t spell = 1;      // steps left
    bool last_woken_first = false;
    uint32_t actions_of_256 = 0, interruptions_of_256 = 0, late_of_256 = 0;
    const Cta* slow_cta = nullptr;  // one warp of it is held back
    uint32_t slow_warp = 0;
    bool held_first = false;  // then actions
    std::string error;
    std::unique_ptr<uint8_t, Unmap> stacks;

    void add_cta(Cluster& cluster, uint32_t rank) {
        Cta& cta = ctas.emplace_back();
        cta.index = static_cast<uint32_t>(ctas.size() - 1);
        cta.rank = rank;
        cta.num_alive = grid.num_threads;
        cta.cluster = &cluster;
        cta.shared = static_cast<uint8_t*>(aligned_alloc(1024, ceil_to(kSharedBytes, 1024)));
        cta.memory.reset(cta.shared);
        for (uint32_t i = 0; i < kSharedBytes; i += 8) {
            const uint64_t garbage = random.next();
            memcpy(cta.shared + i, &garbage, 8);
        }
        cta.cp_async_clock.assign(kSharedBytes / kStampBytes, 0);
        cta.warps.resize((grid.num_threads + 31) / 32);
        cluster.ctas.push_back(&cta);
        for (uint32_t thread = 0; thread < grid.num_threads; ++thread) {
            Fiber& fiber = fibers.emplace_back();
            fiber.cta = &cta;
            fiber.thread = thread;
            fiber.groups.emplace_back();
            fiber.stack_pointer = fresh_stack(stacks.get() + fibers.size() * kStackBytes, &enter);
            ready.push_back(&fiber);
            ++num_alive;
        }
    }

    static uint32_t ceil_to(uint32_t value, uint32_t step) { return (value + step - 1) / step * step; }

    static void enter() {
        try {
            launch->kernel(launch->params);
            launch->leave();
        } catch (const Fault& fault) {
            launch->error = "CTA " + std::to_string(current->cta->index) + ", thread " +
                            std::to_string(current->thread) + ": " + fault.message;
        }
        current->done = true;
        emulation_switch(&current->stack_pointer, launch->scheduler);
    }

    void leave() {
        Cta& cta = *current->cta;
        if (current->groups.size() > 1 || !current->groups[0].empty()) throw Fault{"ends with products in flight"};
        --num_alive;
        progressed = true;
        // Barriers of all threads no longer count this one.
        if (--cta.num_alive > 0 && cta.barriers[0].num_arrived == cta.num_alive) complete(cta.barriers[0]);
        if (--cta.cluster->num_alive > 0 && cta.cluster->barrier.num_arrived == cta.cluster->num_alive)
            complete(cta.cluster->barrier);
    }

    void step() {
        if (--spell == 0) {
            spell = 64 + random.below(2048);
            last_woken_first = random.below(2);
            actions_of_256 = random.below(2) * random.below(256);
            interruptions_of_256 = random.below(2) * random.below(256);
            late_of_256 = random.below(2) * random.below(256);
            held_first = random.below(2);
            slow_cta = random.below(2) ? &ctas[random.below(ctas.size())] : nullptr;
            slow_warp = random.below((grid.num_threads + 31) / 32);
        }
        if (!pollers.empty() && random.below(8) == 0) take(pollers, ready);
        if (!actions.empty() && random.below(256) < actions_of_256) return act();
        if (!ready.empty()) return resume();
        if (!held.empty() && held_first) return release();
        if (!actions.empty()) return act();
        if (!late_actions.empty()) return take(late_actions, actions);
        if (!held.empty()) return release();
        if (!progressed) return resolve_standstill();
        progressed = false;
        ready.swap(pollers);
        if (ready.empty()) resolve_standstill();
    }

    void release() {
        slow_cta = nullptr;
        ready.swap(held);
    }

    // Moves one at random.
    template <typename T>
    void take(std::vector<T>& from, std::vector<T>& to) {
        std::swap(from[random.below(from.size())], from.back());
        to.push_back(std::move(from.back()));
        from.pop_back();
    }

    void resume() {
        if (!last_woken_first) std::swap(ready[random.below(ready.size())], ready.back());
        Fiber* const next = ready.back();
        ready.pop_back();
        if (next->cta == slow_cta && next->thread / 32 == slow_warp) return held.push_back(next);
        current = next;
        emulation_switch(&scheduler, current->stack_pointer);
        current = nullptr;
        if (!error.empty()) throw Fault{error};
    }

    void act() {
        std::swap(actions[random.below(actions.size())], actions.back());
        const Action action = std::move(actions.back());
        actions.pop_back();
        progressed = true;
        if (action.target != nullptr && action.target->num_alive == 0)
            throw Fault{std::string(action.name) + ": reaches the shared memory of CTA " +
                        std::to_string(action.target->index) + ", which has ended"};
        action.act();
    }

    void resolve_standstill() {
        if (previous_has_run) throw Fault{"deadlock:" + waiting()};
        previous_has_run = progressed = true;
        grid.run_previous();
        wake(awaiting_previous);
    }

    // Who waits where: threads of a CTA that do the same together.
    std::string waiting() const {
        std::map<std::tuple<uint32_t, std::string>, std::vector<uint32_t>> threads;
        for (const Fiber& fiber : fibers) {
            if (fiber.done) continue;
            std::string what = "at " + name_of(fiber.where) + " for " + fiber.waits_for;
            if (const Mbarrier* barrier = fiber.mbarrier)
                what += " (parity " + std::to_string(fiber.parity) + "; phase " + std::to_string(barrier->num_phases) +
                        " misses " + std::to_string(barrier->missing_arrivals) + " of " +
                        std::to_string(barrier->num_arrivals) + " arrivals and " +
                        std::to_string(barrier->missing_bytes) + " bytes)";
            threads[{fiber.cta->index, what}].push_back(fiber.thread);
        }
        std::string report;
        for (const auto& [key, list] : threads) {
            report += "\n  CTA " + std::to_string(std::get<0>(key)) + ": threads";
            for (size_t i = 0; i < list.size(); ++i) {
                const size_t first = i;
                while (i + 1 < list.size() && list[i + 1] == list[i] + 1) ++i;
                report += " " + std::to_string(list[first]) + (i > first ? "-" + std::to_string(list[i]) : "");
            }
            report += " wait " + std::get<1>(key);
        }
        return report;
    }
};

// Runs a kernel whose parameters are `num_bytes` at `params`. Null, or what went wrong, valid until the next call.
inline const char* emulate(const Grid& grid, void (*kernel)(const void*), const void* params, size_t num_bytes) {
    constexpr size_t kAlignment = 64;
    static std::string message;
    std::vector<uint8_t> room(num_bytes + kAlignment);
    const size_t offset = -reinterpret_cast<uintptr_t>(room.data()) % kAlignment;
    memcpy(room.data() + offset, params, num_bytes);
    Launch* const outer = launch;  // emulate() runs again within run_previous()
    const char* answer = nullptr;
    try {
        Launch here(grid, kernel, room.data() + offset);
        launch = &here;
        here.run();
    } catch (const Fault& fault) {
        message = fault.message;
        answer = message.c_str();
    }
    launch = outer;
    return answer;
}

}  // namespace emulation
