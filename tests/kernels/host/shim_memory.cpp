// Memory for a kernel's arguments that ends where a page begins that nobody may touch, and that
// begins after one. Where alignment leaves a few bytes before the page, and on the first page,
// there is rubbish that must still be there after the launch.
//
// Not instrumented, and without memset: a sanitizer must see only what the kernel does.
#include <sys/mman.h>

#include "shim_fiber.h"

extern "C" {

struct ShimBuffer {
    unsigned char* pages;  // between the two guards
    size_t page_bytes;
    unsigned char* begin;
    size_t bytes;
};

void shim_buffer_protect(const ShimBuffer* buffer, int is_read_only) {
    const int writable = is_read_only ? 0 : PROT_WRITE;
    mprotect(buffer->pages, buffer->page_bytes, PROT_READ | writable);
}

void shim_buffer_destroy(const ShimBuffer* buffer) {
    unsigned char* const all = buffer->pages - kPageBytes;
    const size_t bytes = buffer->page_bytes + 2 * kPageBytes;
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(all, bytes);
    munmap(all, bytes);
}
}

namespace {

constexpr unsigned char kCanary = 0xFF;

void set_canaries(const ShimBuffer& buffer) {
    unsigned char* const end = buffer.pages + buffer.page_bytes;
    for (unsigned char* byte = buffer.pages; byte < buffer.begin; ++byte) *byte = kCanary;
    for (unsigned char* byte = buffer.begin + buffer.bytes; byte < end; ++byte) *byte = kCanary;
}

// AddressSanitizer then names the line, where a guard page only raises a signal.
void poison_surroundings(const ShimBuffer& buffer) {
    if (!__asan_poison_memory_region) return;
    unsigned char* const end = buffer.begin + buffer.bytes;
    unsigned char* const before = buffer.pages - kPageBytes;
    __asan_poison_memory_region(before, buffer.begin - before);
    __asan_poison_memory_region(end, buffer.pages + buffer.page_bytes + kPageBytes - end);
}

}  // namespace

extern "C" {

// The last place before the guard where the address modulo 16 is as asked for.
int shim_buffer_create(size_t bytes, size_t modulo_16, ShimBuffer* buffer) {
    const size_t page_bytes = (bytes + 15 + kPageBytes - 1) / kPageBytes * kPageBytes;
    void* memory = mmap(nullptr, page_bytes + 2 * kPageBytes, PROT_NONE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return 1;
    buffer->pages = static_cast<unsigned char*>(memory) + kPageBytes;
    buffer->page_bytes = page_bytes;
    buffer->bytes = bytes;
    unsigned char* const last = buffer->pages + page_bytes - bytes;
    buffer->begin = last - (reinterpret_cast<uintptr_t>(last) - modulo_16) % 16;
    shim_buffer_protect(buffer, 0);
    set_canaries(*buffer);
    poison_surroundings(*buffer);
    return 0;
}

// Where, counted from the beginning, a byte outside has changed; 0 when none has, since the first
// byte is inside (or there is none).
ptrdiff_t shim_buffer_damage(const ShimBuffer* buffer) {
    const unsigned char* const end = buffer->pages + buffer->page_bytes;
    for (const unsigned char* byte = buffer->begin; byte-- > buffer->pages;)
        if (*byte != kCanary) return byte - buffer->begin;
    for (const unsigned char* byte = buffer->begin + buffer->bytes; byte < end; ++byte)
        if (*byte != kCanary) return byte - buffer->begin;
    return 0;
}
}
