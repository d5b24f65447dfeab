// The attack ops' registrations, for a Device of host.h.
#pragma once

#include <torch/library.h>

#include "attack/apgd_step_host.h"
#include "attack/fast_bat_step_host.h"
#include "attack/pgd_step_host.h"
#include "attack/project_host.h"
#include "attack/random_start_host.h"

namespace blokern::attack_ops {

template <class Device>
void implement(torch::Library& m) {
  m.impl("pgd_step", &pgd_step<Device>);
  m.impl("pgd_step_", &pgd_step_<Device>);
  m.impl("project", &project<Device>);
  m.impl("project_", &project_<Device>);
  m.impl("apgd_step_", &apgd_step_<Device>);
  m.impl("random_start", &random_start<Device>);
  m.impl("fast_bat_step", &fast_bat_step<Device>);
}

}  // namespace blokern::attack_ops
