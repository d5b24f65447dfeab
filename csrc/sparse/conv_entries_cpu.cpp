#include <algorithm>
#include <bit>
#include <vector>

#include "sparse/conv_entries.h"

namespace blokern {
namespace {

// body(part, source, offset) for the entries of the mask's rows or channels [begin, end); those of one part,
// a row in a block, come in the stream's order.
template <class Body>
void for_each_entry(const MaskWords& mask, const ConvEntries& e, int64_t begin, int64_t end, Body&& body) {
  const int64_t filters = mask.rows / e.groups, rows = stream_rows(mask, e);
  const int64_t first_row = e.transposed ? 0 : begin, last_row = e.transposed ? mask.rows : end;
  const int64_t first = e.transposed ? begin * e.taps : 0, last = e.transposed ? end * e.taps : mask.cols;
  if (first == last) return;
  std::vector<int64_t> channel(last - first), tap(last - first);
  for (int64_t c = first; c < last; ++c) {
    channel[c - first] = c / e.taps;
    tap[c - first] = c % e.taps;
  }
  for (int64_t r = first_row; r < last_row; ++r) {
    const uint64_t* const words = mask.words + r * row_words(mask.cols);
    const int64_t group = r / filters, filter = r % filters;
    for (int64_t w = first / 64; w <= (last - 1) / 64; ++w) {
      uint64_t word = words[w];
      if (64 * w < first) word &= ~uint64_t(0) << (first - 64 * w);
      if (64 * (w + 1) > last) word &= ~uint64_t(0) >> (64 * (w + 1) - last);
      for (; word != 0; word &= word - 1) {
        const int64_t column = 64 * w + std::countr_zero(word), c = channel[column - first],
                      t = tap[column - first], place = e.place[t];
        if (place < 0) continue;
        const int64_t row = e.transposed ? group * e.own + c : r;
        const int64_t at = e.transposed ? filter * e.taps + t : column;
        const int64_t plane = e.transposed ? r : group * e.own + c;
        body(at / e.block * rows + row, static_cast<int32_t>(r * mask.cols + column),
             static_cast<int32_t>(plane * e.plane + place));
      }
    }
  }
}

}  // namespace

int64_t stream_rows(const MaskWords& mask, const ConvEntries& e) {
  return e.transposed ? e.groups * e.own : mask.rows;
}

int64_t stream_cols(const MaskWords& mask, const ConvEntries& e) {
  return e.transposed ? mask.rows / e.groups * e.taps : mask.cols;
}

void count_entries(const MaskWords& mask, const ConvEntries& entries, int32_t* start, int64_t begin,
                   int64_t end) {
  for_each_entry(mask, entries, begin, end, [&](int64_t part, int32_t, int32_t) { ++start[part + 1]; });
}

void fill_entries(const MaskWords& mask, const ConvEntries& entries, const int32_t* start, int32_t* source,
                  int32_t* offset, int64_t begin, int64_t end) {
  // Parts of other threads lie in between: only those of [begin, end) are used.
  const int64_t blocks = (stream_cols(mask, entries) + entries.block - 1) / entries.block;
  std::vector<int32_t> next(start, start + blocks * stream_rows(mask, entries));
  for_each_entry(mask, entries, begin, end, [&](int64_t part, int32_t from, int32_t to) {
    const int32_t i = next[part]++;
    source[i] = from;
    offset[i] = to;
  });
}

}  // namespace blokern
