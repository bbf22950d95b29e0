# SPDX-License-Identifier: Apache-2.0
"""What trainers of an encoder share: batches, optimisers, checkpoints, the loop."""
