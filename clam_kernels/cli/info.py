# SPDX-License-Identifier: Apache-2.0
"""`clam info`: facts of the installation, or of a model file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .errors import ArgumentError
from .facts import facts_of, plain


def show_info(options: argparse.Namespace) -> int:
    """Print the facts, and return the exit code."""
    from .. import info

    if options.model is None:
        return info.show(options.json, options.selftest)
    if options.selftest:
        raise ArgumentError("--selftest belongs to `clam info` without a model file")
    facts = _facts_of_file(options.model)
    print(json.dumps(facts, allow_nan=False) if options.json else info.text(_lines(facts)))
    return 0


def _facts_of_file(path: Path) -> dict[str, Any]:
    """What is in a model file, as JSON has it."""
    from .. import estimators, serialize

    model = getattr(estimators, serialize.class_of(path)).load(path)
    names = getattr(model, "feature_names_in_", None)
    facts = {
        "file": str(path),
        **facts_of(model),
        "rows": len(model.labels_),
        "features": model.n_features_in_,
        "feature_names": names,
        "scale": getattr(model, "scale_", None),
        "settings": model.get_params(deep=False),
        "version": serialize.version_of(path),
    }
    return {name: plain(value) for name, value in facts.items()}


def _lines(facts: dict[str, Any]) -> dict[str, Any]:
    """The same facts with one short text each, for a reader."""
    from ..tables import listed

    names = facts["feature_names"]
    scale = facts["scale"]
    short = dict(facts)
    short["feature_names"] = "none" if names is None else listed(names)
    if scale is None:
        del short["scale"]
    else:
        short["scale"] = "1 in every column" if set(scale) == {1.0} else "one for each column"
    short["settings"] = {
        name: f"array of {len(value)} rows" if isinstance(value, list) else value
        for name, value in facts["settings"].items()
    }
    return short
