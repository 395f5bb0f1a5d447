// Everything that one instruction set computes. This file is compiled once for each, with its own flags and
// SIGHTLINE_ISA, its name. All of it has internal linkage and it includes no header of the standard library or of
// torch: an inline function that two such files share would be kept once by the linker, in either's instructions.
#include "backward.h"
#include "forward.h"
#include "passes.h"
#include "rows.h"
#include "window.h"

namespace sightline {
namespace {

constexpr int kProbeChains = 12;  // more than latency times width of the multiply ports

template <typename Factor>
void multiply_and_add(int64_t rounds, Factor x, Factor y, float* out) {
  V sums[kProbeChains];
#pragma GCC unroll 12
  for (int i = 0; i < kProbeChains; ++i) sums[i] = splat((float)i);
  for (int64_t round = 0; round < rounds; ++round)
#pragma GCC unroll 12
    for (int i = 0; i < kProbeChains; ++i) sums[i] = fma(x, y, sums[i]);
#pragma GCC unroll 12
  for (int i = 0; i < kProbeChains; ++i) store_some(out, sums[i], 1);
}

int64_t probe(int64_t rounds, bool dot, float* out) {
  int64_t numbers = rounds * kProbeChains * kLanes;
#if defined(SIGHTLINE_DOT)
  if (dot) {
    multiply_and_add(rounds, splat((Pair)0x3f803f80), splat((Pair)0x3c003c00), out);
    return 2 * numbers;
  }
#endif
  if (dot) return 0;
  multiply_and_add(rounds, splat(0.999f), splat(0.001f), out);
  return numbers;
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
    pack_row_block,      backward,       gather_queries, project,          norm_row,
    turn_row,            activate,       bend,           bend_back,        drop_rows,      join,
    convert,             norm_rows,      norm_rows_back, place_heads,      place_heads_back, probe,
};
}  // namespace sightline
