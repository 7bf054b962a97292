// What "plain" means, asked of torch's Python objects: torch's stable ABI has no way from a Python tensor to its memory
// but the dispatcher. A question costs 20 to 90 ns here, because what to ask is looked up once and nothing is parsed.
#include "small.h"

#include <pybind11/pybind11.h>

#include <initializer_list>

namespace py = pybind11;

namespace pygen {
namespace {

// Owned references for as long as the process lives: torch cannot be unloaded.
struct Torch {
  PyTypeObject* tensor;
  PyObject *is_cpu, *shape, *dtype, *requires_grad;  // descriptors of attributes
  PyObject *is_contiguous, *is_neg, *data_ptr;       // methods
  PyObject *empty_like, *grad_enabled;
  PyObject *forward_ad, *level;
  PyObject* watchers[6];  // functions; each says 0 or False where nobody watches
  PyObject* types[4];     // torch.dtype, in the order of SmallType
};

const Torch* torch = nullptr;

// A chain of names from `torch` on, such as {"autograd", "forward_ad"}.
PyObject* look_up(std::initializer_list<const char*> names) {
  py::object found = py::module_::import("torch");
  for (const char* name : names) found = found.attr(name);
  return found.release().ptr();
}

PyObject* descriptor(const char* name) {
  PyObject* found = look_up({"Tensor", name});
  if (!Py_TYPE(found)->tp_descr_get) throw py::type_error(name);
  return found;
}

Torch look_up_all() {
  Torch all;
  all.tensor = reinterpret_cast<PyTypeObject*>(look_up({"Tensor"}));
  all.is_cpu = descriptor("is_cpu");
  all.shape = descriptor("shape");
  all.dtype = descriptor("dtype");
  all.requires_grad = descriptor("requires_grad");
  all.is_contiguous = look_up({"Tensor", "is_contiguous"});
  all.is_neg = look_up({"Tensor", "is_neg"});
  all.data_ptr = look_up({"Tensor", "data_ptr"});
  all.empty_like = look_up({"empty_like"});
  all.grad_enabled = look_up({"is_grad_enabled"});
  all.forward_ad = look_up({"autograd", "forward_ad"});
  all.level = py::str("_current_level").release().ptr();
  all.watchers[0] = look_up({"_C", "_is_any_autocast_enabled"});
  all.watchers[1] = look_up({"_C", "_are_functorch_transforms_active"});
  all.watchers[2] = look_up({"_C", "_len_torch_dispatch_stack"});
  all.watchers[3] = look_up({"_C", "_len_torch_function_stack"});
  all.watchers[4] = look_up({"autograd", "_profiler_enabled"});
  // torch.jit.trace and the exporters on it; they would record empty_like and miss the kernel.
  all.watchers[5] = look_up({"_C", "_is_tracing"});
  all.types[static_cast<int>(SmallType::kFloat32)] = look_up({"float32"});
  all.types[static_cast<int>(SmallType::kFloat64)] = look_up({"float64"});
  all.types[static_cast<int>(SmallType::kBFloat16)] = look_up({"bfloat16"});
  all.types[static_cast<int>(SmallType::kFloat16)] = look_up({"float16"});
  return all;
}

// Each returns a new reference, or null and a Python exception.
py::object get(PyObject* descriptor, PyObject* x) {
  return py::reinterpret_steal<py::object>(
      Py_TYPE(descriptor)->tp_descr_get(descriptor, x, reinterpret_cast<PyObject*>(Py_TYPE(x))));
}
py::object call(PyObject* function) { return py::reinterpret_steal<py::object>(PyObject_CallNoArgs(function)); }
py::object call(PyObject* function, PyObject* x) {
  return py::reinterpret_steal<py::object>(PyObject_CallOneArg(function, x));
}

// An exception is neither a yes nor a no.
bool is_yes(const py::object& answer) { return answer && PyObject_IsTrue(answer.ptr()) == 1; }
bool is_no(const py::object& answer) { return answer && PyObject_IsTrue(answer.ptr()) == 0; }

bool nobody_watches() {
  for (PyObject* watcher : torch->watchers)
    if (!is_no(call(watcher))) return false;
  const auto level = py::reinterpret_steal<py::object>(PyObject_GetAttr(torch->forward_ad, torch->level));
  return level && PyLong_AsLong(level.ptr()) < 0 && !PyErr_Occurred();
}

// The shape alone says how many elements there are; a big tensor is turned away here, after its first two questions.
bool read_shape(PyObject* x, int64_t limit, SmallTensor& found) {
  const py::object shape = get(torch->shape, x);
  if (!shape || !PyTuple_Check(shape.ptr())) return false;
  found.rank = PyTuple_GET_SIZE(shape.ptr());
  found.elements = 1;
  found.length = 0;
  for (int64_t i = 0; i < found.rank; ++i) {
    found.length = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), i));
    if (found.length <= 0 || found.length > limit) return false;
    found.elements *= found.length;
    if (found.elements > limit) return false;
  }
  return found.rank > 0;
}

bool read_type(PyObject* x, SmallTensor& found) {
  const py::object dtype = get(torch->dtype, x);
  for (int i = 0; i < 4; ++i) {
    if (dtype.ptr() == torch->types[i]) {
      found.type = static_cast<SmallType>(i);
      return true;
    }
  }
  return false;
}

void* address(PyObject* x) {
  const py::object data = call(torch->data_ptr, x);
  return data ? PyLong_AsVoidPtr(data.ptr()) : nullptr;
}

bool is_plain(PyObject* x, int64_t limit, SmallTensor& found) {
  if (!is_yes(get(torch->is_cpu, x)) || !read_shape(x, limit, found) || !read_type(x, found)) return false;
  if (!is_no(get(torch->requires_grad, x)) && !is_no(call(torch->grad_enabled))) return false;
  if (!nobody_watches() || !is_yes(call(torch->is_contiguous, x)) || !is_no(call(torch->is_neg, x))) return false;
  // No question about layouts and wrappers: what is sparse, opaque, lazy or wraps another tensor has no memory, and here
  // its data_ptr() is 0 or raises. A nested tensor raised when asked for its shape.
  found.data = address(x);
  return found.data;
}

}  // namespace

void open_small_road() {
  try {
    static const Torch all = look_up_all();
    torch = &all;
  } catch (const py::error_already_set&) {
  } catch (const py::builtin_exception&) {
  }
}

bool plain_small_cpu_tensor(PyObject* x, int64_t limit, SmallTensor& found) {
  // A subclass may mean anything by itself.
  if (!torch || Py_TYPE(x) != torch->tensor) return false;
  if (is_plain(x, limit, found)) return true;
  PyErr_Clear();
  return false;
}

PyObject* new_plain_like(PyObject* x, void*& data) {
  py::object y = call(torch->empty_like, x);
  if (!y) return nullptr;
  data = address(y.ptr());
  return PyErr_Occurred() ? nullptr : y.release().ptr();
}

}  // namespace pygen
