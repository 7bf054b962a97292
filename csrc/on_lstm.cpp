// The recurrence of an ON-LSTM layer on the CPU: checks, allocation, steps and threads. A step is a product with the
// recurrent weight, packed once (csrc/cpu/packed_product.cpp), and the cell (csrc/cpu/on_lstm.cpp).
#include "cpu/on_lstm.h"

#include <algorithm>
#include <cstring>
#include <tuple>
#include <vector>

#include "capability.h"
#include "cpu/packed_product.h"
#include "scratch.h"
#include "tensor.h"

namespace pygen {
namespace {

using MaybeTensor = std::optional<Tensor>;

const PackedProductKernels& products() { return PYGEN_KERNELS(packed_product_kernels); }
const OnLstmKernels& cells_kernels() { return PYGEN_KERNELS(on_lstm_kernels); }

// Contiguous, in the type that is computed in.
Tensor prepared(const Tensor& x) {
  const ScalarType dtype = compute_dtype(x.scalar_type());
  return made_contiguous(x.scalar_type() == dtype ? x : torch::stable::to(x, dtype));
}

MaybeTensor prepared(const MaybeTensor& x) { return x ? MaybeTensor(prepared(*x)) : MaybeTensor(); }

Tensor in_dtype(const Tensor& x, ScalarType dtype) {
  return x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
}

Tensor empty_matrix(int64_t rows, int64_t columns, ScalarType dtype) {
  const int64_t sizes[] = {rows, columns};
  return empty_contiguous(sizes, 2, dtype);
}

Tensor zero_matrix(int64_t rows, int64_t columns, ScalarType dtype) {
  const Tensor result = empty_matrix(rows, columns, dtype);
  std::memset(result.mutable_data_ptr(), 0, static_cast<size_t>(rows * columns * bytes_of(dtype)));
  return result;
}

// The shape of a layer's sequences: rows are steps behind each other, the sequences that have the step, longest first.
struct Layer {
  int64_t rows, batch, size, width, chunk_size;
  std::vector<int64_t> sizes, starts;  // of each step: its rows, and where they begin

  Layer(int64_t rows, int64_t width, const Tensor& cell, const MaybeTensor& batch_sizes, int64_t chunk_size,
        bool single_step)
      : rows(rows), batch(cell.size(0)), size(cell.size(1)), width(width), chunk_size(chunk_size) {
    PYGEN_CHECK(chunk_size > 0 && size > 0 && size % chunk_size == 0 && width == 2 * (size / chunk_size) + 4 * size,
                "on_lstm: expected 2 H / chunk_size + 4 H columns of gates and chunk_size to divide H, got ", width,
                " columns, H = ", size, " and chunk_size ", chunk_size);
    PYGEN_CHECK(!single_step || rows == batch, "on_lstm: without a weight there is one step of ", batch, " rows, got ",
                rows);
    if (batch_sizes) {
      read(*batch_sizes);
    } else {
      PYGEN_CHECK(batch ? rows % batch == 0 : rows == 0, "on_lstm: gates must have a multiple of the ", batch,
                  " sequences' rows, got ", rows);
      sizes.assign(batch ? rows / batch : 0, batch);
    }
    int64_t start = 0;
    for (const int64_t count : sizes) {
      starts.push_back(start);
      start += count;
    }
    PYGEN_CHECK(start == rows, "on_lstm: batch_sizes must add up to the ", rows, " rows of gates, got ", start);
  }

  int64_t steps() const { return static_cast<int64_t>(sizes.size()); }
  // The sequences that go on behind a step.
  int64_t going_on(int64_t t) const { return t + 1 < steps() ? sizes[t + 1] : 0; }
  // Where a step's rows find the state before them among all steps' states.
  int64_t start_before(int64_t t) const { return starts[t - 1]; }

