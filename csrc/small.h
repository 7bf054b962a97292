// The road past torch's dispatcher for small plain CPU tensors: from Python's tensor to the op's own function and back.
// On a 4 x 4 tensor the dispatcher and what surrounds it take several times as long as the arithmetic.
// pygen/ops/_operator.py tries this road first; an op's part of it is a few lines in csrc/<op>.cpp; module.cpp binds that.
#pragma once

#include <Python.h>

#include <exception>
#include <optional>
#include <vector>

#include "tensor.h"

namespace pygen {

// The most elements of a small tensor: some microseconds of work on one thread, during which Python's lock is kept.
constexpr int64_t kSmall = 4096;

// Looks up in torch, once, everything that the functions below ask for. In a torch that lacks any of it, or where it works
// otherwise, the road stays closed: no tensor is plain then.
void prepare_small_road();

// For ops whose whole way from Python and back is worth a short road, whatever the size.
constexpr int64_t kAnySize = INT64_MAX;

// Opens or closes the road; returns whether it was open.
bool open_small_road(bool open);

// The tensor behind x, if x is small and plain: a torch.Tensor itself, strided, in CPU memory, that needs no
// gradient, while nobody (a mode, a transformation, a profiler) is to hear of what is computed. Any strides.
// Leaves no Python exception behind: whatever is odd about x, the dispatcher's road says it better.
std::optional<Tensor> small_plain_tensor(PyObject* x);

// The same of several tensors or torch.nn.Parameters, with `most` elements at most: empty unless all of them are.
std::vector<Tensor> small_plain_tensors(PyObject* const* x, size_t count, int64_t most);

// y as a torch.Tensor; nullptr and a Python exception if that fails.
PyObject* to_python(const Tensor& y);

std::optional<int64_t> plain_int(PyObject* value);
std::optional<bool> plain_bool(PyObject* value);
std::optional<double> plain_float(PyObject* value);

// What `run` returns: a tensor, or nothing for "take the dispatcher's road", which is None in Python. So is an error: the
// dispatcher's road will meet it again.
template <typename Run>
PyObject* on_small_road(Run run) {
  std::optional<Tensor> y;
  try {
    y = run();
  } catch (const std::exception&) {
  }
  if (y) return to_python(*y);
  Py_RETURN_NONE;
}

// METH_FASTCALL functions that take the operator's arguments.
PyObject* cumax_small(PyObject* module, PyObject* const* args, Py_ssize_t count);

// The operator's arguments and results.
PyObject* power_iteration_small(PyObject* module, PyObject* const* args, Py_ssize_t count);
// Lists (weights, us, vs, dims), n_iterations, eps -> the list of all weights / sigma, and behind these of what their
// gradients need: for each sigma, u and v in one tensor. u before v; us and vs are changed in place, if there are steps.
PyObject* spectral_weights_small(PyObject* module, PyObject* const* args, Py_ssize_t count);
// Lists (grads, weights, saved, dims), eps -> the list of the weights' gradients.
PyObject* spectral_weights_backward_small(PyObject* module, PyObject* const* args, Py_ssize_t count);

}  // namespace pygen
