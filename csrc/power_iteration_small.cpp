// The short road from Python to power iteration and to the weights of layers (small.h), for tensors of any size.
#include "power_iteration.h"
#include "small.h"

namespace pygen {
namespace {

// Up to here, some tens of microseconds of work, Python's lock is kept.
constexpr int64_t kBriefly = int64_t{1} << 16;

// f(), meanwhile without Python's lock where that takes long.
template <typename F>
void without_lock(int64_t elements, const F& f) {
  PyThreadState* const state = elements > kBriefly ? PyEval_SaveThread() : nullptr;
  try {
    f();
  } catch (...) {
    if (state) PyEval_RestoreThread(state);
    throw;
  }
  if (state) PyEval_RestoreThread(state);
}

// A Python list of the tensors, in their order.
PyObject* list_of(const Tensors& tensors) {
  PyObject* const list = PyList_New(tensors.size());
  for (size_t i = 0; list && i < tensors.size(); ++i) {
    PyObject* const item = to_python(tensors[i]);
    if (!item) {
      Py_DECREF(list);
      return nullptr;
    }
    PyList_SET_ITEM(list, i, item);
  }
  return list;
}

// The plain tensors of a Python list; none where it holds anything else.
Tensors plain_list(PyObject* list) {
  if (!PyList_CheckExact(list)) return {};
  return small_plain_tensors(PySequence_Fast_ITEMS(list), PyList_GET_SIZE(list), kAnySize);
}

std::vector<int64_t> plain_ints(PyObject* list) {
  std::vector<int64_t> values;
  if (!PyList_CheckExact(list)) return values;
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) {
    const auto value = plain_int(PyList_GET_ITEM(list, i));
    if (!value) return {};
    values.push_back(*value);
  }
  return values;
}

int64_t elements_of(const Tensors& tensors) {
  int64_t sum = 0;
  for (const Tensor& tensor : tensors) sum += tensor.numel();
  return sum;
}

bool all_contiguous(const Tensors& tensors) {
  return std::all_of(tensors.begin(), tensors.end(), [](const Tensor& x) { return x.is_contiguous(); });
}

}  // namespace

PyObject* power_iteration_small(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 8) Py_RETURN_NONE;
  const auto n_iterations = plain_int(args[4]);
  const auto eps = plain_float(args[5]);
  const auto u_first = plain_bool(args[6]), return_weights = plain_bool(args[7]);
  if (!n_iterations || *n_iterations < 0 || !eps || !(*eps > 0) || !u_first || !return_weights) Py_RETURN_NONE;
  const Tensors weights = plain_list(args[0]), us = plain_list(args[1]), vs = plain_list(args[2]);
  const std::vector<int64_t> dims = plain_ints(args[3]);
  std::optional<std::tuple<Tensor, Tensors, Tensors, Tensors>> found;
  try {
    without_lock(elements_of(weights), [&] {
      found = power_iteration(weights, us, vs, dims, *n_iterations, *eps, *u_first, *return_weights);
    });
  } catch (const std::exception&) {
    Py_RETURN_NONE;  // the dispatcher's road will meet the error again
  }
  const auto& [sigma, normalized, new_us, new_vs] = *found;
  PyObject* const parts[] = {to_python(sigma), list_of(normalized), list_of(new_us), list_of(new_vs)};
  PyObject* const all =
      parts[0] && parts[1] && parts[2] && parts[3] ? PyTuple_Pack(4, parts[0], parts[1], parts[2], parts[3]) : nullptr;
  for (PyObject* const part : parts) Py_XDECREF(part);
  return all;
}

PyObject* spectral_weights_small(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 6) Py_RETURN_NONE;
  const auto n_iterations = plain_int(args[4]);
  const auto eps = plain_float(args[5]);
  if (!n_iterations || !eps) Py_RETURN_NONE;
  const Tensors weights = plain_list(args[0]), us = plain_list(args[1]), vs = plain_list(args[2]);
  const std::vector<int64_t> dims = plain_ints(args[3]);
  if (weights.empty() || !all_contiguous(us) || !all_contiguous(vs)) Py_RETURN_NONE;
  SpectralWeights results;
  try {
    check_power_iteration(weights, us, vs, dims);
    results = empty_for_spectral_weights(weights, us, vs);
    without_lock(elements_of(weights), [&] { spectral_weights(weights, us, vs, dims, *n_iterations, *eps, results); });
  } catch (const std::exception&) {
    Py_RETURN_NONE;  // the dispatcher's road will meet the error again
  }
  Tensors all = results.normalized;
  all.insert(all.end(), results.saved.begin(), results.saved.end());
  return list_of(all);
}

PyObject* spectral_weights_backward_small(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 5) Py_RETURN_NONE;
  const auto eps = plain_float(args[4]);
  if (!eps) Py_RETURN_NONE;
  const Tensors grads = plain_list(args[0]), weights = plain_list(args[1]), saved = plain_list(args[2]);
  const std::vector<int64_t> dims = plain_ints(args[3]);
  const size_t n = weights.size();
  if (n == 0 || grads.size() != n || saved.size() != n || dims.size() != n) Py_RETURN_NONE;
  Tensors results;
  try {
    without_lock(elements_of(weights), [&] { results = spectral_weights_backward(grads, weights, saved, dims, *eps); });
  } catch (const std::exception&) {
    Py_RETURN_NONE;
  }
  return list_of(results);
}

}  // namespace pygen
