# SPDX-License-Identifier: Apache-2.0
"""Which contract cases are `slow`: `make test` skips them, `make test-all` runs them, and `make
test-interpreted` runs those of the interpreter.

Triton's interpreter takes a tenth of a second for each launch of a kernel. Of every op, `make test`
interprets each sample once in float32 (`test_samples`), and some samples in the other tests and in
float16. Torch alone is fast: no case of the reference is slow.
"""

from __future__ import annotations

from typing import Any

import torch

from clam_kernels import testing

# Tests that interpret these samples only, and this layout only where one is named.
SOME_SAMPLES: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "test_inputs": ("strided", ("plain", "batch-crossed")),
    "test_upstream_gradients": ("transposed", ("everything", "one-masked")),
    "test_a_row_has_the_same_bits_wherever_it_stands": (None, ()),
    "test_op": (None, ("plain", "everything")),
    "test_op_in_half": (None, ("plain", "everything")),
    "test_outputs_are_new_and_contiguous": (None, ("plain", "everything")),
    "test_repeats_bit_for_bit": (None, ("plain", "everything")),
    "test_far_from_the_origin": (None, ()),
    "test_narrow_and_wide": (None, ()),
    "test_huge_and_tiny_scores": (None, ()),
}
# Largest number of rows that these tests interpret.
MOST_ROWS = {"test_sums_of_equal_rows_keep_their_digits": 1024}
# Scenes of tests/contract/test_am_far.py that run interpreted: the interpreter takes a tenth of a
# second for one step of a row that needs differences.
SCENES = {
    "test_recursion": ("sentinel-10000", "two-groups-1e6"),
    "test_energy": ("sentinel-10000", "two-groups-1e6", "scale-1e19"),
    "test_nearest": ("sentinel-10000", "two-groups-1e6", "scale-1e-30"),
}
# A call of these families has a dozen launches or more: the other tests run these samples only,
# no test runs the long samples, and only the first sample runs in float16.
FEW_SAMPLES = {"sinkhorn": ("plain", "bias")}
LONG_SAMPLES = ("batch-crossed", "ten-iterations")


def is_slow(test: str, params: dict[str, Any]) -> bool:
    """Whether the interpreter takes too long for this case of a test."""
    sample = getattr(params.get("sample"), "name", None)
    if test in SOME_SAMPLES:
        layout, samples = SOME_SAMPLES[test]
        if sample not in samples or layout not in (None, params.get("layout")):
            return True
    if test in SCENES and (
        params.get("name") not in SCENES[test] or params.get("steps", 1) > 1 == params.get("step")
    ):
        return True
    if params.get("n", 0) > MOST_ROWS.get(test, params.get("n", 0)):
        return True
    spec = params.get("spec")
    if spec is None:
        return False
    few = FEW_SAMPLES.get(spec.family)
    if params.get("dtype") == torch.float16 and sample not in _in_float16(spec, few):
        return True
    if few is None or sample is None or sample in few:
        return False
    return test != "test_samples" or sample in LONG_SAMPLES


def _in_float16(spec: Any, few: tuple[str, ...] | None) -> tuple[str | None, ...]:
    """Samples that also run interpreted in float16, where only a load differs: one of each kind."""
    return few[:1] if few is not None else (None, *testing.selection(spec.name, "traced"))
