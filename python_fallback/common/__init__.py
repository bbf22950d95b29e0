# SPDX-License-Identifier: Apache-2.0
"""Code that all families share: row chunks, scores, problems of a batch."""
