// Intel AMX in software, for a process on a machine without it: preloaded (LD_PRELOAD), this library catches the illegal
// instruction that an AMX instruction is there, does what the instruction would have done, and steps over it. So the
// machine code that pygen ships for AMX runs, and is tested, on every x86-64 Linux. tests/amx.py compiles it.
//
// Source of the semantics: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, "Programming with
// Intel AMX", and volume 2, the instructions' pages and the exception classes AMX-E1 to E6. What hardware refuses with
// #UD or #GP aborts the process with a sentence; what is no AMX instruction goes to whom the process has given SIGILL,
// or kills it.
//
// A trapped instruction takes 4 to 5 microseconds on a virtual Xeon at 2.5 GHz, nearly all of them the kernel's signal
// (a signal that does nothing takes 4.5): with full tiles TILEZERO 4.6, TILELOADD 4.8, TDPBF16PS 6.4, TDPBSSD 18. In
// hardware it is nanoseconds.
#include <cpuid.h>
#include <dlfcn.h>
#include <immintrin.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <initializer_list>

namespace {

// ---- state -----------------------------------------------------------------------------------------------------------

// Palette 1, the only one there is.
constexpr int kTiles = 8;
constexpr int kRows = 16;
constexpr int kRowBytes = 64;

struct Tile {
  uint8_t row[kRows][kRowBytes];
  int rows;
  int colsb;  // bytes of a row in use
};

struct TileState {
  Tile tiles[kTiles];
  bool configured;
  int start_row;
};

// initial-exec: reached without a call that might allocate, which a signal handler must not do.
__attribute__((tls_model("initial-exec"))) thread_local TileState state;

std::atomic<unsigned long long> executed{0};

// ---- refusals --------------------------------------------------------------------------------------------------------

// A sentence put together and written without anything that a signal handler must not call.
class Sentence {
 public:
  Sentence& text(const char* words) {
    while (*words && length_ < sizeof(buffer_)) buffer_[length_++] = *words++;
    return *this;
  }

  Sentence& number(uint64_t value, int base = 10) {
    char digits[24];
    char* first = digits + sizeof(digits) - 1;
    *first = 0;
    do {
      *--first = "0123456789abcdef"[value % base];
      value /= base;
    } while (value);
    return text(first);
  }

  [[noreturn]] void abort() {
    text("\n");
    [[maybe_unused]] const ssize_t written = write(STDERR_FILENO, buffer_, length_);
    ::abort();
  }

 private:
  char buffer_[256];
  size_t length_ = 0;
};

// ---- decoding --------------------------------------------------------------------------------------------------------

enum class Operation { kLoadConfig, kStoreConfig, kRelease, kZero, kLoad, kStore, kDotBF16, kDotInt8 };
enum class Form { kMemory, kSib, kNoOperand, kTile, kThreeTiles };
enum Prefix { kNone = 0, k66 = 1, kF3 = 2, kF2 = 3 };  // VEX.pp

struct Opcode {
  uint8_t opcode;
  uint8_t prefix;
  Form form;
  Operation operation;
  const char* name;
};

constexpr Opcode kOpcodes[] = {
    {0x49, kNone, Form::kMemory, Operation::kLoadConfig, "LDTILECFG"},
    {0x49, k66, Form::kMemory, Operation::kStoreConfig, "STTILECFG"},
    {0x49, kNone, Form::kNoOperand, Operation::kRelease, "TILERELEASE"},
    {0x49, kF2, Form::kTile, Operation::kZero, "TILEZERO"},
    {0x4b, kF2, Form::kSib, Operation::kLoad, "TILELOADD"},
    {0x4b, k66, Form::kSib, Operation::kLoad, "TILELOADDT1"},
    {0x4b, kF3, Form::kSib, Operation::kStore, "TILESTORED"},
    {0x5c, kF3, Form::kThreeTiles, Operation::kDotBF16, "TDPBF16PS"},
    {0x5e, kF2, Form::kThreeTiles, Operation::kDotInt8, "TDPBSSD"},
    {0x5e, kF3, Form::kThreeTiles, Operation::kDotInt8, "TDPBSUD"},
    {0x5e, k66, Form::kThreeTiles, Operation::kDotInt8, "TDPBUSD"},
    {0x5e, kNone, Form::kThreeTiles, Operation::kDotInt8, "TDPBUUD"},
};

struct Instruction {
  const Opcode* opcode;
  uint64_t at;
  int length;
  int destination, source1, source2;  // tiles: ModRM.reg, ModRM.rm, VEX.vvvv
  uint64_t address, stride;

