// AMX instructions with nothing around them, for tests/test_amx_emulator.py: the same program runs under the emulator and
// on hardware. The first argument says what to do; what goes wrong is said on stderr, and ends it with status 1.
#include <immintrin.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <string>
#include <thread>
#include <vector>

namespace {

struct alignas(64) Config {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t colsb[16] = {};
  uint8_t rows[16] = {};

  Config& tile(int number, int tile_rows, int bytes) {
    rows[number] = static_cast<uint8_t>(tile_rows);
    colsb[number] = static_cast<uint16_t>(bytes);
    return *this;
  }
};
static_assert(sizeof(Config) == 64);

Config full_tiles() {
  Config config;
  for (int tile = 0; tile < 8; ++tile) config.tile(tile, 16, 64);
  return config;
}

// GCC 12's intrinsics do not tell the compiler that they read memory: what was stored before must be there.
void visible(const void* memory) { asm volatile("" : : "r"(memory) : "memory"); }

void configure(const Config& config) {
  visible(&config);
  _tile_loadconfig(&config);
}

void require(bool condition, const char* what) {
  if (condition) return;
  fprintf(stderr, "failed: %s\n", what);
  exit(1);
}

// ---- products of what comes on stdin ---------------------------------------------------------------------------------

struct Case {
  int32_t kind;  // 0: bfloat16; 1 to 4: bytes, signed x signed, signed x unsigned, unsigned x signed, both unsigned
  int32_t rows, a_bytes, columns;
  int32_t a_stride, b_stride, c_stride;
};

// A matrix laid out with a stride of any sign, among bytes that must not change.
class Strided {
 public:
  Strided(const std::vector<uint8_t>& dense, int rows, int bytes, int stride)
      : rows_(rows), bytes_(bytes), stride_(stride), memory_(size_t(rows) * abs(stride) + bytes + 64, 0xa5) {
    first_ = memory_.data() + 32 + (stride < 0 ? (rows - 1) * -stride : 0);
    for (int row = 0; row < rows; ++row) memcpy(first_ + row * stride, dense.data() + row * bytes, bytes);
    before_ = memory_;
  }

  uint8_t* first() { return first_; }

  std::vector<uint8_t> dense() const {
    std::vector<uint8_t> result;
    for (int row = 0; row < rows_; ++row) {
      result.insert(result.end(), first_ + row * stride_, first_ + row * stride_ + bytes_);
    }
    return result;
  }

  bool only_rows_changed() {
    for (int row = 0; row < rows_; ++row) {
      const size_t at = first_ + row * stride_ - memory_.data();
      memcpy(before_.data() + at, memory_.data() + at, bytes_);
    }
    return before_ == memory_;
  }

