// Every operator's schema: the list of what pygen offers to torch. Kernels: csrc/<op>.cpp for the CPU,
// triton_kernels/<op>.py and csrc/cuda/<op>.cu for the GPU. What the arguments mean: pygen/ops/<op>.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(pygen, m) {
  m.def("cumax(Tensor x, int dim, bool complement) -> Tensor");
  m.def("cumax_backward(Tensor grad, Tensor x, int dim, bool complement) -> Tensor");

  m.def(
      "affine_coupling(Tensor x, Tensor scale, Tensor shift, str scale_map, bool shift_first, float clamp, "
      "bool inverse) -> (Tensor, Tensor)");
  m.def(
      "affine_coupling_backward(Tensor? grad_y, Tensor? grad_log_det, Tensor x, Tensor scale, Tensor shift, "
      "str scale_map, bool shift_first, float clamp, bool inverse) -> (Tensor, Tensor)");
  m.def(
      "affine_coupling_halves(Tensor x, Tensor parameters, int dim, bool swap, str scale_map, bool shift_first, "
      "float clamp, bool inverse) -> (Tensor, Tensor)");
  m.def(
      "affine_coupling_halves_backward(Tensor? grad_z, Tensor? grad_log_det, Tensor x, Tensor parameters, int dim, "
      "bool swap, str scale_map, bool shift_first, float clamp, bool inverse) -> (Tensor, Tensor)");

  m.def(
      "rational_quadratic_spline(Tensor x, Tensor widths, Tensor heights, Tensor derivatives, bool inverse, str tails, "
      "float tail_bound, float min_bin_width, float min_bin_height, float min_derivative) -> (Tensor, Tensor)");
  m.def(
      "rational_quadratic_spline_backward(Tensor? grad_y, Tensor? grad_log_det, Tensor x, Tensor widths, "
      "Tensor heights, Tensor derivatives, bool inverse, str tails, float tail_bound, float min_bin_width, "
      "float min_bin_height, float min_derivative) -> (Tensor, Tensor, Tensor, Tensor)");

  m.def(
      "actnorm_conv1x1(Tensor x, Tensor bias, Tensor log_scale, Tensor lower, Tensor upper, Tensor log_diagonal, "
      "Tensor sign, Tensor permutation) -> (Tensor, Tensor)");
  m.def(
      "actnorm_conv1x1_inverse(Tensor z, Tensor bias, Tensor log_scale, Tensor lower, Tensor upper, "
      "Tensor log_diagonal, Tensor sign, Tensor permutation) -> (Tensor, Tensor)");
  m.def(
      "actnorm_conv1x1_backward(Tensor? grad_z, Tensor? grad_log_det, Tensor x, Tensor bias, Tensor log_scale, "
      "Tensor lower, Tensor upper, Tensor log_diagonal, Tensor sign, Tensor permutation) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");

  m.def(
      "nearest_codebook(Tensor x, Tensor codebook, str metric, Tensor? mask, bool return_distance, "
      "bool return_candidates) -> (Tensor, Tensor, Tensor)");
  m.def("codebook_statistics(Tensor x, Tensor indices, int num_codes, Tensor? mask) -> (Tensor, Tensor)");

  m.def(
      "power_iteration(Tensor[] weights, Tensor[] us, Tensor[] vs, int[] dims, int n_iterations, float eps, "
      "bool u_first, bool return_weights) -> (Tensor, Tensor[], Tensor[], Tensor[])");
  m.def(
      "power_iteration_backward(Tensor? grad_sigma, Tensor[] grads, Tensor[] weights, Tensor sigma, Tensor[] us, "
      "Tensor[] vs, int[] dims, float eps) -> Tensor[]");

  m.def(
      "on_lstm(Tensor gates, Tensor? weight, Tensor? mask, Tensor? hidden, Tensor cell, Tensor? zoneout, "
      "Tensor? batch_sizes, int chunk_size, bool save) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "on_lstm_backward(Tensor? grad_output, Tensor? grad_hidden, Tensor? grad_cell, Tensor? grad_distances, "
      "Tensor? weight, Tensor? mask, Tensor cell, Tensor? zoneout, Tensor output, Tensor cells, Tensor activations, "
      "Tensor? batch_sizes, int chunk_size) -> (Tensor, Tensor, Tensor)");

  m.def(
      "ssa_run(Tensor code, Tensor literals, Tensor initial, Tensor parameters, Tensor times, Tensor recorded, "
      "float start, int first, int seed, int stream, str method, float tau_epsilon, int max_events, int threads, "
      "Tensor(a!) control, Tensor(b!) counts, Tensor(c!) status, Tensor(d!) n_events, Tensor(e!) stop_time, "
      "Tensor(f!) log_time, Tensor(g!) log_reaction) -> ()");
  m.def("ssa_philox(Tensor counter, int key0, int key1) -> Tensor");
  m.def("ssa_math(int operation, Tensor a, Tensor b) -> Tensor");
  m.def("ssa_poisson(float mean, int n, int seed) -> Tensor");
}
