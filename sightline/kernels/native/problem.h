// What crosses the border between the common code and the code of one instruction set: plain numbers and pointers.
// Nothing here may be a template or an inline function with a body of weight: both sides compile this file, with
// different flags, and the linker keeps one copy of what they share.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sightline {

enum class Dtype : int32_t { float32, bfloat16, float16 };

constexpr int64_t kTile = 256;        // keys a tile: P of one row group (14 x 256 floats) stays in a 32 KB L1
constexpr int64_t kFoldQueries = 16;  // with at most so many queries, the heads of a group share a row group
constexpr int64_t kNone = -1;         // no limit

// What is fetched early goes into the first cache of this CPU, which has room for it, and not into the second.
extern const bool fetches_near;

// A tensor of (batch heads rows columns), any strides, in elements. No data: there is none.
struct Strided {
  const void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0, column = 0;
};

// One call of attention. Outputs that are not asked for are null.
struct Call {
  Dtype dtype;
  int64_t batch, heads, groups, queries, keys, width, value_width;
  Strided query, key, value;  // columns stand together
  float scale;
  float softcap;           // 0: none
  int64_t before, after;   // kNone: no limit
  int64_t position;        // of the first query, where key 0 is 0: keys - queries, but in a window
  const int64_t* lengths;  // (batch)
  const int64_t* spans;    // (batch queries 2): from the first key of a query's segment to behind its last
  const int64_t* segments; // (batch, queries and keys): their numbers, where other segments stand within a span
  Strided allowed;         // bytes, 0 or 1
  Strided bias;            // float
  const float* slopes;     // (heads)
  const float* sinks;      // (heads)
  uint64_t seed;           // of dropout
  uint32_t dropped;        // a weight whose hash is below this is dropped; 0: none is
  float kept;              // what the others are multiplied with

  Strided output;    // (batch heads queries value_width), columns stand together
  float* logsumexp;  // (batch heads queries), as are the next three
  float* entropy;
  float* distance;
  float* sink;
  float* top_weights;  // (batch heads queries top)
  int64_t* top_keys;
  float* received;  // (batch heads keys)
  float* map_sum;   // (batch heads query_blocks key_blocks)
  float* map_max;
  int64_t top, map_block, sink_keys;

  // Backward only; `output` is then an input.
  Strided grad_output;
  float* row_sums;                           // (batch heads queries): grad_output . output
  Strided grad_query, grad_key, grad_value;  // columns stand together
  Strided grad_bias;                         // float, of the bias's shape, added to; no data: not asked for
};

// How a forward call is cut into units of work that need nothing of one another. It never changes a bit of the
// output: a row's arithmetic knows only the tiles of kTile keys and, for few rows, the chunks of keys.
struct Plan {
  int64_t fold;         // heads whose queries lie in one row of rows: heads / groups for few queries, else 1
  int64_t block_rows;   // rows at most in a block: one sweep over the keys
  int64_t blocks;       // blocks of a (folded) head
  int64_t chunk_tiles;  // key tiles of a chunk; chunks > 1 only where a head has few rows
  int64_t chunks;
  bool seeing;      // facts are asked for
  bool strip_kept;  // received or map: the weights of a block are kept until their sum is known
  // With strip_kept a unit owns whole bands: every row of the map, and one partial sum of `received`.
  int64_t band_rows, bands, shares;
  float* packed;         // keys and values of all groups in the kernel's layout, or null: tile by tile
  int64_t packed_group;  // floats a group
  float* partial;        // states of chunks
  int64_t partial_state; // floats a state
  float* strips;         // strips of chunks: (unit, tile, row group, row, key)
  float* shared_received; // (batch heads shares keys)
};

// How a backward call is cut. The number of shares depends on the number of keys alone, for it orders sums.
struct BackwardPlan {
  int64_t blocks;       // of rows, a head
  int64_t shares;       // of a group's key tiles: tile i belongs to share i % shares
  int64_t first_head;   // counted through all batches, of those that `packed` and `partial` hold
  float* packed;        // queries and gradients of these heads in the kernel's layouts
  int64_t packed_block; // floats a block of rows
  float* partial;       // (heads shares queries padded width): what each share gives to the queries' gradient
  int64_t partial_head; // floats a head and share
  float* slopes;        // (batch heads shares): parts of the slopes' gradient; null: not asked for
};

