// What "plain" means, and the way between a Python tensor and torch's stable ABI. torch offers that way to the code that
// its Inductor generates (torch._C._aoti); the dispatcher's, which parses arguments by a schema, takes twenty times as long.
// A question to torch costs 40 to 120 ns here, because what to ask is looked up once and nothing is parsed.
#include "small.h"

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <utility>

namespace py = pybind11;

namespace pygen {
namespace {

// Owned references for as long as the process lives: torch cannot be unloaded.
struct Questions {
  PyTypeObject *tensor, *parameter;
  PyObject *requires_grad, *is_neg, *grad_enabled;
  PyObject *forward_ad, *level;  // a module's dictionary and a name in it
  PyObject* watchers[6];         // functions; each says 0 or False where nobody watches
  PyObject* zero;
  PyObject *to_handle, *from_handle;
};

const Questions* ask = nullptr;  // null in a torch that cannot answer them
bool is_open = true;

py::object owned(PyObject* result) { return py::reinterpret_steal<py::object>(result); }
py::object call(PyObject* function) { return owned(PyObject_CallNoArgs(function)); }
py::object call(PyObject* function, PyObject* x) { return owned(PyObject_CallOneArg(function, x)); }

// A chain of names from `torch` on, such as {"autograd", "forward_ad"}.
PyObject* look_up(std::initializer_list<const char*> names) {
  py::object found = py::module_::import("torch");
  for (const char* name : names) found = found.attr(name);
  return found.release().ptr();
}

Questions look_up_all() {
  Questions all;
  all.tensor = reinterpret_cast<PyTypeObject*>(look_up({"Tensor"}));
  all.parameter = reinterpret_cast<PyTypeObject*>(look_up({"nn", "Parameter"}));
  all.requires_grad = look_up({"Tensor", "requires_grad"});
  if (!Py_TYPE(all.requires_grad)->tp_descr_get) throw py::type_error("torch.Tensor.requires_grad");
  all.is_neg = look_up({"Tensor", "is_neg"});
  all.grad_enabled = look_up({"is_grad_enabled"});
  all.forward_ad = look_up({"autograd", "forward_ad", "__dict__"});
  all.level = py::str("_current_level").release().ptr();
  all.watchers[0] = look_up({"_C", "_is_any_autocast_enabled"});
  all.watchers[1] = look_up({"_C", "_are_functorch_transforms_active"});
  all.watchers[2] = look_up({"_C", "_len_torch_dispatch_stack"});
  all.watchers[3] = look_up({"_C", "_len_torch_function_stack"});
  all.watchers[4] = look_up({"autograd", "_profiler_enabled"});
  all.watchers[5] = look_up({"_C", "_is_tracing"});  // torch.jit.trace
  all.zero = py::int_(0).release().ptr();
  all.to_handle = look_up({"_C", "_aoti", "unsafe_alloc_void_ptr_from_tensor"});
  all.from_handle = look_up({"_C", "_aoti", "alloc_tensor_by_stealing_from_void_ptr"});
  return all;
}

AtenTensorHandle to_handle(const Questions& torch, PyObject* x) {
  const py::object capsule = call(torch.to_handle, x);
  return capsule ? static_cast<AtenTensorHandle>(PyCapsule_GetPointer(capsule.ptr(), nullptr)) : nullptr;
}

PyObject* from_handle(const Questions& torch, AtenTensorHandle handle) {
  const py::object capsule = owned(PyCapsule_New(handle, nullptr, nullptr));
  return capsule ? PyObject_CallOneArg(torch.from_handle, capsule.ptr()) : nullptr;
}

// from_handle has "stealing" in torch's name for it, and leaves the handle to its owner all the same. Should it steal one
// day, its owner must not free it: then one reference is left after it and not two, and the road stays closed.
bool handles_work(const Questions& torch) {
  const py::object x = py::module_::import("torch").attr("empty")(1, py::arg("device") = "cpu");
  const AtenTensorHandle handle = to_handle(torch, x.ptr());
  if (!handle) throw py::error_already_set();
  const py::object same = owned(from_handle(torch, handle));
  if (!same) throw py::error_already_set();
  if (x.attr("_use_count")().cast<int>() != 2) return false;
  const Tensor frees_the_handle(handle);
  return same.is(x) && frees_the_handle.numel() == 1;
}

// Other true and false objects than Python's own, and exceptions, are neither.
bool is_no(const py::object& answer) { return answer.ptr() == Py_False || answer.ptr() == ask->zero; }

bool nobody_watches() {
  for (PyObject* watcher : ask->watchers)
    if (!is_no(call(watcher))) return false;
  PyObject* const level = PyDict_GetItemWithError(ask->forward_ad, ask->level);
  return level && PyLong_AsLong(level) < 0 && !PyErr_Occurred();
}

bool needs_gradient(PyObject* x) {
  const py::object answer =
      owned(Py_TYPE(ask->requires_grad)->tp_descr_get(ask->requires_grad, x, reinterpret_cast<PyObject*>(ask->tensor)));
  return !is_no(answer) && !is_no(call(ask->grad_enabled));
}

// Elements in strided CPU memory, and few of them.
bool is_small(const Tensor& x, int64_t most) {
  int32_t layout;  // Tensor::layout() takes three times as long as this
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(x.get(), &layout));
  return layout == aoti_torch_layout_strided() && x.is_cpu() && x.numel() <= most;
}

// `watched`: whether somebody watches has been asked already.
std::optional<Tensor> find(PyObject* x, int64_t most, bool watched) {
  if (needs_gradient(x)) return {};
  const AtenTensorHandle handle = to_handle(*ask, x);
  if (!handle) return {};
  Tensor found(handle);
  // Big tensors turn back here, after a quarter of a microsecond.
  if (!is_small(found, most) || !(watched || nobody_watches())) return {};
  // The imaginary part of a conjugate is negated only when somebody reads it: not in memory. A tensor of zeros that torch
  // knows to be zeros has no memory, nor has one without elements.
  if (!is_no(call(ask->is_neg, x)) || !found.const_data_ptr()) return {};
  return found;
}

}  // namespace

