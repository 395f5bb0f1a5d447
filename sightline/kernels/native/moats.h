// Nothing, but under AddressSanitizer moats around the pieces of scratch memory: memory that must not be touched, where
// otherwise one piece follows the other and a step too far would meet a neighbour's numbers.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__SANITIZE_ADDRESS__)
extern "C" void __asan_poison_memory_region(const volatile void*, size_t);
extern "C" void __asan_unpoison_memory_region(const volatile void*, size_t);
#endif

namespace sightline {

#if defined(__SANITIZE_ADDRESS__)
constexpr int64_t kMoat = 16;  // floats
// Of `all` floats the first `open` may be touched from now on, and no others.
static inline void dig_moat(float* start, int64_t open, int64_t all) {
  __asan_unpoison_memory_region(start, sizeof(float) * (size_t)open);
  __asan_poison_memory_region(start + open, sizeof(float) * (size_t)(all - open));
}
#else
constexpr int64_t kMoat = 0;
static inline void dig_moat(float*, int64_t, int64_t) {}
#endif

}  // namespace sightline
