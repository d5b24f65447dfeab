// The element types every kernel is instantiated for, on each device.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#define BLOKERN_FOR_IMAGE(DO) DO(double) DO(float) DO(c10::BFloat16) DO(c10::Half)

// Images and their gradients: of one type, or float32 images with the half gradients that autocast leaves.
#define BLOKERN_FOR_IMAGE_AND_GRAD(DO) \
  DO(double, double)                   \
  DO(float, float)                     \
  DO(c10::BFloat16, c10::BFloat16) DO(c10::Half, c10::Half) DO(float, c10::BFloat16) DO(float, c10::Half)
