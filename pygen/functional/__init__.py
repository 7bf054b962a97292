"""Losses and penalties as plain differentiable PyTorch functions; no kernels of their own."""
