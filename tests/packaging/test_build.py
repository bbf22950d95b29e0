# SPDX-License-Identifier: Apache-2.0
"""The results of `pip wheel` and of an editable install, with and without nvcc."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import setuptools

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
SITE = Path(sysconfig.get_path("purelib"))
PLATFORM = sysconfig.get_platform().replace("-", "_").replace(".", "_")
# One target: these tests are of the build, and each further target takes as long as all of them.
ARCH = "90a"
PIP = [sys.executable, "-m", "pip"]
# nvcc reads these variables: a kernel that spills registers does not compile here.
NO_SPILLS = {"NVCC_APPEND_FLAGS": "-Xptxas=--warn-on-spills,--warning-as-error"}

pytestmark = [
    pytest.mark.build,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="builds are tested on Linux"),
]
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is missing")


def run(command: list[str], folder: Path, fails: bool = False, **variables: str) -> str:
    """Output of a command that must succeed, or must fail; no variable CLAM_* reaches it."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("CLAM_") and k != "CUDA_HOME"}
    # The environment must not lead to the tree under test; pip's messages are those for a user.
    for name in ("PYTHONPATH", "PIP_QUIET"):
        clean.pop(name, None)
    done = subprocess.run(
        command,
        cwd=folder,
        env={**clean, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    output = done.stdout + done.stderr
    assert (done.returncode != 0) == fails, output
    return output


def copy_of_the_tree(folder: Path) -> Path:
    """The sources as in a clone: no build products."""
    tree = folder / "tree"
    tree.mkdir(parents=True)
    stale = shutil.ignore_patterns("__pycache__", "_C.so", "_build.json")
    for name in ("clam_kernels", "python_fallback", "csrc"):
        shutil.copytree(ROOT / name, tree / name, ignore=stale)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copy2(ROOT / name, tree / name)
    return tree


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return copy_of_the_tree(tmp_path)


@pytest.fixture
def no_cuda(tmp_path: Path) -> str:
    """A CUDA_HOME without nvcc."""
    (tmp_path / "no_cuda" / "bin").mkdir(parents=True)
    return str(tmp_path / "no_cuda")


def fake_nvcc(folder: Path, body: str) -> str:
    """A CUDA_HOME whose nvcc is a script that records its arguments in `calls`."""
    tool = folder / "cuda" / "bin" / "nvcc"
    tool.parent.mkdir(parents=True)
    calls = folder / "calls"
    head = f'#!/bin/sh\necho "$@" >> "{calls}"\n'
    version = 'if [ "$1" = --version ]; then echo "release 12.9, V12.9.1"; exit 0; fi\n'
    tool.write_text(head + version + body, encoding="utf-8")
    tool.chmod(0o755)
    return str(folder / "cuda")


def bdist(tree: Path, fails: bool = False, **variables: str) -> str:
    """Run setup.py itself, as pip does, without pip's own seconds."""
    return run([sys.executable, "setup.py", "-q", "bdist_wheel"], tree, fails, **variables)


def wheel_in(folder: Path) -> Path:
    (wheel,) = folder.glob("*.whl")
    return wheel


def tag(wheel: Path) -> str:
    return "-".join(wheel.stem.split("-")[2:])


def read(wheel: Path, name: str) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(name)


def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def record_of(wheel: Path) -> dict[str, Any]:
    return dict(json.loads(read(wheel, "clam_kernels/_build.json")))


def is_pure(wheel: Path) -> dict[str, Any]:
    """Check that a wheel has no binary and says so; returns its record."""
    assert tag(wheel) == "py3-none-any"
    assert not [name for name in names(wheel) if name.endswith(".so")]
    record = record_of(wheel)
    assert record["cuda"] is False
    assert record["reason"]
    return record


def plant_stale_libraries(tree: Path) -> None:
    """Write libraries as earlier builds leave them."""
    for folder in ("", "build/lib/", f"build/lib.{sysconfig.get_platform()}/"):
        path = tree / f"{folder}clam_kernels/_C.so"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"stale")


# ---- pure ----------------------------------------------------------------------------------------


def test_isolated_wheel_is_pure_and_complete(tree: Path, tmp_path: Path) -> None:
    """`pip wheel .` as a user types it: the build environment has no torch (U-01)."""
    plant_stale_libraries(tree)
    probe = [*PIP, "download", "-q", "--no-deps", "-d", str(tmp_path / "probe"), "setuptools>=77"]
    if subprocess.run(probe, capture_output=True, check=False).returncode:
        pytest.skip("pip finds no setuptools: no package index")
    command = [*PIP, "wheel", "--no-deps", "-w", str(tmp_path), "."]
    output = run(command, tree)
    wheel = wheel_in(tmp_path)
    reason = is_pure(wheel)["reason"]
    assert "torch is not importable" in reason or "nvcc" in reason
    assert (tree / "clam_kernels/_C.so").read_bytes() == b"stale", "a wheel leaves the tree alone"
    assert not (tree / "clam_kernels/_build.json").exists()
    assert "Successfully built" in output
    sources = {
        str(path.relative_to(ROOT))
        for room in ("clam_kernels", "python_fallback")
        for path in (ROOT / room).rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    assert sources <= set(names(wheel)), "a package is missing in pyproject.toml"


def test_says_once_why_it_is_pure(tree: Path, no_cuda: str) -> None:
    output = bdist(tree, CUDA_HOME=no_cuda)
    reason = is_pure(wheel_in(tree / "dist"))["reason"]
    assert "no nvcc in" in reason
    assert output.count("pure Python install") == 1
    assert f"clam_kernels: pure Python install: {reason}\n" in output


def test_clam_cuda_0_skips(tree: Path, tmp_path: Path) -> None:
    plant_stale_libraries(tree)
    bdist(tree, CLAM_CUDA="0", CUDA_HOME=fake_nvcc(tmp_path, "exit 1\n"))
    assert is_pure(wheel_in(tree / "dist"))["reason"] == "CLAM_CUDA=0"
    assert not (tmp_path / "calls").exists(), "nvcc was called"


def test_failing_nvcc_is_one_line_and_pure(tree: Path, tmp_path: Path) -> None:
    plant_stale_libraries(tree)
    home = fake_nvcc(tmp_path, "echo \"nvcc fatal : Unsupported gpu 'compute_100'\" >&2; exit 1\n")
    output = bdist(tree, CUDA_HOME=home)
    assert "Unsupported gpu 'compute_100'" in is_pure(wheel_in(tree / "dist"))["reason"]
    assert output.count("Unsupported gpu") == 1


# ---- CLAM_CUDA=1 ---------------------------------------------------------------------------------


def test_forced_build_without_nvcc_fails(tree: Path, no_cuda: str, tmp_path: Path) -> None:
    command = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), "."]
    output = run(command, tree, fails=True, CLAM_CUDA="1", CUDA_HOME=no_cuda)
    assert "CLAM_CUDA=1, and no CUDA library: no nvcc in" in output
    assert not list(tmp_path.glob("*.whl"))


