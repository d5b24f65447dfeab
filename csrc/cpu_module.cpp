// A Python module that only carries one instruction set's kernels: loading it registers them.
#include <Python.h>

#define MODULE_INIT_(name) PyInit_##name
#define MODULE_INIT(name) MODULE_INIT_(name)
#define MODULE_NAME_(name) #name
#define MODULE_NAME(name) MODULE_NAME_(name)

PyMODINIT_FUNC MODULE_INIT(TORCH_EXTENSION_NAME)(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT,
                               MODULE_NAME(TORCH_EXTENSION_NAME),
                               nullptr,
                               -1,
                               nullptr,
                               nullptr,
                               nullptr,
                               nullptr,
                               nullptr};
  return PyModule_Create(&module);
}
