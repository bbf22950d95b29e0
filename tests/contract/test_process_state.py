# SPDX-License-Identifier: Apache-2.0
"""State that all threads of a process share: what overlapping calls see, and that they
restore it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from _entries import ALL, K, X, encoder, noisy, same
from _state import MATMUL, modes, state, umask
from torch import Tensor, nn

import clam_kernels as ck
from clam_kernels import serialize, testing
from clam_kernels._core import backend as choice
from clam_kernels._core import dispatch
from clam_kernels.estimators.common import threads as _threads


class InThread:
    """A thread that runs one function at a time, each to its end before the caller continues."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1)

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        return self.pool.submit(function, *args).result()


@pytest.fixture
def threads():
    pool = [InThread(), InThread(), InThread()]
    yield pool
    for one in pool:
        one.pool.shutdown()


# ---- the precision of products -------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _own_precision():
    word, modes = torch.get_float32_matmul_precision(), [s.fp32_precision for s in MATMUL]
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision(word)
    for switch, mode in zip(MATMUL, modes, strict=True):
        switch.fp32_precision = mode


def test_overlapping_calls_restore_the_mode_of_products(threads):
    torch.set_float32_matmul_precision("medium")
    before = modes()
    blocks = [choice.float32_products() for _ in range(3)]
    for one, block in zip(threads, blocks, strict=True):
        one(block.__enter__)
        assert modes() == ["ieee", "ieee"]
    for i in (1, 0, 2):
        assert modes() == ["ieee", "ieee"]
        threads[i](blocks[i].__exit__, None, None, None)
    assert modes() == before
    assert torch.get_float32_matmul_precision() == "medium"


def test_many_calls_at_highest_restore_the_mode_of_products():
    torch.set_float32_matmul_precision("medium")
    before = modes()
    for spec in (spec for spec in ck.all_ops() if spec.precise):
        args = testing.problem(spec.name, 5, 4, 3).args

        def call(_: int, spec: Any = spec, args: Any = args) -> Any:
            return spec.packet(*args, precision="highest")

        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(call, range(40)))
        assert modes() == before
        for one in results[1:]:
            same(one, results[0])


def test_the_default_precision_does_not_depend_on_other_threads(threads):
    """`default_precision` is the user's, not the mode that another thread needs now."""
    set_by = {
        "medium": lambda: torch.set_float32_matmul_precision("medium"),
        "high": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    }
    for word, change in set_by.items():
        change()
        assert choice.default_precision() == word
        block = choice.float32_products()
        threads[0](block.__enter__)
        assert choice.default_precision() == word
        assert threads[1](choice.default_precision) == word
        threads[0](block.__exit__, None, None, None)
        assert choice.default_precision() == word
        torch.set_float32_matmul_precision("highest")
        for switch in MATMUL:
            switch.fp32_precision = "none"


def test_products_follow_the_general_mode_after_a_call():
    """If matmul has its mode only from `torch.backends.fp32_precision`, a call does not fix it
    there.
    """
    for switch in MATMUL:
        switch.fp32_precision = "none"
    torch.backends.fp32_precision = "tf32"
    ck.am_step(torch.zeros(2, 3), torch.zeros(4, 3), 1.0, precision="highest")
    assert modes() == ["tf32", "tf32"]
    torch.backends.fp32_precision = "ieee"
    assert modes() == ["ieee", "ieee"]


@pytest.mark.parametrize("word", ["highest", "high"])
def test_what_the_user_sets_during_a_call_stays(word):
    torch.set_float32_matmul_precision("medium")
    with choice.float32_products():
        torch.set_float32_matmul_precision(word)
        expected = modes()
    assert modes() == expected
    assert torch.get_float32_matmul_precision() == word


