# SPDX-License-Identifier: Apache-2.0
"""DEC: scikit-learn's conventions, inputs, results of a fit."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from clam_kernels import DEC

QUICK = {
    "hidden": (16,), "n_components": 3, "pretrain_epochs": 3, "n_epochs": 2, "n_init": 2,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning", "ignore:DEC. ")
@parametrize_with_checks([DEC(2, **QUICK), DEC(2, variant="idec", **QUICK)])
def test_scikit_learn_checks(estimator: DEC, check: object) -> None:
    check(estimator)


def test_a_fit_predicts_its_labels() -> None:
    rng = np.random.default_rng(0)
    y = np.arange(120) % 3
    x = (3 * np.eye(5)[y] + rng.normal(size=(120, 5))).astype(np.float32)
    model = DEC(3, random_state=0, **{**QUICK, "pretrain_epochs": 60}).fit(x)
    np.testing.assert_array_equal(model.predict(x), model.labels_)
    np.testing.assert_array_equal(model.predict_proba(x).argmax(1), model.labels_)
    assert model.labels_.dtype == np.int32
