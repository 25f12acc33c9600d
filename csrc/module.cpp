// SPDX-License-Identifier: Apache-2.0
// The module `_C`. Importing it loads the shared object, whose static initialisers register the kernels.
// Limited API (abi3) and PyTorch's stable ABI: one binary works with Python 3.11 and later, and PyTorch 2.10 and later.
// Free-threaded Python has no limited API and needs a separate binary.
#include <Python.h>

#include "cpu/capability.h"

static PyObject* cpu_capability(PyObject* /*module*/, PyObject* /*unused*/) {
  return PyUnicode_FromString(rlhf_fast::name_of(rlhf_fast::capability()));
}

static PyObject* cap_cpu(PyObject* /*module*/, PyObject* argument) {
  const char* name = PyUnicode_AsUTF8AndSize(argument, nullptr);
  if (name == nullptr) return nullptr;
  rlhf_fast::Capability limit;
  if (!rlhf_fast::parse(name, &limit)) {
    return PyErr_Format(PyExc_ValueError, "rlhf_fast: it must be one of default, avx2, avx512, got '%s'", name);
  }
  rlhf_fast::cap(limit);
  Py_RETURN_NONE;
}

#ifdef RF_HAS_CUDA
#include "cuda/probe.h"

static PyObject* why_not_cuda(PyObject* /*module*/, PyObject* device) {
  const long index = PyLong_AsLong(device);
  if (index == -1 && PyErr_Occurred()) return nullptr;
  return PyUnicode_FromString(rlhf_fast::why_not_cuda(static_cast<int>(index)).c_str());
}
#endif

PyMODINIT_FUNC PyInit__C(void) {
  static PyMethodDef methods[] = {
      {"cpu_capability", cpu_capability, METH_NOARGS, "Instruction set of the CPU kernels: default, avx2 or avx512."},
      {"cap_cpu", cap_cpu, METH_O, "Limit it from now on to this name, or to the host's best if that is less."},
#ifdef RF_HAS_CUDA
      {"why_not_cuda", why_not_cuda, METH_O, "Why the CUDA kernels do not run on the device of this index, or ''."},
#endif
      {nullptr, nullptr, 0, nullptr},
  };
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
#ifdef Py_GIL_DISABLED
  // Loading this must not enable the GIL: the kernels use no Python objects, and state kept between calls is atomic.
  if (module != nullptr) PyUnstable_Module_SetGIL(module, Py_MOD_GIL_NOT_USED);
#endif
  return module;
}