@pytest.mark.parametrize(
    ("device", "precision", "exact"),
    [("cpu", "highest", True), ("cpu", "medium", True), ("cuda", "highest", True),
     ("cuda", "medium", False)],
)  # fmt: skip
def test_a_cpu_multiplies_in_float32_in_all_modes(device, precision, exact):
    """On a CPU torch's lower modes may be bfloat16, which has three digits."""
    torch.set_float32_matmul_precision("medium")
    expected = ["ieee", "ieee"] if exact else modes()
    part = dispatch.Implementation("am_step", reference=modes, kernels={})
    with ck.backend("reference"):
        assert choice.run(part, device, precision, ()) == expected


@pytest.mark.parametrize("exact", [True, False])
def test_calls_of_the_two_kinds_wait_for_each_other(threads, exact):
    """Beside an exact call, a call in the user's mode would return other bits."""
    torch.set_float32_matmul_precision("medium")
    expected = modes()
    first, same_kind, other = (choice.float32_products(k) for k in (exact, exact, not exact))
    threads[0](first.__enter__)
    threads[1](same_kind.__enter__)
    waiting = threads[2].pool.submit(other.__enter__)
    for i, block in enumerate((first, same_kind)):
        with pytest.raises(futures.TimeoutError):
            waiting.result(0.05)
        threads[i](block.__exit__, None, None, None)
    waiting.result(10)
    assert modes() == (expected if exact else ["ieee", "ieee"])
    threads[2](other.__exit__, None, None, None)
    assert modes() == expected


class Refusing:
    """A switch of torch that cannot be set."""

    @property
    def fp32_precision(self) -> str:
        return "bf16"

    @fp32_precision.setter
    def fp32_precision(self, mode: str) -> None:
        raise RuntimeError("not allowed to set it")


def test_a_mode_that_torch_refuses_leaves_no_state(monkeypatch):
    torch.set_float32_matmul_precision("medium")
    before = modes()
    monkeypatch.setattr(torch.backends.mkldnn, "matmul", Refusing())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="not allowed to set it"):
            ck.am_step(torch.zeros(2, 3), torch.zeros(4, 3), 1.0, precision="highest")
        assert modes() == before
    monkeypatch.undo()
    ck.am_step(torch.zeros(2, 3), torch.zeros(4, 3), 1.0, precision="highest")
    assert modes() == before


# ---- forced backends -----------------------------------------------------------------------------


def test_overlapping_blocks_end_in_any_order(threads):
    first, second, _ = threads
    one, two = ck.backend("reference"), ck.backend("triton")
    first(one.__enter__)
    second(two.__enter__)
    requests = [thread(choice.requested) for thread in threads]
    assert requests == ["reference", "triton", "triton"], "each its own; a third the newest"
    first(one.__exit__, None, None, None)
    assert [thread(choice.requested) for thread in threads] == ["triton"] * 3
    second(two.__exit__, None, None, None)
    assert [thread(choice.requested) for thread in (*threads, InThread())] == ["auto"] * 4


def test_the_inner_block_of_a_thread_rules_there(threads):
    other = ck.backend("triton")
    with ck.backend("reference"):
        threads[0](other.__enter__)
        assert choice.requested() == "reference"
        with ck.backend(None):
            assert choice.requested() == "auto"
            assert threads[1](choice.requested) == "auto"
        assert choice.requested() == "reference"
        threads[0](other.__exit__, None, None, None)
    assert choice.requested() == "auto"


def test_a_block_may_end_in_another_thread(threads):
    block = ck.backend("reference")
    threads[0](block.__enter__)
    threads[1](block.__exit__, None, None, None)
    assert choice.requested() == threads[0](choice.requested) == "auto"


def test_many_blocks_leave_nothing_forced():
    def call(i: int) -> str:
        with ck.backend(("reference", "triton", "cuda")[i % 3]):
            return choice.requested()

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(call, range(600))) == ["reference", "triton", "cuda"] * 200
    assert choice.requested() == "auto"


