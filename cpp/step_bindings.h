#pragma once

#include <nanobind/nanobind.h>

namespace nb = nanobind;

namespace flatwater {

void bind_step(nb::module_ &m);

}  // namespace flatwater
