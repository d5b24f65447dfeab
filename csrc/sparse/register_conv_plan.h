// A convolution's plan of walks as it comes from blokern/ops/convolution.py, and the checks of all in it that
// a kernel would follow out of bounds.
#pragma once

#include <algorithm>
#include <array>

#include "sparse/conv.h"
#include "sparse/register_conv.h"

namespace blokern::conv_ops {

// Positions in a run of pixels: ops/convolution.py plans tiles of this width.
constexpr int64_t kRunPositions = 16;

// Output positions, as they are walked in a tile.
struct Walk {
  int64_t height, width, step;

  // The pixels from the first position to the last that one tile serves.
  int64_t last(const Tiling& t) const {
    return (std::min(height, t.height) - 1) * t.row_step * t.width + (width - 1) * step;
  }
};

// Of a convolution, or of its gradient by the input, which is one too.
struct Geometry : Sizes {
  Tiling tiling;         // of the input
  at::IntArrayRef rest;  // kPiece numbers for each piece of the output

  // The output positions with a stream of their own: all, or those with equal remainders by the stride.
  struct Positions {
    int64_t block, origin_h, origin_w, stride_h, stride_w, height, width, step;
  };
  static constexpr size_t kHead = 10, kPiece = 8;

  explicit Geometry(at::IntArrayRef g) : Sizes(g) {
    TORCH_CHECK_VALUE(g.size() >= kHead + kPiece && (g.size() - kHead) % kPiece == 0, "geometry must have ",
                      kHead, " numbers and ", kPiece, " for each piece, got ", g.size());
    tiling = {g[3], g[4], g[5], g[6], g[7], g[8], g[9]};
    rest = g.slice(kHead);
    checked_product({tiling.channels, tiling.rows, tiling.width}, "the tile");
    TORCH_CHECK_VALUE(
        std::min({tiling.width, tiling.height, tiling.row_step}) > 0 && tiling.left <= tiling.width,
        "geometry has an empty tile: ", g);
  }

  size_t pieces() const { return rest.size() / kPiece; }
  Positions piece(size_t i) const {
    const int64_t* const p = rest.data() + kPiece * i;
    return {p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]};
  }

  // All output positions, of a plan of one piece.
  Walk walk(bool pointwise) const { return {height, pointwise ? kRunPositions : width, piece(0).step}; }

  void check_pieces() const {
    for (size_t i = 0; i < pieces(); ++i) {
      const Positions p = piece(i);
      TORCH_CHECK_VALUE(std::min(p.height, p.width) > 0 && p.height <= piece(0).height &&
                            p.origin_h + (p.height - 1) * p.stride_h < height &&
                            p.origin_w + (p.width - 1) * p.stride_w < width,
                        "geometry has positions beyond the output [", height, ", ", width, "]: ", rest);
    }
  }

  // Of a product with every pixel of images of that size, the only plan there is.
  void check_runs(int64_t image_height, int64_t image_width) const {
    const Tiling& t = tiling;
    const std::array<int64_t, 6> tile{t.top, t.left, t.rows, t.width, t.height, t.row_step},
        run{0, 0, 1, kRunPositions, 1, 1};
    const std::array<int64_t, 7> positions{0, 0, 1, 1, 1, kRunPositions, 1};
    TORCH_CHECK_VALUE(
        tile == run && pieces() == 1 && std::equal(positions.begin(), positions.end(), rest.begin() + 1) &&
            height == image_height && width == image_width,
        "geometry is not that of a 1 x 1 convolution of [", image_height, ", ", image_width, "] pixels");
  }
};

inline bool is_pointwise(at::IntArrayRef weight, at::IntArrayRef numbers) {
  const std::array<int64_t, 4> unit{1, 1, 0, 0};
  return weight[2] == 1 && weight[3] == 1 && std::equal(unit.begin(), unit.end(), numbers.begin());
}

}  // namespace blokern::conv_ops
