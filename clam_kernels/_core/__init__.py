# SPDX-License-Identifier: Apache-2.0
"""Mechanisms every op stands on: registry, checks, backend choice, the compiled library."""