// One linear map of few rows: out[row] = weight x[row] + bias.
struct Projection {
  const float* x;  // (rows depth)
  int64_t rows, depth;
  const float* weight;  // (columns depth)
  const float* bias;    // (columns), or null
  float* out;           // (rows columns), out_row from one row to the next
  int64_t columns, out_row;
};

// An activation: x times a step from 0 to 1.
enum class Curve : int32_t { silu, gelu, gelu_tanh };

// Which numbers of (rows width) are dropped: those whose hash is below `dropped`; the others are multiplied.
struct Dropping {
  uint64_t seed;
  uint32_t dropped;
  float kept;
};

// Numbers between products: float32, or bfloat16 where the products are.
struct Numbers {
  void* data;
  Dtype dtype;
  Numbers at(int64_t index) const {
    return {(char*)data + index * (dtype == Dtype::float32 ? 4 : 2), dtype};
  }
};

// A norm over the width of a row; `centered`: the row's mean is subtracted first.
struct Norm {
  const float *weight, *bias;  // (width), or null
  float epsilon;
  bool centered;
  int64_t width;
};

// Heads that lie side by side in a row, and the norm over the width of each, if there is one.
struct HeadRow {
  int64_t count, width;
  const float* norm;  // (width), or null
  float epsilon;
};

// The work of one instruction set. `unit` counts from 0; `scratch` is 64-byte aligned and private to the worker.
struct Kernels {
  const char* name;
  int64_t rows;  // of a row group
  bool (*reads_directly)(const Call&);  // keys and values are read where they lie, never packed
  int64_t (*packed_group)(const Call&);
  int64_t (*partial_state)(const Call&, const Plan&);
  int64_t (*strip_floats)(const Call&, const Plan&, int64_t tiles);
  int64_t (*scratch_floats)(const Call&, const Plan&);
  void (*pack)(const Call&, const Plan&, int64_t unit);                      // (batch, group, tile)
  void (*attend)(const Call&, const Plan&, int64_t unit, float* scratch);    // (batch, folded head, block or chunk)
  void (*merge)(const Call&, const Plan&, int64_t unit, float* scratch);     // (batch, folded head)
  void (*gather)(const Call&, const Plan&, int64_t unit);                    // (batch, head): received
  int64_t (*window_units)(const Call&);
  int64_t (*window_scratch)(const Call&);
  void (*pool_window)(const Call&, int64_t unit, float* scratch);
  int64_t backward_rows;   // of a block
  int64_t backward_tile;   // keys
  void (*plan_backward)(const Call&, BackwardPlan&);  // fills packed_block and partial_head
  int64_t (*backward_scratch)(const Call&);
  void (*pack_rows)(const Call&, const BackwardPlan&, int64_t unit);               // (batch, head, block)
  void (*backward)(const Call&, const BackwardPlan&, int64_t unit, float* scratch);  // (batch, group, share)
  void (*gather_queries)(const Call&, const BackwardPlan&, int64_t unit);          // (batch, head, block)
  void (*project)(const Projection&, int64_t first, int64_t last);  // columns
  void (*norm_row)(const float* x, const float* weight, float epsilon, int64_t width, float* out);
  void (*turn_row)(float* x, const float* cosine, const float* sine, int64_t width);
  void (*activate)(const float* gate, float* up, int64_t count);
  void (*bend)(Curve, Numbers x, Numbers up, int64_t count, Numbers out);
  void (*bend_back)(Curve, Numbers grad, Numbers x, Numbers up, int64_t count, Numbers to_x, Numbers to_up);
  void (*drop_rows)(const Dropping&, Numbers x, int64_t first, int64_t last, int64_t width, Numbers out);
  void (*join)(const float* x, Numbers added, int64_t count, float* out);  // `out` may be x
  void (*convert)(Numbers from, int64_t count, Numbers to);
  void (*norm_rows)(const Norm&, const float* x, int64_t rows, Numbers out);
  // The last two are added to.
  void (*norm_rows_back)(const Norm&, Numbers grad, const float* x, const float* beside, int64_t rows, float* out,
                         float* to_weight, float* to_bias);
  void (*place_heads)(const HeadRow&, Numbers x, const float* cosine, const float* sine, Numbers out);
  void (*place_heads_back)(const HeadRow&, Numbers grad, Numbers x, const float* cosine, const float* sine, Numbers out,
                           float* to_norm, float* scratch);
  // Independent multiply-adds and nothing else, for the benchmark's ceilings: of floats, or by the bf16 dot product (0
  // without one). How many there were.
  int64_t (*probe)(int64_t rounds, bool dot, float* out);
};

}  // namespace sightline
