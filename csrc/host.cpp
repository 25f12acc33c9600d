// SPDX-License-Identifier: Apache-2.0
// The module `_host`: what the host can do and what was built. Sees no torch, so PyPI's pybind11 can compile it.
#include <pybind11/pybind11.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/capability.h"

namespace py = pybind11;

namespace {

std::string cpu_capability() { return rlhf_fast::name_of(rlhf_fast::capability()); }

std::string best_cpu_capability() { return rlhf_fast::name_of(rlhf_fast::best_capability()); }

// Caps through the environment variable, which `_C` reads at every call: the two binaries share no other state.
void set_cpu_capability(const std::string& name) {
  rlhf_fast::Capability asked;
  if (!rlhf_fast::parse(name.c_str(), &asked)) {
    throw py::value_error("rlhf_fast: CPU capability must be one of default, avx2, avx512, got '" + name + "'");
  }
  if (asked > rlhf_fast::best_capability()) {
    throw py::value_error("rlhf_fast: this host and build have no " + name + ", the best is " + best_cpu_capability());
  }
  setenv("RLHF_FAST_CPU", name.c_str(), 1);
}

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
  m.doc() = "What the host can do and what was built.";
  m.def("cpu_capability", &cpu_capability, "Instruction set the CPU kernels use now: default, avx2 or avx512.");
  m.def("best_cpu_capability", &best_cpu_capability, "The best that this host and build could use.");
  m.def("set_cpu_capability", &set_cpu_capability, py::arg("name"), "Cap it, as RLHF_FAST_CPU does.");
  m.def("build_info", &build_info, "Compiler, instruction sets, CUDA architectures and PyTorch of the build.");
}