 private:
  int rows_, bytes_, stride_;
  std::vector<uint8_t> memory_, before_;
  uint8_t* first_;
};

std::vector<uint8_t> read_bytes(size_t count) {
  std::vector<uint8_t> bytes(count);
  require(fread(bytes.data(), 1, count, stdin) == count, "stdin ends within a case");
  return bytes;
}

void multiply_tiles(int kind) {
  switch (kind) {
    case 0:
      _tile_dpbf16ps(3, 6, 1);
      return;
    case 1:
      _tile_dpbssd(3, 6, 1);
      return;
    case 2:
      _tile_dpbsud(3, 6, 1);
      return;
    case 3:
      _tile_dpbusd(3, 6, 1);
      return;
    default:
      _tile_dpbuud(3, 6, 1);
  }
}

// Each case: its header, A (rows x a_bytes), B (a_bytes / 4 x columns) and C (rows x columns), in bytes; C += A B goes
// to stdout.
void multiply() {
  Case header;
  while (fread(&header, sizeof(header), 1, stdin) == 1) {
    const int depth = header.a_bytes / 4;
    Strided a(read_bytes(header.rows * header.a_bytes), header.rows, header.a_bytes, header.a_stride);
    Strided b(read_bytes(depth * header.columns), depth, header.columns, header.b_stride);
    Strided c(read_bytes(header.rows * header.columns), header.rows, header.columns, header.c_stride);
    Config config;
    config.tile(3, header.rows, header.columns).tile(6, header.rows, header.a_bytes).tile(1, depth, header.columns);
    configure(config);
    visible(a.first());
    visible(b.first());
    visible(c.first());
    _tile_loadd(6, a.first(), header.a_stride);
    _tile_stream_loadd(1, b.first(), header.b_stride);
    _tile_loadd(3, c.first(), header.c_stride);
    multiply_tiles(header.kind);
    _tile_stored(3, c.first(), header.c_stride);
    _tile_release();
    require(c.only_rows_changed(), "TILESTORED wrote beside the rows");
    const std::vector<uint8_t> result = c.dense();
    fwrite(result.data(), 1, result.size(), stdout);
  }
}

// ---- threads ---------------------------------------------------------------------------------------------------------

uint16_t bfloat16(int small) {
  const float value = static_cast<float>(small);
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return static_cast<uint16_t>(bits >> 16);
}

// Small integers, tiles of the thread's own size; every round is compared with a plain loop.
void work(int thread, std::atomic<int>& arrived, int threads) {
  const int m = 16 - thread, k = 1 + 3 * thread % 16, n = 16 - 2 * thread;
  std::vector<uint16_t> a(m * 2 * k), b(k * 2 * n);
  std::vector<float> c(m * n), expected(m * n);
  for (size_t i = 0; i < a.size(); ++i) a[i] = bfloat16(static_cast<int>(i * 7 + thread) % 11 - 5);
  for (size_t i = 0; i < b.size(); ++i) b[i] = bfloat16(static_cast<int>(i * 5 + thread) % 13 - 6);
  Config config;
  config.tile(0, m, 4 * n).tile(1, m, 4 * k).tile(2, k, 4 * n);
  configure(config);
  ++arrived;
  while (arrived < threads) std::this_thread::yield();  // all have configured before any goes on
  _tile_zero(0);
  visible(a.data());
  visible(b.data());
  constexpr int kRounds = 40;
  for (int round = 0; round < kRounds; ++round) {
    _tile_loadd(1, a.data(), 4 * k);
    _tile_loadd(2, b.data(), 4 * n);
    _tile_dpbf16ps(0, 1, 2);
    if (round % 8 == 0) std::this_thread::yield();
  }
  _tile_stored(0, c.data(), 4 * n);
  for (int i = 0; i < m; ++i) {
    for (int j = 0; j < n; ++j) {
      int sum = 0;
      for (int l = 0; l < 2 * k; ++l) {
        const int left = ((i * 2 * k + l) * 7 + thread) % 11 - 5;
        const int right = ((l / 2 * 2 * n + 2 * j + l % 2) * 5 + thread) % 13 - 6;
        sum += left * right;
      }
      require(c[i * n + j] == static_cast<float>(kRounds * sum), "a thread's product");
    }
  }
}

void in_threads() {
  constexpr int kThreads = 6;
  std::atomic<int> arrived{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) threads.emplace_back([&arrived, i] { work(i, arrived, kThreads); });
  for (auto& thread : threads) thread.join();
}

// ---- operands --------------------------------------------------------------------------------------------------------

alignas(64) Config fixed_config = full_tiles();
thread_local Config thread_config = full_tiles();

// Tile 0 holds `rows` rows of `source` that lie `stride` bytes apart.
void expect_tile(const uint8_t* source, ptrdiff_t stride, const char* form) {
  uint8_t got[16][64];
  _tile_stored(0, got, 64);
  for (int row = 0; row < 16; ++row) require(memcmp(got[row], source + row * stride, 64) == 0, form);
  _tile_zero(0);
}

#define LOAD(form, base_register, base, index_register, index, source, stride)         \
  do {                                                                                 \
    register const void* base_ asm(base_register) = base;                              \
    register int64_t index_ asm(index_register) = index;                               \
    asm volatile("tileloadd " form ", %%tmm0" : : "r"(base_), "r"(index_) : "memory"); \
    expect_tile(source, stride, form " " base_register " " index_register);            \
  } while (0)

// Every way to write a strided memory operand. Not inlined: the frame pointer must be free.
__attribute__((noinline)) void strided_operands() {
  configure(fixed_config);
  // Below 2 GiB, so that an address can stand in the instruction.
  auto* memory = static_cast<uint8_t*>(mmap(reinterpret_cast<void*>(0x20000000), 1 << 16, PROT_READ | PROT_WRITE,
                                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0));
  require(memory == reinterpret_cast<void*>(0x20000000), "memory at 0x20000000");
  for (int i = 0; i < 1 << 16; ++i) memory[i] = static_cast<uint8_t>(i * 31 + i / 251);
  uint8_t* const middle = memory + 32768;
  LOAD("(%0,%1)", "rax", middle, "rcx", 64, middle, 64);
  LOAD("(%0,%1)", "rdx", middle, "rbx", 100, middle, 100);
  LOAD("(%0,%1)", "rsi", middle, "rdi", -100, middle, -100);
  LOAD("(%0,%1)", "rbp", middle, "r8", 72, middle, 72);   // a base that needs a displacement byte
  LOAD("(%0,%1)", "r13", middle, "r12", 72, middle, 72);  // the same, and an index that looks like none
  LOAD("(%0,%1)", "r12", middle, "r13", 1000, middle, 1000);
  LOAD("(%0,%1)", "r14", middle, "r15", -2000, middle, -2000);
  LOAD("(%0,%1,2)", "r9", middle, "r10", 36, middle, 72);
  LOAD("(%0,%1,4)", "r11", middle, "rax", -25, middle, -100);
  LOAD("(%0,%1,8)", "rbx", middle, "r12", 9, middle, 72);
  LOAD("64(%0,%1)", "rax", middle, "rcx", 64, middle + 64, 64);
  LOAD("-128(%0,%1)", "r8", middle, "r9", 64, middle - 128, 64);
  LOAD("4096(%0,%1)", "r15", middle, "r14", 64, middle + 4096, 64);
  LOAD("-4096(%0,%1,2)", "r13", middle, "rbp", 64, middle - 4096, 128);
  LOAD("(%0)", "rax", middle, "rcx", 64, middle, 0);  // no index: every row is the first
  LOAD("8(%0)", "r12", middle, "rcx", 64, middle + 8, 0);
  LOAD("0x20000040(,%1)", "rax", nullptr, "r12", 80, memory + 64, 80);  // no base
  LOAD("0x20000040(,%1,4)", "rax", nullptr, "rbp", 20, memory + 64, 80);
  LOAD("0x20000040(,%1)", "rax", nullptr, "rbp", 0, memory + 64, 0);
}

void plain_operands() {
  Config stored;
  const auto expect_config = [&](const char* form) {
    stored = Config().tile(0, 1, 4);
    _tile_storeconfig(&stored);
    require(memcmp(&stored, &fixed_config, sizeof(stored)) == 0, form);
    _tile_release();
  };
  configure(fixed_config);
  expect_config("STTILECFG");
  stored = Config().tile(0, 1, 4);
  _tile_storeconfig(&stored);
  require(stored.palette == 0 && stored.rows[0] == 0 && stored.colsb[7] == 0, "STTILECFG of released tiles");
  asm volatile("ldtilecfg %0" : : "m"(fixed_config));  // relative to the instruction pointer
  expect_config("ldtilecfg of a static");
  asm volatile("ldtilecfg %%fs:(%0)"
               :
               : "r"(reinterpret_cast<char*>(&thread_config) - static_cast<char*>(__builtin_thread_pointer())));
  expect_config("ldtilecfg of a thread_local");
  asm volatile("ldtilecfg 64(%0,%1,8)"
               :
               : "r"(reinterpret_cast<int64_t>(&fixed_config) - 128), "r"(int64_t{8}));  // the index counts here
  expect_config("ldtilecfg of an array element");
}

// ---- what must not change --------------------------------------------------------------------------------------------

void state_is_kept() {
  configure(fixed_config);
  alignas(16) uint8_t before[16][16], after[16][16];
  for (int i = 0; i < 256; ++i) before[i / 16][i % 16] = static_cast<uint8_t>(i * 37 + 11);
  alignas(64) static uint16_t ones[16][32];
  for (auto& row : ones) {
    for (auto& one : row) one = bfloat16(1);
  }
  uint64_t flags_before, flags_after;
  asm volatile(
      "tileloadd (%[ones],%[stride]), %%tmm1\n"
      "tileloadd (%[ones],%[stride]), %%tmm2\n"
      "movdqa 0x00(%[in]), %%xmm0\n movdqa 0x10(%[in]), %%xmm1\n movdqa 0x20(%[in]), %%xmm2\n"
      "movdqa 0x30(%[in]), %%xmm3\n movdqa 0x80(%[in]), %%xmm8\n movdqa 0xf0(%[in]), %%xmm15\n"
      "xor %[before], %[before]\n sub $1, %[before]\n pushfq\n popq %[before]\n"  // carry and sign set
      "tilezero %%tmm0\n"
      "tdpbf16ps %%tmm2, %%tmm1, %%tmm0\n"
      "pushfq\n popq %[after]\n"
      "movdqa %%xmm0, 0x00(%[out])\n movdqa %%xmm1, 0x10(%[out])\n movdqa %%xmm2, 0x20(%[out])\n"
      "movdqa %%xmm3, 0x30(%[out])\n movdqa %%xmm8, 0x80(%[out])\n movdqa %%xmm15, 0xf0(%[out])\n"
      : [before] "=&r"(flags_before), [after] "=&r"(flags_after)
      : [in] "r"(before), [out] "r"(after), [ones] "r"(ones), [stride] "r"(int64_t{64})
      : "memory", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm8", "xmm15");
  for (int number : {0, 1, 2, 3, 8, 15}) require(memcmp(before[number], after[number], 16) == 0, "xmm registers");
  require(flags_before == flags_after, "flags");

  // 2^24 + 1 is a tie: to even it stays 2^24, upward it does not.
  float sums[16][16];
  for (auto& row : sums) {
    for (float& sum : row) sum = 16777216.0f - 31;
  }
  visible(sums);
  _tile_loadd(0, sums, 64);
  const unsigned upward = 0x5f80;
  _mm_setcsr(upward);
  _tile_dpbf16ps(0, 1, 2);
  require(_mm_getcsr() == upward, "MXCSR");
  _mm_setcsr(0x1f80);
  _tile_stored(0, sums, 64);
  require(sums[15][15] == 16777216.0f, "rounding to nearest even whatever MXCSR says");
}

// TILELOADD leaves the rows above start_row, and the next instruction begins at 0 again; a new configuration has zeros.
void start_row() {
  uint8_t rows[16][64], got[16][64];
  for (int i = 0; i < 1024; ++i) rows[i / 64][i % 64] = static_cast<uint8_t>(i + i / 64 + 1);
  Config config = full_tiles();
  config.start_row = 5;
  configure(config);
  visible(rows);
  _tile_loadd(0, rows, 64);
  _tile_stored(0, got, 64);
  for (int row = 0; row < 16; ++row) {
    const uint8_t zeros[64] = {};
    require(memcmp(got[row], row < 5 ? zeros : rows[row], 64) == 0, "start_row");
  }
  config.start_row = 0;
  configure(config);
  _tile_stored(0, got, 64);
  for (const auto& row : got) {
    for (const uint8_t byte : row) require(byte == 0, "LDTILECFG zeroes the tiles");
  }
}

// ---- signals ---------------------------------------------------------------------------------------------------------

volatile sig_atomic_t handled = 0;

void skip_ud2(int, siginfo_t* info, void* context) {
  ++handled;
  if (info->si_code > 0) static_cast<ucontext_t*>(context)->uc_mcontext.gregs[REG_RIP] += 2;
}

void own_handler() {
  struct sigaction action = {}, previous = {};
  action.sa_sigaction = skip_ud2;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, &previous);
  require(previous.sa_handler == SIG_DFL, "the handler before is the default");
  configure(fixed_config);
  _tile_zero(0);
  require(handled == 0, "AMX instructions do not reach the process's handler");
  asm volatile("ud2");
  require(handled == 1, "an illegal instruction reaches the process's handler");
  raise(SIGILL);
  require(handled == 2, "a raised SIGILL reaches the process's handler");
  sigaction(SIGILL, &previous, &action);
  require(action.sa_sigaction == skip_ud2, "the handler is reported as it was set");
  _tile_zero(0);
  raise(SIGILL);
}

// ---- misuse ----------------------------------------------------------------------------------------------------------

void misuse(const std::string& how) {
  Config config = full_tiles();
  uint8_t memory[1024] = {};
  if (how == "palette") config.palette = 2;
  if (how == "reserved") config.reserved[3] = 1;
  if (how == "reserved tile") config.tile(8, 16, 64);
  if (how == "rows") config.tile(3, 17, 64);
  if (how == "columns") config.tile(3, 16, 65);
  if (how == "rows without columns") config.tile(3, 16, 0);
  if (how == "missing tile") config.tile(3, 0, 0);
  if (how == "odd bytes") config.tile(3, 16, 62);
  if (how == "start row") config.start_row = 16;
  if (how == "destination rows") config.tile(3, 15, 64);
  if (how == "destination columns") config.tile(3, 16, 60);
  if (how == "depth") config.tile(4, 16, 60);
  if (how != "not configured") configure(config);
  if (how == "released") _tile_release();
  if (how == "same tile") asm volatile(".byte 0xc4, 0xe2, 0x5a, 0x5c, 0xdc");  // tdpbf16ps tmm3, tmm4, tmm4
  if (how == "zero of a missing tile") {
    configure(config.tile(3, 0, 0));
    _tile_zero(3);
  }
  if (how.rfind("d", 0) != 0) _tile_loadd(3, memory, 64);
  _tile_dpbf16ps(3, 4, 5);
}

// ---- time ------------------------------------------------------------------------------------------------------------

template <typename Work>
void time(const char* name, Work work) {
  constexpr int kTimes = 20000;
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < kTimes; ++i) work();
  const std::chrono::duration<double, std::micro> took = std::chrono::steady_clock::now() - start;
  printf("%s %.3f us\n", name, took.count() / kTimes);
}

