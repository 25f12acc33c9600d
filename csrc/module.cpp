// SPDX-License-Identifier: Apache-2.0
// The module `_C`: empty. Importing it loads the shared object, whose static initialisers register the kernels.
// Limited API (abi3) and PyTorch's stable ABI: one binary serves Python 3.11 and later, and PyTorch 2.10 and later.
#include <Python.h>

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}
