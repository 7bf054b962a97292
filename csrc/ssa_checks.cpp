#include "ssa_checks.h"

#include "shared/ssa_program.h"

namespace pygen {
namespace {

void check_range(const char* what, const int32_t* values, int64_t n, int64_t low, int64_t high) {
  for (int64_t i = 0; i < n; ++i)
    PYGEN_CHECK(values[i] >= low && values[i] < high, "ssa_run: ", what, "[", i, "] = ", values[i], " is not in [", low,
                ", ", high, ")");
}

// Ascending offsets from 0 to `total`.
void check_offsets(const char* what, const int32_t* start, int64_t n, int64_t total) {
  PYGEN_CHECK(start[0] == 0 && start[n] == total, "ssa_run: damaged program: ", what, " must run from 0 to ", total);
  for (int64_t i = 0; i < n; ++i)
    PYGEN_CHECK(start[i] <= start[i + 1], "ssa_run: damaged program: ", what, " must not decrease");
}

void check_span(const char* what, int32_t begin, int32_t end, int32_t total) {
  PYGEN_CHECK(begin >= 0 && begin <= end && end <= total, "ssa_run: damaged program: ", what, " is [", begin, ", ", end,
              ") of ", total, " instructions");
}

void check_header(const int32_t* header) {
  PYGEN_CHECK(header[0] == kPackedVersion, "ssa_run: the program has version ", header[0], ", expected ",
              kPackedVersion);
  const int sizes[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 20, 21};
  for (int i : sizes) PYGEN_CHECK(header[i] >= 0, "ssa_run: damaged program: header[", i, "] = ", header[i]);
}

void check_sections(const Network& n) {
  const int64_t inputs = int64_t{n.species} + n.parameters + n.literals;
  // Every slot behind the time has an instruction that writes it: more of them would be memory for nothing.
  PYGEN_CHECK(inputs < n.slots && n.slots - inputs - 1 <= n.instructions && n.time_slot == inputs,
              "ssa_run: damaged program: ", n.slots, " slots, time in slot ", n.time_slot, ", behind ", inputs);
  check_range("rate_slot", n.rate_slot, n.reactions, 0, n.slots);
  check_offsets("factor_start", n.factor_start, n.reactions, n.factors);
  check_range("factor_slot", n.factor_slot, n.factors, 0, n.slots);
  check_offsets("change_start", n.change_start, n.reactions, n.changes);
  check_range("change_slot", n.change_slot, n.changes, 0, n.species);
  for (int64_t i = 0; i < n.instructions; ++i) {
    check_range("operation", n.code + i * kInstructionInts, 1, 0, baseline::kOperations);
    check_range("operand", n.code + i * kInstructionInts + 1, kInstructionInts - 1, 0, n.slots);
  }
  check_span("setup", n.setup_begin, n.setup_end, n.instructions);
  check_span("step", n.step_begin, n.step_end, n.instructions);
  check_span("check", n.check_begin, n.check_end, n.instructions);
  check_range("break_slot", n.break_slot, n.breaks, 0, n.slots);
  check_range("checked_slot", n.checked_slot, n.checked, 0, n.species);
  check_range("attention_slot", &n.attention_slot, 1, -1, n.slots);
  check_range("stop_slot", &n.stop_slot, 1, -1, n.slots);
  PYGEN_CHECK(n.events <= 64, "ssa_run: at most 64 events, got ", n.events);
  check_range("trigger_slot", n.trigger_slot, n.events, 0, n.slots);
  check_range("previous_slot", n.previous_slot, n.events, 0, n.slots);
  check_range("priority_slot", n.priority_slot, n.events, -1, n.slots);
  for (int32_t e = 0; e < n.events; ++e)
    check_span("an event's program", n.program_begin[e], n.program_end[e], n.instructions);
  check_offsets("assignment_start", n.assignment_start, n.events, n.assignments);
  check_range("assignment_target", n.assignment_target, n.assignments, 0, n.species + n.parameters);
  check_range("assignment_source", n.assignment_source, n.assignments, 0, n.slots);
}

void check_tensor(const char* name, const Tensor& x, ScalarType dtype, int64_t dim) {
  PYGEN_CHECK(x.scalar_type() == dtype && x.dim() == dim && x.is_contiguous(), "ssa_run: ", name,
              " must be contiguous, ", dtype_string(dtype), ", of ", dim, " dimensions, got ",
              dtype_string(x.scalar_type()), " ", shape_string(x));
}

void check_rows(const char* name, const Tensor& x, int64_t rows, int64_t columns) {
  check_tensor(name, x, ScalarType::Double, 2);
  PYGEN_CHECK((x.size(0) == 1 || x.size(0) == rows) && x.size(1) == columns, "ssa_run: ", name, " must be [1 or ", rows,
              ", ", columns, "], got ", shape_string(x));
}

void check_length(const char* name, const Tensor& x, ScalarType dtype, int64_t length) {
  check_tensor(name, x, dtype, 1);
  PYGEN_CHECK(x.size(0) == length, "ssa_run: ", name, " must be [", length, "], got ", shape_string(x));
}

uint32_t checked_word(const char* name, int64_t x) {
  PYGEN_CHECK(x >= 0 && x <= 0xffffffffll, "ssa_run: ", name, " must be in [0, 2^32), got ", x);
  return static_cast<uint32_t>(x);
}

void check_devices(const EnsembleTensors& x) {
  const Tensor* tensors[] = {&x.initial,  &x.parameters, &x.times,    &x.status,
                             &x.n_events, &x.stop_time,  &x.log_time, &x.log_reaction};
  for (const Tensor* tensor : tensors)
    PYGEN_CHECK(tensor->is_cpu() == x.counts.is_cpu() && tensor->get_device_index() == x.counts.get_device_index(),
                "ssa_run: all tensors but code, literals, recorded and control must be on one device");
  PYGEN_CHECK(x.control.is_cpu() && x.recorded.is_cpu(), "ssa_run: control and recorded must be on the CPU");
}

template <typename T>
T* data(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

}  // namespace

Network checked_network(const Tensor& code, const Tensor& literals) {
  PYGEN_CHECK(code.is_cpu() && literals.is_cpu(), "ssa_run: code and literals must be on the CPU");
  check_tensor("code", code, ScalarType::Int, 1);
  check_tensor("literals", literals, ScalarType::Double, 1);
  const auto* header = static_cast<const int32_t*>(code.const_data_ptr());
  PYGEN_CHECK(code.size(0) >= kHeaderInts, "ssa_run: damaged program: ", code.size(0), " integers");
  check_header(header);
  int64_t length = 0;
  const Network net = network_at(header, header, static_cast<const double*>(literals.const_data_ptr()), &length);
  PYGEN_CHECK(code.size(0) == length, "ssa_run: damaged program: ", code.size(0), " integers, expected ", length);
  PYGEN_CHECK(literals.size(0) == net.literals, "ssa_run: literals must be [", net.literals, "], got ",
              shape_string(literals));
  check_sections(net);
  return net;
}

Ensemble checked_ensemble(const EnsembleTensors& x, int64_t* next_row) {
  check_devices(x);
  check_tensor("times", x.times, ScalarType::Double, 1);
  check_tensor("recorded", x.recorded, ScalarType::Int, 1);
  check_tensor("status", x.status, ScalarType::Char, 1);
  const int64_t rows = x.status.size(0), n_times = x.times.size(0), n_recorded = x.recorded.size(0);
  check_rows("initial", x.initial, rows, x.net.species);
  check_rows("parameters", x.parameters, rows, x.net.parameters);
  PYGEN_CHECK(n_times >= 1, "ssa_run: times must not be empty");
  check_range("recorded", data<const int32_t>(x.recorded), n_recorded, 0, x.net.species);
  check_tensor("counts", x.counts, ScalarType::Long, 3);
  PYGEN_CHECK(x.counts.size(0) == rows && x.counts.size(1) == n_times && x.counts.size(2) == n_recorded,
              "ssa_run: counts must be [", rows, ", ", n_times, ", ", n_recorded, "], got ", shape_string(x.counts));
  check_length("n_events", x.n_events, ScalarType::Long, rows);
  check_length("stop_time", x.stop_time, ScalarType::Double, rows);
  check_length("control", x.control, ScalarType::Long, 2);
  check_tensor("log_time", x.log_time, ScalarType::Double, 1);
  check_length("log_reaction", x.log_reaction, ScalarType::Int, x.log_time.size(0));
  PYGEN_CHECK(x.log_time.size(0) == 0 || rows == 1, "ssa_run: the log is for one trajectory, got ", rows);
  PYGEN_CHECK(x.first >= 0, "ssa_run: first must not be negative, got ", x.first);
  PYGEN_CHECK(x.max_events >= -1, "ssa_run: max_events must be -1 (none) or a number of events, got ", x.max_events);
  Ensemble run;
  run.initial = data<const double>(x.initial);
  run.parameters = data<const double>(x.parameters);
  run.initial_stride = x.initial.size(0) == 1 ? 0 : x.net.species;
  run.parameter_stride = x.parameters.size(0) == 1 ? 0 : x.net.parameters;
  run.times = data<const double>(x.times);
  run.n_times = n_times;
  run.recorded = data<const int32_t>(x.recorded);
  run.n_recorded = n_recorded;
  run.start = x.start;
  run.first = static_cast<uint64_t>(x.first);
  run.rows = rows;
  run.share = rows;
  run.seed = checked_word("seed", x.seed);
  run.stream = checked_word("stream", x.stream);
  run.max_events = x.max_events < 0 ? INT64_MAX : x.max_events;
  run.tau_epsilon = x.tau_epsilon;
  run.counts = data<int64_t>(x.counts);
  run.status = data<int8_t>(x.status);
  run.n_events = data<int64_t>(x.n_events);
  run.stop_time = data<double>(x.stop_time);
  run.log_time = data<double>(x.log_time);
  run.log_reaction = data<int32_t>(x.log_reaction);
  run.log_size = x.log_time.size(0);
  run.next_row = next_row;
  run.control = data<int64_t>(x.control);
  return run;
}

}  // namespace pygen