  Sentence refusal() const {
    Sentence sentence;
    sentence.text("AMX emulator: ").text(opcode->name).text(" at 0x").number(at, 16).text(": ");
    return sentence;
  }
};

// The general registers as instructions number them.
constexpr int kRegisters[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                              REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

int64_t displacement(const uint8_t*& at, int bytes) {
  int8_t narrow = 0;
  int32_t wide = 0;
  memcpy(bytes == 1 ? static_cast<void*>(&narrow) : &wide, at, bytes);
  at += bytes;
  return bytes == 1 ? narrow : wide;
}

// The memory operand whose ModRM byte is at `at`, which is moved behind it. Base, index and displacement as for every
// instruction; but the scaled index goes to `stride`: it is the distance between rows.
void decode_memory(const greg_t* registers, bool index_high, bool base_high, const uint8_t*& at, Instruction& into) {
  const int mod = *at >> 6;
  const int rm = *at & 7;
  ++at;
  int base = rm;
  into.stride = 0;
  if (rm == 4) {  // a SIB byte
    const int scale = *at >> 6;
    const int index = (*at >> 3 & 7) | index_high << 3;
    base = *at & 7;
    ++at;
    if (index != 4) into.stride = static_cast<uint64_t>(registers[kRegisters[index]]) << scale;
  }
  const bool without_base = mod == 0 && base == 5;
  into.address = without_base ? 0 : registers[kRegisters[base | base_high << 3]];
  if (mod == 1) into.address += displacement(at, 1);
  if (mod == 2 || without_base) into.address += displacement(at, 4);
  // No instruction here has an immediate behind the displacement.
  if (without_base && rm == 5) into.address += reinterpret_cast<uint64_t>(at);  // relative to the next instruction
}

const Opcode* find(uint8_t opcode, int prefix, uint8_t modrm) {
  const bool memory = modrm >> 6 != 3;
  for (const Opcode& known : kOpcodes) {
    if (known.opcode != opcode || known.prefix != prefix) continue;
    const bool fits = known.form == Form::kMemory      ? memory && (modrm >> 3 & 7) == 0
                      : known.form == Form::kSib       ? memory && (modrm & 7) == 4
                      : known.form == Form::kNoOperand ? modrm == 0xc0
                      : known.form == Form::kTile      ? !memory && (modrm & 7) == 0
                                                       : !memory;
    if (fits) return &known;
  }
  return nullptr;
}

// VEX.128.0F38.W0 and one of kOpcodes, or false.
bool decode(const greg_t* registers, Instruction& into) {
  const auto* at = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
  const uint8_t* const first = at;
  // A thread_local operand may be addressed through FS; GS and 32-bit addresses no compiler makes here.
  const bool thread_local_operand = *at == 0x64;
  at += thread_local_operand;
  if (at[0] != 0xc4 || (at[1] & 0x1f) != 2) return false;
  const bool wide = at[2] >> 7 || (at[2] >> 2 & 1);
  const bool reg_high = !(at[1] >> 7), index_high = !(at[1] >> 6 & 1), base_high = !(at[1] >> 5 & 1);
  const int vvvv = ~at[2] >> 3 & 15;
  into.opcode = find(at[3], at[2] & 3, at[4]);
  if (wide || !into.opcode) return false;
  at += 4;
  into.at = reinterpret_cast<uint64_t>(first);
  into.destination = (*at >> 3 & 7) | reg_high << 3;
  into.source1 = (*at & 7) | base_high << 3;
  into.source2 = vvvv;
  const Form form = into.opcode->form;
  const bool no_such_tile = into.destination >= kTiles || (form == Form::kThreeTiles && into.source1 >= kTiles) ||
                            (form == Form::kThreeTiles ? vvvv >= kTiles : vvvv != 0);
  if (no_such_tile) return false;
  if (form == Form::kMemory || form == Form::kSib) {
    decode_memory(registers, index_high, base_high, at, into);
  } else {
    ++at;
  }
  if (form == Form::kMemory) into.address += into.stride;  // no rows: an index as everywhere
  if (thread_local_operand) {
    uint64_t base;
    asm("mov %%fs:0, %0" : "=r"(base));
    into.address += base;
  }
  into.length = static_cast<int>(at - first);
  return true;
}

// ---- configuration ---------------------------------------------------------------------------------------------------

// The 64 bytes of LDTILECFG.
struct Config {
  uint8_t palette;
  uint8_t start_row;
  uint8_t reserved1[14];
  uint16_t colsb[kTiles];
  uint8_t reserved2[16];
  uint8_t rows[kTiles];
  uint8_t reserved3[8];
};
static_assert(sizeof(Config) == 64);

bool any_set(const uint8_t* bytes, int count) {
  uint8_t all = 0;
  for (int i = 0; i < count; ++i) all |= bytes[i];
  return all;
}

void check_config(const Instruction& instruction, const Config& config) {
  Sentence wrong = instruction.refusal();
  if (config.palette > 1) {
    wrong.text("palette must be 0 or 1, got ").number(config.palette).text(" (#GP)").abort();
  }
  if (any_set(config.reserved1, 14) || any_set(config.reserved2, 16) || any_set(config.reserved3, 8)) {
    wrong.text("bytes 2-15, 32-47 and 56-63 of the configuration must be 0 (#GP)").abort();
  }
  for (int tile = 0; tile < kTiles; ++tile) {
    const int rows = config.rows[tile], colsb = config.colsb[tile];
    if (rows <= kRows && colsb <= kRowBytes && !rows == !colsb) continue;
    wrong.text("tile ").number(tile).text(" must have up to 16 rows of up to 64 bytes, or neither, got ");
    wrong.number(rows).text(" of ").number(colsb).text(" (#GP)").abort();
  }
}

void load_config(const Instruction& instruction) {
  Config config;
  memcpy(&config, reinterpret_cast<const void*>(instruction.address), sizeof(config));
  if (config.palette != 0) check_config(instruction, config);
  memset(&state, 0, sizeof(state));
  if (config.palette == 0) return;
  state.configured = true;
  state.start_row = config.start_row;
  for (int tile = 0; tile < kTiles; ++tile) {
    state.tiles[tile].rows = config.rows[tile];
    state.tiles[tile].colsb = config.colsb[tile];
  }
}

void store_config(const Instruction& instruction) {
  Config config = {};
  if (state.configured) {
    config.palette = 1;
    config.start_row = static_cast<uint8_t>(state.start_row);
    for (int tile = 0; tile < kTiles; ++tile) {
      config.rows[tile] = static_cast<uint8_t>(state.tiles[tile].rows);
      config.colsb[tile] = static_cast<uint16_t>(state.tiles[tile].colsb);
    }
  }
  memcpy(reinterpret_cast<void*>(instruction.address), &config, sizeof(config));
}

Tile& usable_tile(const Instruction& instruction, int number) {
  if (!state.configured) instruction.refusal().text("no tiles are configured in this thread (#UD)").abort();
  Tile& tile = state.tiles[number];
  if (tile.rows == 0) {
    instruction.refusal().text("tile ").number(number).text(" is not part of the configuration (#UD)").abort();
  }
  if (tile.colsb % 4 != 0 && instruction.opcode->form != Form::kTile) {
    Sentence wrong = instruction.refusal().text("tile ").number(number);
    wrong.text(" must have rows of whole 4-byte elements, got ").number(tile.colsb).text(" bytes (#UD)").abort();
  }
  return tile;
}

// ---- memory ----------------------------------------------------------------------------------------------------------

void check_start_row(const Instruction& instruction, const Tile& tile) {
  if (state.start_row < tile.rows) return;
  Sentence wrong = instruction.refusal().text("start_row must be below the tile's ").number(tile.rows);
  wrong.text(" rows, got ").number(state.start_row).text(" (#UD)").abort();
}

// What an instruction leaves in the part of a tile that is beyond its configured size: zeros.
void zero_beyond(Tile& tile) {
  for (int row = 0; row < kRows; ++row) {
    const int used = row < tile.rows ? tile.colsb : 0;
    memset(tile.row[row] + used, 0, kRowBytes - used);
  }
}

void load(const Instruction& instruction) {
  Tile& tile = usable_tile(instruction, instruction.destination);
  check_start_row(instruction, tile);
  for (int row = state.start_row; row < tile.rows; ++row) {
    memcpy(tile.row[row], reinterpret_cast<const void*>(instruction.address + row * instruction.stride), tile.colsb);
  }
  zero_beyond(tile);
}

void store(const Instruction& instruction) {
  const Tile& tile = usable_tile(instruction, instruction.destination);
  check_start_row(instruction, tile);
  for (int row = state.start_row; row < tile.rows; ++row) {
    memcpy(reinterpret_cast<void*>(instruction.address + row * instruction.stride), tile.row[row], tile.colsb);
  }
}

// ---- products --------------------------------------------------------------------------------------------------------

// c += a b in float32, a: (rows, 2 K) bfloat16, b: (K, columns, 2) bfloat16. Products of even and of odd elements are
// summed apart, each by fused multiply-add in the order of k, then added to each other, then to c.
__attribute__((target("avx2,fma"), noinline)) void dot_bf16(Tile& c, const Tile& a, const Tile& b) {
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000));
  for (int row = 0; row < c.rows; ++row) {
    __m256 even[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    __m256 odd[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
    for (int k = 0; k < a.colsb / 4; ++k) {
      int pair;
      memcpy(&pair, a.row[row] + 4 * k, 4);
      const __m256i both = _mm256_set1_epi32(pair);
      const __m256 a_even = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
      const __m256 a_odd = _mm256_castsi256_ps(_mm256_and_si256(both, upper));
      for (int half = 0; half < 2; ++half) {
        const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b.row[k]) + half);
        even[half] = _mm256_fmadd_ps(a_even, _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)), even[half]);
        odd[half] = _mm256_fmadd_ps(a_odd, _mm256_castsi256_ps(_mm256_and_si256(pairs, upper)), odd[half]);
      }
    }
    for (int half = 0; half < 2; ++half) {
      float* const sums = reinterpret_cast<float*>(c.row[row]) + 8 * half;
      _mm256_storeu_ps(sums, _mm256_add_ps(_mm256_loadu_ps(sums), _mm256_add_ps(even[half], odd[half])));
    }
  }
}