def test_forced_build_without_nvcc_on_path_fails(tree: Path) -> None:
    """The test removes CUDA's usual folder from setup.py, because a machine that has it would test
    nothing.
    """
    text = (tree / "setup.py").read_text(encoding="utf-8")
    assert "/usr/local/cuda/bin" in text
    text = text.replace("/usr/local/cuda/bin", "no/such/folder")
    (tree / "setup.py").write_text(text, encoding="utf-8")
    folders = os.environ["PATH"].split(os.pathsep)
    search = os.pathsep.join(f for f in folders if not Path(f, "nvcc").exists())
    assert "nvcc was not found" in bdist(tree, fails=True, CLAM_CUDA="1", PATH=search)


def test_forced_build_with_failing_nvcc_shows_all(tree: Path, tmp_path: Path) -> None:
    body = 'echo "a.h: error: no such thing" >&2; echo "second line" >&2; exit 1\n'
    output = bdist(tree, fails=True, CLAM_CUDA="1", CUDA_HOME=fake_nvcc(tmp_path, body))
    assert "a.h: error: no such thing" in output
    assert "second line" in output
    assert not (tree / "dist").exists()


@pytest.mark.parametrize(
    ("name", "value"), [("CLAM_CUDA", "yes"), ("CLAM_CUDA_ARCHS", "sm_90")], ids=["wish", "archs"]
)
def test_wrong_settings_are_named(tree: Path, tmp_path: Path, name: str, value: str) -> None:
    home = fake_nvcc(tmp_path, "exit 1\n")
    output = bdist(tree, fails=True, CUDA_HOME=home, **{name: value})
    assert f"{name}: expected" in output
    assert repr(value) in output