@pytest.mark.contract(gradient=True)
def test_a_backward_runs_where_its_forward_ran(spec, ran, threads):
    args = list(testing.problem(spec.name, 5, 4, 3).args)
    args[0] = args[0].clone().requires_grad_()
    with ck.backend("reference"):
        out = testing.single(spec.name, spec.packet)(*args)
    block = ck.backend("triton")
    threads[0](block.__enter__)
    ran.clear()
    out.sum().backward()
    threads[0](block.__exit__, None, None, None)
    assert [name for _, name in ran] == ["reference"]


def test_a_block_inside_compiled_code_breaks_the_graph():
    """The ops of a graph choose when it runs; a block inside the graph would have ended by then."""
    x, rho = torch.zeros(2, 3), torch.zeros(4, 3)

    def call() -> Tensor:
        with ck.backend("cuda"):
            return ck.am_step(x, rho, 1.0)

    words = "backend: expected a block around the compiled call, got one inside it"
    torch._dynamo.reset()
    with pytest.raises(Exception, match=words):
        torch.compile(call, backend="eager", fullgraph=True)()
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="backend 'cuda' cannot run clam::am_step"):
        torch.compile(call, backend="eager")()  # the graph breaks there
    torch._dynamo.reset()


# ---- numbers of threads --------------------------------------------------------------------------


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_each_thread_gets_its_number_of_threads_back(threads, two_threads, order):
    """The first thread has read its number before any block; the others start inside one."""
    assert threads[0](torch.get_num_threads) == 2
    blocks = [_threads.threads_for(1) for _ in threads]
    for one, block in zip(threads, blocks, strict=True):
        one(block.__enter__)
        assert one(torch.get_num_threads) == 1
    for i in order:
        assert threads[i](torch.get_num_threads) == 1
        threads[i](blocks[i].__exit__, None, None, None)
        assert threads[i](torch.get_num_threads) == 2
    assert [thread(torch.get_num_threads) for thread in (*threads, InThread())] == [2] * 4
    assert torch.get_num_threads() == 2


def test_a_thread_that_begins_inside_a_block_of_another_has_its_number(threads, two_threads):
    """It runs no block of its own, so no block would restore its number."""
    block = _threads.threads_for(1)
    threads[0](block.__enter__)
    assert threads[1](torch.get_num_threads) == 2
    threads[0](block.__exit__, None, None, None)
    assert [thread(torch.get_num_threads) for thread in threads] == [2] * 3


def test_a_thread_that_begins_while_a_block_begins_or_ends_has_its_number(two_threads, monkeypatch):
    """After `torch.set_num_threads(1)`, threads that start at once keep one thread for good."""
    numbers, plain = [], torch.set_num_threads

    def set_number(number: int) -> None:
        plain(number)
        numbers.append(InThread()(torch.get_num_threads))

    monkeypatch.setattr(torch, "set_num_threads", set_number)
    block = _threads.threads_for(1)
    block.__enter__()
    numbers.append(InThread()(torch.get_num_threads))
    block.__exit__(None, None, None)
    numbers.append(InThread()(torch.get_num_threads))
    assert set(numbers) == {2}


def test_fits_in_new_threads_leave_their_numbers_of_threads(two_threads):
    def fit(_: int) -> list[int]:
        numbers = [torch.get_num_threads()]
        for _ in range(3):
            ck.KMeans(3, n_init=1, max_iter=2).fit(X)
            numbers.append(torch.get_num_threads())
        return numbers

    for _ in range(5):
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(fit, range(8))) == [[2] * 4] * 8


def test_a_number_that_a_thread_set_itself_stays(threads, two_threads):
    """The thread itself asked torch for one thread; no other block left it."""
    block, own = _threads.threads_for(1), _threads.threads_for(1)
    threads[0](block.__enter__)
    threads[1](torch.set_num_threads, 1)
    threads[1](own.__enter__)
    threads[0](block.__exit__, None, None, None)
    threads[1](own.__exit__, None, None, None)
    assert threads[1](torch.get_num_threads) == 1
    assert threads[0](torch.get_num_threads) == 2