// The same with groups of four bytes, modulo 2^32.
__attribute__((target("avx2"), noinline)) void dot_int8(Tile& c, const Tile& a, const Tile& b, bool a_signed,
                                                        bool b_signed) {
  constexpr int kColumns = kRowBytes / 4;
  for (int row = 0; row < c.rows; ++row) {
    uint32_t sums[kColumns], groups[kColumns];
    memcpy(sums, c.row[row], kRowBytes);
    for (int i = 0; i < a.colsb; ++i) {
      const uint8_t byte = a.row[row][i];
      const uint32_t left = a_signed ? static_cast<uint32_t>(static_cast<int8_t>(byte)) : byte;
      memcpy(groups, b.row[i / 4], kRowBytes);
      for (int column = 0; column < kColumns; ++column) {
        const uint32_t top = groups[column] << (24 - 8 * (i % 4));
        sums[column] += left * (b_signed ? static_cast<uint32_t>(static_cast<int32_t>(top) >> 24) : top >> 24);
      }
    }
    memcpy(c.row[row], sums, kRowBytes);
  }
}

void check_product(const Instruction& instruction, const Tile& c, const Tile& a, const Tile& b) {
  const int first = instruction.destination, second = instruction.source1, third = instruction.source2;
  if (first == second || second == third || first == third) {
    instruction.refusal().text("the three tiles must be different (#UD)").abort();
  }
  if (c.rows == a.rows && c.colsb == b.colsb && a.colsb == 4 * b.rows) return;
  Sentence wrong = instruction.refusal().text("rows x bytes must be m x 4n, m x 4k and k x 4n, got");
  for (const Tile* tile : {&c, &a, &b}) {
    wrong.text(tile == &c ? " " : ", ").number(tile->rows).text(" x ").number(tile->colsb);
  }
  wrong.text(" (#UD)").abort();
}

