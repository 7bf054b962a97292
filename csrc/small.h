// The road that skips torch's dispatcher: small plain CPU tensors, taken from Python and given back by the C API of
// CPython alone. On a 4 x 4 tensor the way through the dispatcher takes several times as long as the arithmetic.
// pygen/ops/_operator.py tries this road first; csrc/<op>.cpp has an op's part of it, module.cpp binds that.
#pragma once

#include <Python.h>

#include <cstdint>

namespace pygen {

// The most elements that take cumax's road, all of them one row at worst.
constexpr int64_t kCumaxSmall = 256;

enum class SmallType { kFloat32, kFloat64, kBFloat16, kFloat16 };

// A contiguous tensor, as much of it as a kernel of rows wants to know.
struct SmallTensor {
  const void* data;
  int64_t rank, elements;  // neither is 0
  int64_t length;          // of the last dimension
  SmallType type;
};

// Looks up in torch, once, everything that the functions below ask for. The road stays closed in a torch that lacks any
// of it: every question is then answered "no".
void open_small_road();

// Whether x is a torch.Tensor itself, of 1 to `limit` elements in contiguous CPU memory, of one of the SmallTypes, that
// needs no gradient, while nobody (a mode, a transformation, a profiler) asks to hear of what is computed. Leaves no
// Python exception behind: whatever is odd about x, the dispatcher's road says it better.
bool plain_small_cpu_tensor(PyObject* x, int64_t limit, SmallTensor& found);

// A new tensor like x, which is plain, and its memory; nullptr and a Python exception if there is none to be had.
PyObject* new_plain_like(PyObject* x, void*& data);

// (x: Tensor, dim: int, complement: bool) -> cumax, or None for whatever is not plain and small. METH_FASTCALL.
PyObject* cumax_small(PyObject* module, PyObject* const* args, Py_ssize_t count);

}  // namespace pygen
