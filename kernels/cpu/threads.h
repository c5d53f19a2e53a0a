// Threads that sleep until there is a product to share, and share nothing else.

#ifndef BMINF_CPU_THREADS_H
#define BMINF_CPU_THREADS_H

#include "product.h"

typedef void (*Part)(void* data, i64 index);

// Calls part(data, i) once for each i from 0 to num_parts - 1, on up to num_threads threads, and
// returns when all have returned.
void run_parts(Part part, void* data, i64 num_parts, i64 num_threads);

#endif