void multiply(const Instruction& instruction) {
  Tile& c = usable_tile(instruction, instruction.destination);
  const Tile& a = usable_tile(instruction, instruction.source1);
  const Tile& b = usable_tile(instruction, instruction.source2);
  check_product(instruction, c, a, b);
  if (instruction.opcode->operation == Operation::kDotInt8) {
    const int prefix = instruction.opcode->prefix;
    dot_int8(c, a, b, prefix == kF2 || prefix == kF3, prefix == kF2 || prefix == k66);
  } else {
    if (!__builtin_cpu_supports("fma")) instruction.refusal().text("the emulator needs a CPU with FMA").abort();
    // Denormals are zero, as input and as result; round to nearest even; nothing raised. The return from the signal
    // brings the thread's own MXCSR back.
    const unsigned control = 0x9fc0;
    asm volatile("ldmxcsr %0" : : "m"(control) : "memory");
    dot_bf16(c, a, b);
  }
  zero_beyond(c);
}

// ---- the trap --------------------------------------------------------------------------------------------------------

void execute(const Instruction& instruction) {
  switch (instruction.opcode->operation) {
    case Operation::kLoadConfig:
      return load_config(instruction);
    case Operation::kStoreConfig:
      return store_config(instruction);
    case Operation::kRelease:
      memset(&state, 0, sizeof(state));
      return;
    case Operation::kZero: {
      Tile& tile = usable_tile(instruction, instruction.destination);
      memset(tile.row, 0, sizeof(tile.row));
      break;
    }
    case Operation::kLoad:
      load(instruction);
      break;
    case Operation::kStore:
      store(instruction);
      break;
    case Operation::kDotBF16:
    case Operation::kDotInt8:
      multiply(instruction);
      break;
  }
  state.start_row = 0;
}

