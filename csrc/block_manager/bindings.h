#pragma once

#include <pybind11/pybind11.h>

namespace pumice::kv {

// Adds BlockManager and its errors to the module.
void bind(pybind11::module_& m);

}  // namespace pumice::kv