 private:
  void read(const Tensor& batch_sizes) {
    PYGEN_CHECK(batch_sizes.scalar_type() == ScalarType::Long && batch_sizes.dim() == 1,
                "on_lstm: batch_sizes must be int64 (T,), got ", dtype_string(batch_sizes.scalar_type()), " ",
                shape_string(batch_sizes));
    const Tensor flat = made_contiguous(batch_sizes);
    const auto* const data = static_cast<const int64_t*>(flat.const_data_ptr());
    sizes.assign(data, data + flat.numel());
    int64_t before = batch;
    for (const int64_t count : sizes) {
      PYGEN_CHECK(0 <= count && count <= before, "on_lstm: batch_sizes must not increase, from at most the ", batch,
                  " sequences on, got ", count, " after ", before);
      before = count;
    }
  }
};

// A tensor's rows of `columns` elements; null where there is no tensor.
class Rows {
 public:
  Rows() = default;
  Rows(const Tensor& x, int64_t columns)
      : data_(static_cast<char*>(const_cast<void*>(x.const_data_ptr()))), bytes_(columns * bytes_of(x.scalar_type())) {}
  Rows(const MaybeTensor& x, int64_t columns) : Rows(x ? Rows(*x, columns) : Rows()) {}

  char* operator[](int64_t row) const { return data_ ? data_ + row * bytes_ : nullptr; }
  void copy(int64_t to, const Rows& from, int64_t row, int64_t count) const {
    if (count > 0) std::memcpy((*this)[to], from[row], static_cast<size_t>(count * bytes_));
  }

 private:
  char* data_ = nullptr;
  int64_t bytes_ = 0;
};

// The recurrent weight (W, H), packed for products from one side or the other.
class PackedWeight {
 public:
  PackedWeight(const Tensor& weight, const MaybeTensor& mask, bool transposed)
      : type_(weight.scalar_type() == ScalarType::Double),
        depth_(weight.size(transposed ? 1 : 0)),
        columns_(weight.size(transposed ? 0 : 1)),
        packed_(panels() * depth_ * products().panel_columns[type_] * bytes_of(weight.scalar_type())) {
    const int64_t row = weight.size(1);
    const PackSource source = {weight.const_data_ptr(),
                               mask ? static_cast<const bool*>(mask->const_data_ptr()) : nullptr, transposed ? 1 : row,
                               transposed ? row : 1};
    const int64_t grain = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, panel_elements()));
    parallel_for(panels(), grain, [&](int64_t first, int64_t last) {
      products().pack[type_](source, depth_, columns_, first, last, packed_.data());
    });
  }

  int64_t panels() const {
    const int64_t panel = products().panel_columns[type_];
    return (columns_ + panel - 1) / panel;
  }
  int64_t bytes() const { return panels() * panel_elements() * (type_ ? 8 : 4); }

  // out = start + a times the weight, for rows that are contiguous, and the columns of some panels.
  void multiply(const void* a, const void* start, void* out, int64_t rows, int64_t first, int64_t last) const {
    products().multiply[type_]({a, depth_, packed_.data(), start, columns_, out, columns_, rows, depth_, columns_},
                               first, last);
  }

 private:
  int64_t panel_elements() const { return depth_ * products().panel_columns[type_]; }

  int type_;
  int64_t depth_, columns_;
  Scratch packed_;
};

// Rows that a thread must have to take them through all steps alone, and the largest matrix that its cache then keeps.
constexpr int64_t kRowsAlone = 8;
constexpr int64_t kBytesAlone = int64_t{3} << 19;

