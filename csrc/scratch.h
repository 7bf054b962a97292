// Memory for the length of a call.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <memory>

namespace pygen {

// Uninitialised, aligned for the widest vectors; nothing where bytes is 0.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : memory_(bytes ? new char[bytes + alignment(bytes)] : nullptr) {
    const auto align = static_cast<uintptr_t>(alignment(bytes));
    data_ = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory_.get()) + align - 1) / align * align);
#if defined(__linux__)
    // A matrix that every step reads from end to end has more small pages than the CPU keeps addresses of.
    if (bytes >= kHugePage) madvise(data_, static_cast<size_t>(bytes), MADV_HUGEPAGE);
#endif
  }
  void* data() const { return data_; }

 private:
  static constexpr int64_t kCacheLine = 64, kHugePage = int64_t{1} << 21;
  static int64_t alignment(int64_t bytes) { return bytes >= kHugePage ? kHugePage : kCacheLine; }
  std::unique_ptr<char[]> memory_;
  void* data_;
};

}  // namespace pygen
