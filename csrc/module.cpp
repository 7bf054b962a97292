// pygen._C: what the build is, and the CPU's capability. The operators themselves register with torch in library.cpp
// and csrc/<op>.cpp when this module is loaded.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "build_config.h"
#include "capability.h"
#include "small.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["compiler"] = PYGEN_COMPILER;
  info["torch"] = PYGEN_BUILD_TORCH;
  info["torch_abi"] = "2.10 stable";
  info["cpu_levels"] = PYGEN_CPU_LEVELS;
  info["cuda"] = PYGEN_CUDA;
  info["cuda_archs"] = PYGEN_CUDA_ARCHS;
  info["sanitizers"] = PYGEN_SANITIZERS;
  return info;
}

// pybind11's argument parsing would take as long as the work.
PyCFunction small_function(PyObject* (*f)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f));
}

PyMethodDef small_functions[] = {
    {"cumax_small", small_function(&pygen::cumax_small), METH_FASTCALL,
     "cumax(x, dim, complement) of a small plain CPU tensor; None if x is anything else."},
    {"power_iteration_small", small_function(&pygen::power_iteration_small), METH_FASTCALL,
     "power_iteration of lists of plain CPU tensors that need no gradient; None if there is anything else."},
    {"spectral_weights_small", small_function(&pygen::spectral_weights_small), METH_FASTCALL,
     "Weights / sigma and what their gradients need, of lists of plain CPU tensors (weights, us, vs, dims), "
     "n_iterations "
     "and eps; or None."},
    {"spectral_weights_backward_small", small_function(&pygen::spectral_weights_backward_small), METH_FASTCALL,
     "The weights' gradients from lists (grads, weights, saved, dims) and eps, or None."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of pygen.";
  m.def("build_info", &build_info, "Compiler, torch version, instruction-set levels and CUDA of this build.");
  m.def(
      "cpu_capability", [] { return pygen::capability_name(pygen::capability()); },
      "The level that the CPU kernels run at.");
  m.def("cpu_capabilities", &pygen::capability_names, "The levels to be had on this machine, lowest first.");
  pygen::prepare_small_road();
  m.def("open_small_road", &pygen::open_small_road, py::arg("open"),
        "Opens or closes it; returns whether it was open.");
  if (PyModule_AddFunctions(m.ptr(), small_functions) < 0) throw py::error_already_set();
  m.def("set_cpu_capability", &pygen::set_capability, py::arg("level"));
}
