// SPDX-License-Identifier: Apache-2.0
// The module `_C`: empty. Importing it loads the shared object, whose static initialisers register the kernels.
// Limited API (abi3) and PyTorch's stable ABI: one binary serves Python 3.11 and later, and PyTorch 2.10 and later. A
// free-threaded Python has no limited API and gets a binary of its own.
#include <Python.h>

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  PyObject* module = PyModule_Create(&definition);
#ifdef Py_GIL_DISABLED
  // Loading it must not bring the GIL back: the kernels touch no Python object and keep no state between calls.
  if (module != nullptr) PyUnstable_Module_SetGIL(module, Py_MOD_GIL_NOT_USED);
#endif
  return module;
}
