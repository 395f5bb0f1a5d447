// Segments at the border: the numbers of queries and keys become spans of keys, one a query.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "tensors.h"

namespace sightline {

// `segments` is (batch, queries and keys): the number of each query, then of each key. Where the keys of a segment
// stand together, as those of packed texts do, its span is all that the kernel needs. The spans belong to the caller.
inline std::vector<int64_t> find_segments(Call& call, const Maybe& segments) {
  if (!segments) return {};
  STD_TORCH_CHECK(segments->scalar_type() == ScalarType::Long && segments->is_contiguous() && segments->dim() == 2 &&
                      segments->size(0) == call.batch && segments->size(1) == call.queries + call.keys,
                  "sightline: segments must be int64 (batch, queries and keys)");
  std::vector<int64_t> spans((size_t)(2 * call.batch * call.queries + 1));
  std::vector<std::pair<int64_t, int64_t>> places((size_t)call.keys);  // number, key
  const int64_t* numbers = (const int64_t*)segments->data_ptr();
  for (int64_t batch = 0; batch < call.batch; ++batch) {
    const int64_t *own = numbers + batch * (call.queries + call.keys), *theirs = own + call.queries;
    for (int64_t k = 0; k < call.keys; ++k) places[(size_t)k] = {theirs[k], k};
    if (!std::is_sorted(places.begin(), places.end())) std::sort(places.begin(), places.end());
    int64_t* span = spans.data() + 2 * batch * call.queries;
    for (int64_t q = 0; q < call.queries; ++q, span += 2) {
      if (q > 0 && own[q] == own[q - 1]) {
        span[0] = span[-2], span[1] = span[-1];
        continue;
      }
      auto first = std::lower_bound(places.begin(), places.end(), std::pair{own[q], int64_t{0}});
      auto last = std::upper_bound(first, places.end(), std::pair{own[q], call.keys});
      if (first == last) continue;
      span[0] = first->second, span[1] = (last - 1)->second + 1;
      if (span[1] - span[0] > last - first) call.segments = numbers;
    }
  }
  call.spans = spans.data();
  return spans;
}

}  // namespace sightline
