// Threads that share parts of jobs, several jobs at once, and jobs after fork(): every part is done
// once. Built with ThreadSanitizer by test_cpu_sanitized.py.

#include "threads.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

namespace {

constexpr i64 PARTS = 37, JOBS = 300;

struct Counts {
    i64 of_part[PARTS];  // not atomic: two threads on one part are a race
};

void count(void* data, i64 index) { ++static_cast<Counts*>(data)->of_part[index]; }

void run_jobs(i64 num_threads) {
    Counts counts = {};
    for (i64 job = 0; job < JOBS; ++job) run_parts(count, &counts, PARTS, num_threads);
    for (i64 part = 0; part < PARTS; ++part)
        if (counts.of_part[part] != JOBS) std::abort();
}

void* run_some(void*) {
    run_jobs(3);
    return nullptr;
}

}  // namespace

int main() {
    for (i64 num_threads = 1; num_threads <= 4; ++num_threads) run_jobs(num_threads);
    pthread_t callers[3];
    for (pthread_t& caller : callers) pthread_create(&caller, nullptr, run_some, nullptr);
    for (pthread_t caller : callers) pthread_join(caller, nullptr);
    std::puts("shared");
}