void prepare_small_road() {
  try {
    static const Questions all = look_up_all();
    if (handles_work(all)) ask = &all;
  } catch (const std::exception&) {
  }
}

bool open_small_road(bool open) { return std::exchange(is_open, open); }

std::optional<Tensor> small_plain_tensor(PyObject* x) {
  // A subclass may mean anything by itself.
  if (!ask || !is_open || Py_TYPE(x) != ask->tensor) return {};
  try {
    auto found = find(x, kSmall, false);
    if (!found) PyErr_Clear();
    return found;
  } catch (const std::exception&) {
    PyErr_Clear();
    return {};
  }
}

std::vector<Tensor> small_plain_tensors(PyObject* const* x, size_t count, int64_t most) {
  std::vector<Tensor> all;
  if (!ask || !is_open) return all;
  try {
    for (size_t i = 0; i < count; ++i) {
      if (Py_TYPE(x[i]) != ask->tensor && Py_TYPE(x[i]) != ask->parameter) return {};
      const auto found = find(x[i], most, i > 0);
      if (!found) {
        PyErr_Clear();
        return {};
      }
      all.push_back(*found);
    }
  } catch (const std::exception&) {
    PyErr_Clear();
    return {};
  }
  return all;
}

PyObject* to_python(const Tensor& y) { return from_handle(*ask, y.get()); }

std::optional<int64_t> plain_int(PyObject* value) {
  int overflow = 0;
  if (!PyLong_CheckExact(value)) return {};
  const int64_t found = PyLong_AsLongLongAndOverflow(value, &overflow);
  return overflow ? std::nullopt : std::optional(found);
}

std::optional<double> plain_float(PyObject* value) {
  return PyFloat_CheckExact(value) ? std::optional(PyFloat_AS_DOUBLE(value)) : std::nullopt;
}

std::optional<bool> plain_bool(PyObject* value) {
  return PyBool_Check(value) ? std::optional(value == Py_True) : std::nullopt;
}

}  // namespace pygen