// product(t, rows, panels) and cell(t, rows), as half-open ranges: forward, from the first step and the product first;
// backward, from the last step and the cell first. Sequences do not meet: threads either take their rows through all
// steps, or, where the matrix is large or the rows are few, share the columns of every step's product.
template <typename Product, typename Cell>
void over_steps(const Layer& layer, const PackedWeight* weight, bool forward, const Product& product,
                const Cell& cell) {
  const int64_t threads = torch::stable::get_num_threads(), steps = layer.steps();
  const auto step_at = [&](int64_t i) { return forward ? i : steps - 1 - i; };
  const auto share = [&](int64_t count) { return std::max<int64_t>(1, (count + threads - 1) / threads); };
  const int64_t work = layer.width * (weight ? layer.size : 16);
  if (!weight || threads == 1 || layer.rows * work < 4 * kElementsPerTask ||
      (weight->bytes() <= kBytesAlone && layer.batch >= kRowsAlone * threads)) {
    // A few rows are not worth a thread.
    const int64_t least = weight ? std::max<int64_t>(1, 4 * kElementsPerTask / std::max<int64_t>(1, steps * work))
                                 : std::max<int64_t>(1, kElementsPerTask / layer.width);
    parallel_for(layer.batch, std::max(share(layer.batch), least), [&](int64_t begin, int64_t end) {
      for (int64_t i = 0; i < steps; ++i) {
        const int64_t t = step_at(i), last = std::min(end, layer.sizes[t]);
        if (last <= begin) continue;
        if (forward && weight) product(t, begin, last, 0, weight->panels());
        cell(t, begin, last);
        if (!forward && weight) product(t, begin, last, 0, weight->panels());
      }
    });
    return;
  }
  for (int64_t i = 0; i < steps; ++i) {
    const int64_t t = step_at(i), rows = layer.sizes[t];
    const auto all_columns = [&] {
      parallel_for(weight->panels(), share(weight->panels()),
                   [&](int64_t first, int64_t last) { product(t, 0, rows, first, last); });
    };
    if (forward) all_columns();
    parallel_for(rows, share(rows), [&](int64_t begin, int64_t end) { cell(t, begin, end); });
    if (!forward) all_columns();
  }
}

void check_same(const MaybeTensor& x, const char* name, int64_t rows, int64_t columns) {
  PYGEN_CHECK(!x || (x->dim() == 2 && x->size(0) == rows && x->size(1) == columns), "on_lstm: ", name, " must be (",
              rows, ", ", columns, "), got ", x ? shape_string(*x) : "");
}

void check_arguments(const Tensor& gates, const MaybeTensor& weight, const MaybeTensor& mask, const MaybeTensor& hidden,
                     const Tensor& cell, const MaybeTensor& zoneout) {
  PYGEN_CHECK(is_floating(gates.scalar_type()), "on_lstm: gates must be floating point, got ",
              dtype_string(gates.scalar_type()));
  PYGEN_CHECK(gates.dim() == 2 && cell.dim() == 2, "on_lstm: gates must be (N, W) and cell (B, H), got ",
              shape_string(gates), " and ", shape_string(cell));
  const int64_t width = gates.size(1), batch = cell.size(0), size = cell.size(1);
  check_same(weight, "weight", width, size);
  check_same(mask, "mask", width, size);
  check_same(hidden, "hidden", batch, size);
  PYGEN_CHECK(!mask || mask->scalar_type() == ScalarType::Bool, "on_lstm: mask must be bool");
  PYGEN_CHECK(hidden || !weight, "on_lstm: with a weight the hidden state before must be given");
  PYGEN_CHECK(!zoneout || (zoneout->dim() == 3 && zoneout->size(0) == 2 && zoneout->size(1) == gates.size(0) &&
                           zoneout->size(2) == size),
              "on_lstm: zoneout must be (2, ", gates.size(0), ", ", size, "), got ",
              zoneout ? shape_string(*zoneout) : "");
  const ScalarType wide = compute_dtype(gates.scalar_type());
  for (const MaybeTensor& x : {weight, hidden, MaybeTensor(cell), zoneout})
    PYGEN_CHECK(!x || (is_floating(x->scalar_type()) && compute_dtype(x->scalar_type()) == wide),
                "on_lstm: expected all tensors of a type like the gates' ", dtype_string(gates.scalar_type()), ", got ",
                x ? dtype_string(x->scalar_type()) : "");
}

