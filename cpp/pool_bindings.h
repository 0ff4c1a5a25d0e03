#pragma once

#include <nanobind/nanobind.h>

namespace nb = nanobind;

namespace flatwater {

void bind_pool(nb::module_ &m);

}  // namespace flatwater
