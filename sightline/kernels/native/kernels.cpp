// Everything that one instruction set computes. This file is compiled once for each, with its own flags and
// SIGHTLINE_ISA, its name. All of it has internal linkage and it includes no header of the standard library or of
// torch: an inline function that two such files share would be kept once by the linker, in either's instructions.
#include "backward.h"
#include "window.h"

namespace sightline {
namespace {

void probe(int64_t rounds, float* out) {
  constexpr int kChains = 12;  // more than latency times width of the multiply ports
  V sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = splat((float)i);
  V x = splat(0.999f), y = splat(0.001f);
  for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sums[i] = fma(sums[i], x, y);
  for (int i = 0; i < kChains; ++i) store_some(out, sums[i], 1);
}
}  // namespace

#define JOIN(a, b) a##b
#define NAME(isa) JOIN(kernels_, isa)
#define TEXT_OF(x) #x
#define TEXT(x) TEXT_OF(x)
extern const Kernels NAME(SIGHTLINE_ISA);
const Kernels NAME(SIGHTLINE_ISA) = {
    TEXT(SIGHTLINE_ISA), kRows,          reads_directly, packed_group,     partial_state,  strip_floats,
    scratch_floats,      pack,           attend,         merge,            gather,         window_units,
    window_scratch,      pool_window,    kBackRows,      kBackTile,        plan_backward,  backward_scratch,
    pack_row_block,      backward,       gather_queries, probe,
};
}  // namespace sightline