void times() {
  configure(fixed_config);
  static uint8_t memory[1024];
  struct sigaction action = {};
  action.sa_sigaction = skip_ud2;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, nullptr);
  time("TILEZERO", [] { _tile_zero(0); });
  time("TILELOADD", [] { _tile_loadd(1, memory, 64); });
  time("TILESTORED", [] { _tile_stored(1, memory, 64); });
  time("TDPBF16PS", [] { _tile_dpbf16ps(0, 1, 2); });
  time("TDPBSSD", [] { _tile_dpbssd(0, 1, 2); });
  time("UD2 handled by the process", [] { asm volatile("ud2"); });
}

}  // namespace

int main(int count, char** arguments) {
  // Linux gives the tiles to who asks: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA. Without AMX it refuses.
  syscall(SYS_arch_prctl, 0x1023, 18);
  const std::string what = count > 1 ? arguments[1] : "";
  if (what == "multiply") {
    multiply();
  } else if (what == "threads") {
    in_threads();
  } else if (what == "operands") {
    strided_operands();
    plain_operands();
  } else if (what == "state") {
    state_is_kept();
  } else if (what == "start_row") {
    start_row();
  } else if (what == "handler") {
    own_handler();
  } else if (what == "ud2") {
    asm volatile("ud2");
  } else if (what == "misuse") {
    misuse(arguments[2]);
  } else if (what == "time") {
    times();
  } else {
    require(false, "what to do");
  }
}