using SetAction = int (*)(int, const struct sigaction*, struct sigaction*);

SetAction real_sigaction() {
  static std::atomic<SetAction> found{nullptr};
  SetAction action = found.load(std::memory_order_relaxed);
  if (!action) {
    action = reinterpret_cast<SetAction>(dlsym(RTLD_NEXT, "sigaction"));
    found.store(action, std::memory_order_relaxed);
  }
  return action;
}

// What the process itself wants done at SIGILL; the default to begin with.
struct sigaction wanted = {};

void pass_on(int signal, siginfo_t* info, void* context) {
  const struct sigaction action = wanted;
  const bool raised = info->si_code <= 0;
  if ((action.sa_flags & SA_SIGINFO) && action.sa_sigaction) {
    if (action.sa_flags & SA_RESETHAND) wanted = {};
    return action.sa_sigaction(signal, info, context);
  }
  if (action.sa_handler == SIG_IGN && raised) return;
  if (action.sa_handler != SIG_DFL && action.sa_handler != SIG_IGN) {
    if (action.sa_flags & SA_RESETHAND) wanted = {};
    return action.sa_handler(signal);
  }
  // The default: the instruction comes again and now kills. A raised signal must be raised again.
  struct sigaction standard = {};
  real_sigaction()(SIGILL, &standard, nullptr);
  if (raised) raise(SIGILL);
}

void on_illegal_instruction(int signal, siginfo_t* info, void* context) {
  greg_t* const registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  Instruction instruction;
  if (info->si_code <= 0 || !decode(registers, instruction)) return pass_on(signal, info, context);
  execute(instruction);
  executed.fetch_add(1, std::memory_order_relaxed);
  registers[REG_RIP] += instruction.length;
}

__attribute__((constructor)) void install() {
  struct sigaction action = {};
  action.sa_sigaction = on_illegal_instruction;
  action.sa_flags = SA_SIGINFO;
  sigfillset(&action.sa_mask);  // no other handler sees half an instruction
  real_sigaction()(SIGILL, &action, nullptr);
}

}  // namespace

#define PYGEN_EXPORT extern "C" __attribute__((visibility("default")))

// Handlers that the process sets for SIGILL (Python's faulthandler does) are kept for what is passed on.
PYGEN_EXPORT int sigaction(int signal, const struct sigaction* action, struct sigaction* previous) noexcept {
  if (signal != SIGILL) return real_sigaction()(signal, action, previous);
  const struct sigaction before = wanted;
  if (action) wanted = *action;
  if (previous) *previous = before;
  return 0;
}

PYGEN_EXPORT sighandler_t signal(int signal, sighandler_t handler) noexcept {
  struct sigaction action = {}, previous;
  action.sa_handler = handler;
  action.sa_flags = SA_RESTART;
  return sigaction(signal, &action, &previous) == 0 ? previous.sa_handler : SIG_ERR;
}

// 1 where AMX instructions come to this library; 0 where the CPU and the kernel have them, and nothing is emulated.
// pygen asks here when it looks for its levels.
PYGEN_EXPORT int pygen_amx_is_emulated() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1)) return 1;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return 1;
  unsigned low, high;
  asm("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low >> 17 & 3) != 3;
}

// How many instructions were executed here, by all threads.
PYGEN_EXPORT unsigned long long pygen_amx_emulated_instructions() { return executed.load(std::memory_order_relaxed); }
