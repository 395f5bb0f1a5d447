// Which instruction sets the library holds, which of them this CPU can run, and the one in use.
#pragma once

#include <atomic>
#if defined(__unix__)
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include "problem.h"

namespace sightline {

extern const Kernels kernels_baseline;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512_bf16;
#if defined(SIGHTLINE_EMULATED)
extern const Kernels kernels_avx512_emulated;  // the bf16 dot product in floats: for tests
#endif

// Conversions from and to half floats, of which older compilers' __builtin_cpu_supports does not know.
inline bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

inline bool runs_here(const Kernels& kernels) {
#if defined(__x86_64__)
  if (&kernels != &kernels_baseline && !has_f16c()) return false;
  if (&kernels == &kernels_avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (&kernels == &kernels_avx512_bf16 &&
      !(__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi2")))
    return false;
  if (&kernels != &kernels_baseline)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
  return &kernels == &kernels_baseline;
}

// Best first.
inline const Kernels* const all_kernels[] = {
#if defined(__x86_64__)
    &kernels_avx512_bf16, &kernels_avx512, &kernels_avx2,
#endif
    &kernels_baseline,
#if defined(SIGHTLINE_EMULATED)
    &kernels_avx512_emulated,
#endif
};

inline const Kernels* best_kernels() {
  for (const Kernels* kernels : all_kernels)
    if (runs_here(*kernels)) return kernels;
  return &kernels_baseline;
}

inline std::atomic<const Kernels*> chosen{best_kernels()};

// CPUs whose first cache holds 48 KB fetch into it faster than into the second one: a Zen 5 does, its forerunner with
// 32 KB does not.
inline bool has_roomy_cache() {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  return sysconf(_SC_LEVEL1_DCACHE_SIZE) >= 48 << 10;
#else
  return false;
#endif
}

}  // namespace sightline
