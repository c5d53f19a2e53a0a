// A pool of the process. Its threads take parts of one job at a time, from a counter, so that one that
// is late or slow takes fewer; a job whose pool is busy with that of another thread runs on its own.
//
// They sleep between jobs instead of waiting busily, as those of OpenMP do: the next product comes
// after operations of torch, whose own threads want the processors. A thread that wakes when the job
// is done does not join it, and the caller never waits for one that has not joined.
//
// After fork() the child has none of the threads, and begins with a new pool. Signals are for the
// threads of Python.

#include "threads.h"

#include <atomic>
#include <new>
#include <pthread.h>
#include <signal.h>

namespace {

constexpr i64 MAX_THREADS = 256;
constexpr int SPINS = 2000;  // some ten microseconds: the last part of another thread is short

inline void pause_processor() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

struct Pool {
    pthread_mutex_t in_use = PTHREAD_MUTEX_INITIALIZER;
    pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
    pthread_cond_t has_work = PTHREAD_COND_INITIALIZER;
    pthread_cond_t is_done = PTHREAD_COND_INITIALIZER;
    i64 num_threads = 0;  // beside the callers
    i64 wanted = 0;       // threads that may still join the job
    std::atomic<i64> joined{0};
    Part part = nullptr;
    void* data = nullptr;
    i64 num_parts = 0;
    std::atomic<i64> next{0};
};

alignas(Pool) unsigned char pool_memory[sizeof(Pool)];
pthread_once_t is_prepared = PTHREAD_ONCE_INIT;

Pool& pool() { return *reinterpret_cast<Pool*>(pool_memory); }

void renew() { new (pool_memory) Pool; }

void prepare() {
    renew();
    pthread_atfork(nullptr, nullptr, renew);
}

void take_parts(Pool& p) {
    for (i64 i; (i = p.next.fetch_add(1, std::memory_order_relaxed)) < p.num_parts;)
        p.part(p.data, i);
}

void* work(void*) {
    Pool& p = pool();
    pthread_mutex_lock(&p.lock);
    for (;;) {
        while (p.wanted == 0) pthread_cond_wait(&p.has_work, &p.lock);
        --p.wanted;
        ++p.joined;
        pthread_mutex_unlock(&p.lock);
        take_parts(p);
        pthread_mutex_lock(&p.lock);
        if (--p.joined == 0) pthread_cond_signal(&p.is_done);
    }
    return nullptr;
}

bool start_thread() {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_t thread;
    const bool is_started = pthread_create(&thread, nullptr, work, nullptr) == 0;
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (is_started) pthread_detach(thread);
    return is_started;
}

// Lets threads in; fewer than `helpers` where the system has no more.
void begin(Pool& p, i64 helpers) {
    while (p.num_threads < helpers && start_thread()) ++p.num_threads;
    pthread_mutex_lock(&p.lock);
    p.wanted = helpers < p.num_threads ? helpers : p.num_threads;
    pthread_mutex_unlock(&p.lock);
    if (helpers >= p.num_threads) pthread_cond_broadcast(&p.has_work);
    else for (i64 i = 0; i < helpers; ++i) pthread_cond_signal(&p.has_work);
}

// Lets no more threads in, and waits for those that are.
void end(Pool& p) {
    pthread_mutex_lock(&p.lock);
    p.wanted = 0;
    pthread_mutex_unlock(&p.lock);
    for (int i = 0; i < SPINS && p.joined.load(std::memory_order_acquire); ++i) pause_processor();
    pthread_mutex_lock(&p.lock);
    while (p.joined.load()) pthread_cond_wait(&p.is_done, &p.lock);
    pthread_mutex_unlock(&p.lock);
}

}  // namespace

void run_parts(Part part, void* data, i64 num_parts, i64 num_threads) {
    pthread_once(&is_prepared, prepare);
    Pool& p = pool();
    const i64 most = num_threads < MAX_THREADS ? num_threads : MAX_THREADS;
    const i64 helpers = (most < num_parts ? most : num_parts) - 1;
    if (helpers < 1 || pthread_mutex_trylock(&p.in_use) != 0) {
        for (i64 i = 0; i < num_parts; ++i) part(data, i);
        return;
    }
    p.part = part;
    p.data = data;
    p.num_parts = num_parts;
    p.next.store(0, std::memory_order_relaxed);
    begin(p, helpers);
    take_parts(p);
    end(p);
    pthread_mutex_unlock(&p.in_use);
}
