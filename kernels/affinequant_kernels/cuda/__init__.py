"""Triton kernels, and which configuration to launch them with."""
