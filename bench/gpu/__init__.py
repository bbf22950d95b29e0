# SPDX-License-Identifier: Apache-2.0
"""The stages of bench/gpu_check.py, each a process of its own: `python3 -m bench.gpu STAGE`."""
