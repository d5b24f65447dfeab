#include "sparse/stream_cuda.cuh"

namespace blokern {
namespace {

int64_t pieces_of(const MaskWords& mask) { return mask.rows * row_words(mask.cols) * (64 / kPiece); }
int64_t parts_of(const MaskWords& mask, int64_t block) { return (mask.cols + block - 1) / block * mask.rows; }

}  // namespace

void pack_mask(const bool* mask, const MaskWords& to, const CudaCall& call) {
  launch_each(pack_pieces, pieces_of(to), 1, call, mask, to);
}

void unpack_mask(const MaskWords& from, bool* mask, const CudaCall& call) {
  launch_each(unpack_pieces, pieces_of(from), 1, call, from, mask);
}

void transpose_mask(const MaskWords& from, const MaskWords& to, const CudaCall& call) {
  launch_each(transpose_halves, 4 * row_words(from.cols) * row_words(from.rows), kWarpSize, call, from, to);
}

void count_words(const uint64_t* words, int64_t size, int64_t* count, const CudaCall& call) {
  launch_each(count_bits, (size + 1) / 2, 1, call, words, size, reinterpret_cast<unsigned long long*>(count));
}

void count_stream(const MaskWords& mask, int64_t block, int32_t* start, const CudaCall& call) {
  launch_each(count_parts, parts_of(mask, block), kWarpSize, call, mask, block, start);
}

void fill_stream(const MaskWords& mask, int64_t block, const int32_t* start, int32_t* column,
                 const CudaCall& call) {
  launch_each(fill_parts, parts_of(mask, block), kWarpSize, call, mask, block, start, column);
}

}  // namespace blokern
