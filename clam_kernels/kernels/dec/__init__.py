# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of deep embedded clustering; the launches are in `stats`, `losses`, `backward`."""
