# SPDX-License-Identifier: Apache-2.0
"""What all families share: row chunks, scores, problems of a batch."""
