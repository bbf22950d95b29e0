# SPDX-License-Identifier: Apache-2.0
"""GPU kernels: the only room that imports triton, itself imported at the first call on a GPU."""
