# SPDX-License-Identifier: Apache-2.0
"""Kernels of the associative memory, and the launches of the compiled CUDA library (`cuda`)."""
