"""The GPU kernels, one file per op, in Triton; `pygen.ops` registers them and `aot` compiles them without a GPU."""