# ---- a stand-in for the toolchain ----------------------------------------------------------------

# writes the file after -o
OBEDIENT = 'while [ $# -gt 0 ]; do [ "$1" = -o ] && echo made > "$2"; shift; done\n'


def test_torch_is_found_and_not_imported(tree: Path, tmp_path: Path) -> None:
    """A torch that cannot be imported is enough: setup.py only uses its headers and its version."""
    site = tmp_path / "site"
    (site / "torch/include/torch/csrc/stable").mkdir(parents=True)
    (site / "torch/include/torch/csrc/stable/library.h").touch()
    (site / "torch/__init__.py").write_text("raise SystemExit('imported')\n", encoding="utf-8")
    (site / "torch-2.12.0.dist-info").mkdir()
    metadata = site / "torch-2.12.0.dist-info" / "METADATA"
    metadata.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.12.0\n", encoding="utf-8")
    home = fake_nvcc(tmp_path, OBEDIENT)
    wish = {"CUDA_HOME": home, "PYTHONPATH": str(site), "CLAM_CUDA_ARCHS": "80; 90a,120"}
    output = bdist(tree, **wish)
    wheel = wheel_in(tree / "dist")
    assert tag(wheel) == f"py3-none-{PLATFORM}"
    assert read(wheel, "clam_kernels/_C.so") == b"made\n"
    assert b"Root-Is-Purelib: false" in read(wheel, "clam_kernels-0.1.0.dist-info/WHEEL")
    record = record_of(wheel)
    assert record.pop("digest")
    archs = ["80", "90a", "120"]
    expected = {"cuda": True, "archs": archs, "reason": None, "torch": "2.12.0", "nvcc": "12.9"}
    assert record == expected
    assert "CUDA library for 80 90a 120" in output
    calls = (tmp_path / "calls").read_text(encoding="utf-8")
    assert "arch=compute_80,code=sm_80" in calls
    assert "arch=compute_90a,code=sm_90a" in calls
    assert "arch=compute_120,code=[sm_120,compute_120]" in calls
    assert "fast_math" not in calls
    shutil.rmtree(tree / "dist")

    metadata.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.9.1\n", encoding="utf-8")
    bdist(tree, **wish)
    assert is_pure(wheel_in(tree / "dist"))["reason"] == "torch 2.9.1 is older than 2.10"


def test_sdist_carries_the_cuda_sources(tree: Path, no_cuda: str) -> None:
    run([sys.executable, "setup.py", "-q", "sdist"], tree, CUDA_HOME=no_cuda)
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.split("/", 1)[-1] for name in packed.getnames()}
    assert {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()} <= names
    assert "setup.py" in names


# ---- the real toolchain --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cuda_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cuda")
    tree = copy_of_the_tree(folder)
    command = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), "."]
    run(command, tree, CLAM_CUDA="1", CLAM_CUDA_ARCHS=ARCH, **NO_SPILLS)
    return wheel_in(folder)


LIBRARY = ("_C.so", "_build.json")