using Found = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Found on_lstm(const Tensor& gates, const MaybeTensor& weight, const MaybeTensor& mask, const MaybeTensor& hidden,
              const Tensor& cell, const MaybeTensor& zoneout, const MaybeTensor& batch_sizes, int64_t chunk_size,
              bool save) {
  check_arguments(gates, weight, mask, hidden, cell, zoneout);
  const Layer layer(gates.size(0), gates.size(1), cell, batch_sizes, chunk_size, !weight);
  const ScalarType dtype = compute_dtype(gates.scalar_type());
  const int type = dtype == ScalarType::Double;
  const Tensor x = prepared(gates), first_cell = prepared(cell);
  const MaybeTensor keep = prepared(zoneout);
  // Zeros where there is none, if anybody asks: what stays in zoneout, and the end of a sequence without a step.
  const MaybeTensor first_hidden =
      hidden || !(zoneout || batch_sizes) ? prepared(hidden) : zero_matrix(cell.size(0), cell.size(1), dtype);
  const MaybeTensor dropped = mask ? MaybeTensor(made_contiguous(*mask)) : mask;
  std::optional<PackedWeight> packed;
  if (weight) packed.emplace(prepared(*weight), dropped, true);

  const int64_t size = layer.size, width = layer.width, batch = layer.batch;
  const Tensor output = empty_matrix(layer.rows, size, dtype);
  const Tensor last_hidden = empty_matrix(batch, size, dtype), last_cell = empty_matrix(batch, size, dtype);
  const Tensor distances = empty_matrix(2, layer.rows, dtype);
  // Without a backward to come: the step in hand, and the cells of two steps by turns.
  const Tensor cells = empty_matrix(save ? layer.rows : 2 * batch, size, dtype);
  const Tensor activations = empty_matrix(save ? layer.rows : batch, width, dtype);
  const auto at = [&](int64_t t) { return save ? layer.starts[t] : 0; };
  const auto cell_at = [&](int64_t t) { return save ? layer.starts[t] : t % 2 * batch; };

  const Rows in(x, width), act(activations, width), c(cells, size), h(output, size), h0(first_hidden, size),
      c0(first_cell, size), h_end(last_hidden, size), c_end(last_cell, size), kept(keep, size), distance(distances, 1);
  const auto hidden_before = [&](int64_t t, int64_t row) { return t ? h[layer.start_before(t) + row] : h0[row]; };
  const auto product = [&](int64_t t, int64_t begin, int64_t end, int64_t first, int64_t last) {
    packed->multiply(hidden_before(t, begin), in[layer.starts[t] + begin], act[at(t) + begin], end - begin, first,
                     last);
  };
  const auto run_cell = [&](int64_t t, int64_t begin, int64_t end) {
    const Scratch scratch(on_lstm_scratch_bytes(size));
    const int64_t row = layer.starts[t] + begin;
    if (!packed) act.copy(at(t) + begin, in, row, end - begin);
    const void* const before = t ? c[cell_at(t - 1) + begin] : c0[begin];
    cells_kernels().forward[type]({end - begin, size, chunk_size, act[at(t) + begin], before, hidden_before(t, begin),
                                   kept[row], kept[layer.rows + row], c[cell_at(t) + begin], h[row], distance[row],
                                   distance[layer.rows + row], scratch.data()});
    const int64_t ending = std::max(begin, layer.going_on(t));
    h_end.copy(ending, h, layer.starts[t] + ending, end - ending);
    c_end.copy(ending, c, cell_at(t) + ending, end - ending);
  };
  over_steps(layer, packed ? &*packed : nullptr, true, product, run_cell);
  const int64_t started = layer.steps() ? layer.sizes[0] : 0;
  c_end.copy(started, c0, started, batch - started);
  if (first_hidden) h_end.copy(started, h0, started, batch - started);

  const int64_t none = 0;
  const auto nothing = [&] { return empty_contiguous(&none, 1, dtype); };
  return {in_dtype(output, gates.scalar_type()),
          in_dtype(last_hidden, gates.scalar_type()),
          last_cell,
          distances,
          save ? cells : nothing(),
          save ? activations : nothing()};
}

