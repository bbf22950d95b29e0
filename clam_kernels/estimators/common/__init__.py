# SPDX-License-Identifier: Apache-2.0
"""What estimators share: rows in, the frame, files, callbacks, threads."""