def test_a_block_within_a_block_of_its_thread_changes_nothing(two_threads):
    with _threads.threads_for(1):
        with _threads.threads_for(1):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2


# ---- random numbers ------------------------------------------------------------------------------


class Meeting(nn.Module):
    """Waits in each forward until another fit is in its forward, as long as one may come."""

    def __init__(self, met: threading.Event) -> None:
        super().__init__()
        self.met = met

    def forward(self, x: Tensor) -> Tensor:
        self.met.wait(0.001)
        return x

    def __deepcopy__(self, memo: Any) -> Meeting:
        return self


def _sela(**rest: Any) -> ck.SeLa:
    settings = {"n_heads": 2, "n_epochs": 3, "batch_size": 16, "n_relabels": 3, "max_iter": 4000}
    layers = nn.Sequential(encoder(), Meeting(threading.Event()))
    return ck.SeLa(layers, K, **{**settings, "augment": noisy, "random_state": 0, **rest})


def _learned(model: ck.SeLa) -> Any:
    return [model.labels_, model.encoder_.state_dict(), model.heads_.state_dict()]


def test_fits_in_threads_repeat_and_no_generator_moves():
    """Dropout draws from torch's global generator, which all threads share."""
    models = [_sela() for _ in range(4)]
    alone = _learned(_sela().fit(X))
    before = state()
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda model: _learned(model.fit(X)), models))
    for one in results:
        same(one, alone)
    assert state() == before


def test_a_callback_draws_from_the_generator_of_the_caller():
    """Only the layers and the data of a fit see its draws from the global generator."""
    drawn: list[Tensor] = []
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    quiet = _learned(_sela().fit(X))
    model = _sela(callbacks=lambda *_: drawn.append(torch.rand(1)) and None)
    same(_learned(model.fit(X)), quiet)
    assert torch.equal(torch.cat(drawn), expected)


def test_a_fit_inside_a_fit_repeats_too():
    alone = _learned(_sela().fit(X))
    inner: list[Any] = []

    def augment(batch: Tensor, generator: torch.Generator) -> Tensor:
        if not inner:
            inner.append(None)
            inner[0] = _learned(_sela().fit(X))
        return noisy(batch, generator)

    same(_learned(_sela(augment=augment).fit(X)), alone)
    same(inner[0], alone)


# ---- files ---------------------------------------------------------------------------------------


def test_files_have_default_permissions_and_the_umask_stays(tmp_path, monkeypatch):
    """Python can only read the umask by setting it, which all threads would see."""
    before = umask()
    os.umask(0o027)
    try:
        monkeypatch.setattr(os, "umask", lambda _: pytest.fail("the mask of the process was set"))
        serialize.write_atomically(tmp_path / "model", b"content")
        monkeypatch.undo()
        assert (tmp_path / "model").stat().st_mode & 0o777 == 0o640
        assert (tmp_path / "model").read_bytes() == b"content"
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
        assert umask() == 0o027
    finally:
        os.umask(before)


# ---- everything ----------------------------------------------------------------------------------


IN_THREADS = [
    "am_recursion", "kmeans_step", "sinkhorn with marginals", "strict labels", "SelfLabeller",
    "AssociativeMemory", "KMeans", "ClAM", "SeLa", "DEC of an own encoder",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_calls_in_threads_repeat_and_leave_no_state_behind():
    """In a mode of torch below float32, for which a CPU may use bfloat16, ours stay float32."""
    expected = {name: ALL[name]() for name in IN_THREADS}
    torch.set_float32_matmul_precision("medium")
    before = state()
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda name: ALL[name](), IN_THREADS * 2))
    assert state() == before
    for name, one in zip(IN_THREADS * 2, results, strict=True):
        same(one, expected[name])
