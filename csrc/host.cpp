// SPDX-License-Identifier: Apache-2.0
// The module `_host`: what was built. Includes no torch, so PyPI's pybind11 suffices.
#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["compiler"] = RF_COMPILER;
  info["cpu"] = RF_CPU_ISAS;
  info["cuda"] = RF_CUDA_ARCHS;
  info["torch_built_against"] = RF_TORCH_VERSION;
  info["torch_target"] = RF_TORCH_TARGET_NAME;
  return info;
}

}  // namespace

PYBIND11_MODULE(_host, m, py::mod_gil_not_used()) {
  m.doc() = "What was built.";
  m.def("build_info", &build_info, "Compiler, instruction sets, CUDA architectures and PyTorch of the build.");
}
