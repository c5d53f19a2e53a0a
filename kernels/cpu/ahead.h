// Memory that is asked for before it is needed. Included in the unnamed namespace of a level.

#ifndef BMINF_CPU_AHEAD_H
#define BMINF_CPU_AHEAD_H

constexpr i64 AHEAD = 4096;  // bytes of codes
constexpr i64 SCALES_AHEAD = 2048;
constexpr i64 LINE = 64;

// Beyond the end of a tensor, too: it reads nothing there.
INLINE void ask_for(const u8* start, i64 bytes) {
    for (i64 i = 0; i < bytes; i += LINE) __builtin_prefetch(start + i);
}

#endif
