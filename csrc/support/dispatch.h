// From a tensor's dtype to a kernel's template arguments. The checks have already refused every other dtype.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

// A kernel of this name, whatever its types and the device's own arguments.
#define BLOKERN_KERNEL(name) [](const auto&... arguments) { return name(arguments...); }

namespace blokern {

template <class F>
void dispatch_image(at::ScalarType image, F&& f) {
  switch (image) {
    case at::kDouble:
      return f.template operator()<double>();
    case at::kFloat:
      return f.template operator()<float>();
    case at::kBFloat16:
      return f.template operator()<at::BFloat16>();
    case at::kHalf:
      return f.template operator()<at::Half>();
    default:
      TORCH_INTERNAL_ASSERT(false, "unchecked dtype ", image);
  }
}

template <class F>
void dispatch_image_and_grad(at::ScalarType image, at::ScalarType grad, F&& f) {
  if (image == at::kFloat && grad == at::kBFloat16) return f.template operator()<float, at::BFloat16>();
  if (image == at::kFloat && grad == at::kHalf) return f.template operator()<float, at::Half>();
  dispatch_image(image, [&]<class T>() { f.template operator()<T, T>(); });
}

}  // namespace blokern
