// Zeros where a mask is 0: written only where something else lies there, so that memory which is clean
// already, shared or mapped, is read alone.
#pragma once

#include <cstdint>

#include "sparse/stream.h"

namespace blokern {

// Rows [begin, end) of values [rows, cols], contiguous. U is an unsigned integer of a value's size.
template <class U>
void clear_masked(const MaskWords& mask, U* values, int64_t begin, int64_t end);

}  // namespace blokern
