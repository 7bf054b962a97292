// Allocation and naming of tensors over the stable ABI.
#include "tensor.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace pygen {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

// Fresh memory of many megabytes is given by the kernel page by page, and those page faults cost more than computing
// what goes into it (64 MB: 16,384 faults, 60 ms against 7 ms for the copy). Huge pages make them 32. Linux in its
// usual setting ("madvise") hands them to whoever asks; elsewhere this does nothing.
void ask_for_huge_pages(void* data, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

int32_t shim_dtype(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return aoti_torch_dtype_float64();
    case ScalarType::BFloat16:
      return aoti_torch_dtype_bfloat16();
    case ScalarType::Half:
      return aoti_torch_dtype_float16();
    case ScalarType::Long:
      return aoti_torch_dtype_int64();
    case ScalarType::Int:
      return aoti_torch_dtype_int32();
    default:
      return aoti_torch_dtype_float32();
  }
}

}  // namespace

Tensor empty_contiguous(const int64_t* sizes, int64_t dim, ScalarType dtype) {
  int64_t strides[kMaxDims];
  int64_t elements = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    strides[i] = elements;
    elements *= sizes[i] > 1 ? sizes[i] : 1;
  }
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, shim_dtype(dtype), aoti_torch_device_type_cpu(),
                                                  /*device_index=*/-1, &handle));
  Tensor result(handle);
  const size_t bytes = elements * bytes_of(dtype);
  if (bytes >= 2 * kHugePage) ask_for_huge_pages(result.data_ptr(), bytes);
  return result;
}

std::string shape_string(const Tensor& x) {
  std::ostringstream text;
  text << "(";
  for (int64_t i = 0; i < x.dim(); ++i) text << (i ? ", " : "") << x.size(i);
  text << (x.dim() == 1 ? ",)" : ")");
  return text.str();
}

std::string dtype_string(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::Long:
      return "torch.int64";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Short:
      return "torch.int16";
    case ScalarType::Char:
      return "torch.int8";
    case ScalarType::Byte:
      return "torch.uint8";
    case ScalarType::Bool:
      return "torch.bool";
    case ScalarType::ComplexFloat:
      return "torch.complex64";
    case ScalarType::ComplexDouble:
      return "torch.complex128";
    default:
      return "dtype number " + std::to_string(static_cast<int>(dtype));
  }
}

}  // namespace pygen
