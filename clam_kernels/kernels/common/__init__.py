# SPDX-License-Identifier: Apache-2.0
"""What kernels of all families share: the sweep, folds, scores, halves, operands, launches."""
