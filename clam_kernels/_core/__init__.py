# SPDX-License-Identifier: Apache-2.0
"""Code that all ops use: registry, checks, choice of the backend, the compiled library."""