std::tuple<Tensor, Tensor, Tensor> on_lstm_backward(
    const MaybeTensor& grad_output, const MaybeTensor& grad_hidden, const MaybeTensor& grad_cell,
    const MaybeTensor& grad_distances, const MaybeTensor& weight, const MaybeTensor& mask, const Tensor& cell,
    const MaybeTensor& zoneout, const Tensor& output, const Tensor& cells, const Tensor& activations,
    const MaybeTensor& batch_sizes, int64_t chunk_size) {
  PYGEN_CHECK(cell.dim() == 2 && activations.dim() == 2 && output.dim() == 2,
              "on_lstm_backward: called with what on_lstm did not save");
  const Layer layer(activations.size(0), activations.size(1), cell, batch_sizes, chunk_size, !weight);
  const int64_t size = layer.size, width = layer.width, batch = layer.batch, rows = layer.rows;
  check_same(output, "output", rows, size);
  check_same(cells, "cells", rows, size);
  check_same(weight, "weight", width, size);
  check_same(mask, "mask", width, size);
  check_same(grad_output, "the gradient of the output", rows, size);
  check_same(grad_hidden, "the gradient of the hidden state", batch, size);
  check_same(grad_cell, "the gradient of the cell state", batch, size);
  check_same(grad_distances, "the gradient of the distances", 2, rows);
  const ScalarType dtype = activations.scalar_type();
  const int type = dtype == ScalarType::Double;
  const Tensor first_cell = prepared(cell), states = made_contiguous(cells), saved = made_contiguous(activations);
  const MaybeTensor keep = prepared(zoneout), of_output = prepared(grad_output),
                    of_distances = prepared(grad_distances);
  const MaybeTensor dropped = mask ? MaybeTensor(made_contiguous(*mask)) : mask;
  std::optional<PackedWeight> packed;
  if (weight) packed.emplace(prepared(*weight), dropped, false);

  // What comes back from behind a sequence's last step is the gradient of its last state.
  const auto carried = [&](const MaybeTensor& grad) {
    if (!grad) return zero_matrix(batch, size, dtype);
    const Tensor result = empty_matrix(batch, size, dtype);
    Rows(result, size).copy(0, Rows(prepared(*grad), size), 0, batch);
    return result;
  };
  const Tensor of_hidden = carried(grad_hidden), of_cell = carried(grad_cell);
  const Tensor of_gates = empty_matrix(rows, width, dtype);
  const Rows act(saved, width), c(states, size), c0(first_cell, size), kept(keep, size), out(of_output, size),
      distance(of_distances, 1), dh(of_hidden, size), dc(of_cell, size), dg(of_gates, width);

  const auto run_cell = [&](int64_t t, int64_t begin, int64_t end) {
    const Scratch scratch(on_lstm_scratch_bytes(size));
    const int64_t row = layer.starts[t] + begin;
    const void* const before = t ? c[layer.start_before(t) + begin] : c0[begin];
    cells_kernels().backward[type]({end - begin, size, chunk_size, act[row], before, c[row], kept[row],
                                    kept[rows + row], out[row], distance[row], distance[rows + row], dh[begin],
                                    dc[begin], dg[row], scratch.data()});
  };
  const auto product = [&](int64_t t, int64_t begin, int64_t end, int64_t first, int64_t last) {
    packed->multiply(dg[layer.starts[t] + begin], dh[begin], dh[begin], end - begin, first, last);
  };
  over_steps(layer, packed ? &*packed : nullptr, false, product, run_cell);
  return {in_dtype(of_gates, output.scalar_type()), in_dtype(of_hidden, output.scalar_type()),
          in_dtype(of_cell, cell.scalar_type())};
}

}  // namespace
}  // namespace pygen

STABLE_TORCH_LIBRARY_IMPL(pygen, CPU, m) {
  m.impl("on_lstm", TORCH_BOX(&pygen::on_lstm));
  m.impl("on_lstm_backward", TORCH_BOX(&pygen::on_lstm_backward));
}