def library_of_setup() -> dict[str, bytes] | None:
    """The library that `make setup` compiled, and its record, if setup.py would compile the same
    again.
    """
    if not all((ROOT / "clam_kernels" / name).exists() for name in LIBRARY):
        return None
    files = {name: (ROOT / "clam_kernels" / name).read_bytes() for name in LIBRARY}
    spec = importlib.util.spec_from_file_location("clam_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    setup = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **_: None)
        spec.loader.exec_module(setup)
    record = json.loads(files["_build.json"])
    facts = (record["archs"], record["torch"], record["nvcc"])
    current = ARCH in record["archs"] and record["digest"] == setup.digest_of(*facts)
    return files if current else None


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> dict[str, bytes]:
    """A library of real kernels and its record. The fixture compiles it once, because that takes a
    minute.
    """
    files = library_of_setup()
    if files is None:
        wheel = request.getfixturevalue("cuda_wheel")
        files = {name: read(wheel, f"clam_kernels/{name}") for name in LIBRARY}
    return files


@pytest.fixture
def library(compiled: dict[str, bytes], tmp_path: Path) -> Path:
    (tmp_path / "_C.so").write_bytes(compiled["_C.so"])
    return tmp_path / "_C.so"


@needs_nvcc
@pytest.mark.slow
def test_cuda_wheel(cuda_wheel: Path) -> None:
    assert tag(cuda_wheel) == f"py3-none-{PLATFORM}"
    record = record_of(cuda_wheel)
    assert record["cuda"] is True
    assert record["archs"] == [ARCH]
    assert record["reason"] is None


@needs_nvcc
@pytest.mark.slow
def test_no_kernel_spills_on_the_other_targets(tree: Path) -> None:
    """The fixture checks its own target; then the check itself must be able to fail."""
    wish = {"CLAM_CUDA": "1", "CLAM_CUDA_ARCHS": "80;100", **NO_SPILLS}
    bdist(tree, **wish)
    assert record_of(wheel_in(tree / "dist"))["archs"] == ["80", "100"]
    kernel = tree / "csrc" / "am.cu"
    text = kernel.read_text(encoding="utf-8")
    assert "min_blocks(D, R)" in text
    kernel.write_text(text.replace("min_blocks(D, R)", "12"), encoding="utf-8")
    assert "spill" in bdist(tree, fails=True, **wish)


@needs_nvcc
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm is missing")
def test_library_binds_to_the_stable_abi_alone(library: Path) -> None:
    weak, strong = set(), set()
    output = run(["nm", "-D", "--undefined-only", str(library)], library.parent)
    for line in output.splitlines():
        kind, name = line.split()
        (weak if kind in "wv" else strong).add(name)
    shims = {
        "aoti_torch_get_current_cuda_stream",
        "torch_c10_cuda_check_msg",
        "torch_c10_cuda_free_error_msg",
    }
    assert shims <= weak
    system = re.compile(r"\w+@(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$")
    foreign = [name for name in strong if not system.match(name)]
    assert foreign
    assert not [name for name in foreign if not re.match(r"(aoti_)?torch_\w+$", name)]
    # torch's C++ ABI changes between builds; these symbols would break (U-02)
    assert not [name for name in weak | strong if "c10" in name and not name.startswith("torch_")]


@needs_nvcc
def test_library_contains_no_path_of_the_build_machine(library: Path) -> None:
    content = library.read_bytes()
    for folder in (SITE, ROOT, library.parents[2], Path.home()):
        assert str(folder).encode() not in content


@needs_nvcc
def test_library_loads_beside_this_torch(library: Path) -> None:
    code = (
        "import torch, sys\n"
        "torch.ops.load_library(sys.argv[1])\n"
        "for name in ('recursion_small', 'recursion_small_backward'):\n"
        "    print(getattr(torch.ops.clam_cuda, name).default._schema)\n"
        "    for key in ('CUDA', 'CPU'):\n"
        "        op = 'clam_cuda::' + name\n"
        "        print(torch._C._dispatch_has_kernel_for_dispatch_key(op, key))\n"
    )
    output = run([sys.executable, "-c", code, str(library)], library.parent).splitlines()
    operands = (
        "Tensor v, Tensor rho, Tensor? beta, float beta_value, Tensor? log_weights, "
        "Tensor? update_mask, int steps, float step"
    )
    assert output == [
        f"clam_cuda::recursion_small({operands}, Tensor(a!) flag) -> Tensor",
        "True",
        "False",
        f"clam_cuda::recursion_small_backward(Tensor grad, {operands}, bool wide, "
        "bool memory_side, bool mask_side, Tensor(a!) flag) -> (Tensor, Tensor, Tensor)",
        "True",
        "False",
    ]


# ---- editable ------------------------------------------------------------------------------------


class Installed:
    """An environment that sees this one's packages and has the tree installed as editable."""

    def __init__(self, folder: Path, tree: Path) -> None:
        self.tree, self.folder = tree, folder / "venv"
        run([sys.executable, "-m", "venv", "--without-pip", str(self.folder)], folder)
        self.python = str(self.folder / "bin" / "python")
        (site,) = self.folder.glob("lib/python*/site-packages")
        seen = [folder for folder in sys.path if folder.endswith("-packages")]
        (site / "tools.pth").write_text("\n".join(seen) + "\n", encoding="utf-8")

    def install(self, **variables: str) -> None:
        command = [*PIP, "--python", self.python, "install", "--no-deps", "--no-build-isolation"]
        run([*command, "--ignore-installed", "-e", "."], self.tree, **variables)

    def record(self) -> dict[str, Any]:
        """The build record that the installed package reports, from a folder that is not
        the tree.
        """
        code = (
            "import json, clam_kernels\n"
            "from clam_kernels._core import library\n"
            "record = dict(library.build_record(), file=clam_kernels.__file__)\n"
            "record['there'] = library.PATH.exists()\n"
            "print(json.dumps(record))\n"
        )
        output = run([self.python, "-c", code], self.folder)
        return dict(json.loads(output.splitlines()[-1]))


def test_editable_pure_removes_a_stale_library(tree: Path, tmp_path: Path) -> None:
    plant_stale_libraries(tree)
    environment = Installed(tmp_path, tree)
    environment.install(CLAM_CUDA="0")
    record = environment.record()
    assert record["file"] == str(tree / "clam_kernels" / "__init__.py")
    assert (record["cuda"], record["reason"]) == (False, "CLAM_CUDA=0")
    assert not record["there"], "a library beside a record that denies it"


@needs_nvcc
def test_editable_keeps_a_library_that_did_not_change(
    tree: Path, tmp_path: Path, compiled: dict[str, bytes]
) -> None:
    """As an earlier editable install left them."""
    for name, content in compiled.items():
        (tree / "clam_kernels" / name).write_bytes(content)
    before = compiled["_C.so"]
    archs = json.loads(compiled["_build.json"])["archs"]
    environment = Installed(tmp_path, tree)
    environment.install(CLAM_CUDA="1", CLAM_CUDA_ARCHS=";".join(archs))
    record = environment.record()
    assert record["cuda"] is True
    assert record["there"]
    assert (tree / "clam_kernels/_C.so").read_bytes() == before


def test_editable_builds_again_if_a_source_changed(tree: Path, tmp_path: Path) -> None:
    """The compiler accepts everything: the test asks whether it is called."""
    home = fake_nvcc(tmp_path, OBEDIENT)
    environment = Installed(tmp_path, tree)
    calls = []
    for change in ("", "", "// another\n"):
        with (tree / "csrc" / "am.h").open("a", encoding="utf-8") as file:
            file.write(change)
        (tmp_path / "calls").unlink(missing_ok=True)
        environment.install(CUDA_HOME=home, CLAM_CUDA_ARCHS=ARCH)
        calls.append("-c csrc/am.cu" in (tmp_path / "calls").read_text(encoding="utf-8"))
        assert json.loads((tree / "clam_kernels/_build.json").read_text(encoding="utf-8"))["cuda"]
        assert (tree / "clam_kernels/_C.so").read_bytes() == b"made\n"
    assert calls == [True, False, True]
