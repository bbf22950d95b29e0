# SPDX-License-Identifier: Apache-2.0
"""Builds the optional CUDA library beside the Python package; pyproject.toml has everything else.

The library is built where the environment variable CLAM_CUDA is 1, or is not set and nvcc and
torch are both in the build environment, that is with --no-build-isolation. It binds to torch's
stable C ABI alone: one build serves every torch >= 2.10, of CPU or CUDA, and every Python.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Command, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
PACKAGE = "clam_kernels"
LIBRARY = f"{PACKAGE}/_C.so"
RECORD = f"{PACKAGE}/_build.json"
ARCHS = "80;90a;100"
TORCH_FLOOR = (2, 10)
FLAGS = [
    "-std=c++17",
    "-O3",
    "-DUSE_CUDA",  # uncovers the shims in torch's headers
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # else symbols that torch 2.10 lacks
]


class NotBuilt(Exception):
    """Why there is no CUDA library."""


def find_nvcc():
    """Path of nvcc: that of CUDA_HOME where this is set, else that of PATH or /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME")
    if home:
        path = shutil.which("nvcc", path=os.path.join(home, "bin"))
    else:
        path = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if path is None:
        raise NotBuilt(f"no nvcc in {home}/bin (CUDA_HOME)" if home else "nvcc was not found")
    return path


def find_torch():
    """(folder, version) of torch, which is not imported: that costs seconds."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise NotBuilt(
            "torch is not importable in the build environment (use --no-build-isolation)"
        )
    folder = Path(spec.origin).parent
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        version = "0"
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or tuple(map(int, numbers.groups())) < TORCH_FLOOR:
        raise NotBuilt(f"torch {version} is older than {'.'.join(map(str, TORCH_FLOOR))}")
    if not (folder / "include/torch/csrc/stable/library.h").exists():
        raise NotBuilt(f"torch {version} came without its headers")
    return folder, version


def find_archs():
    """Names of the targets, such as ["80", "90a"]."""
    archs = re.findall(r"[^;,\s]+", os.environ.get("CLAM_CUDA_ARCHS") or ARCHS)
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?", arch):
            raise SystemExit(f"CLAM_CUDA_ARCHS: expected targets such as {ARCHS}, got {arch!r}")
    return archs


def targets(archs):
    """Options of nvcc; the newest plain target also as PTX, for GPUs newer than this list."""
    plain = [arch for arch in archs if arch.isdigit()]
    newest = max(plain, key=int) if plain else None
    options = []
    for arch in archs:
        code = f"[sm_{arch},compute_{arch}]" if arch == newest else f"sm_{arch}"
        options += ["-gencode", f"arch=compute_{arch},code={code}"]
    return options


def call(command, what):
    """Run a tool in the source folder; its first complaint is the reason if it fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError as error:
        raise NotBuilt(f"{command[0]} does not run: {error}") from None
    if done.returncode:
        output = (done.stderr + done.stdout).strip().splitlines() or ["no message"]
        first = next((line for line in output if "error" in line or "fatal" in line), output[0])
        if os.environ.get("CLAM_CUDA") == "1":
            print("\n".join(output), file=sys.stderr)
        raise NotBuilt(f"nvcc failed on {what}: {first.strip()}")
    return done.stdout


class build_cuda(Command):
    """Compiles csrc/ into the library, or records why not. Always runs, unlike build_ext."""

    description = "build the optional CUDA library"
    user_options = ()

    def initialize_options(self):
        self.build_lib = None
        self.build_temp = None
        self.editable_mode = False

    def finalize_options(self):
        self.set_undefined_options(
            "build", ("build_lib", "build_lib"), ("build_temp", "build_temp")
        )

    def run(self):
        built = Path(self.build_lib)
        folders = [built, ROOT] if self.editable_mode else [built]
        previous = self.previous_library() if self.editable_mode else None
        # A library of an earlier build must not stay beside a record that denies it, least of all
        # in a wheel that calls itself pure.
        for folder in folders:
            (folder / LIBRARY).unlink(missing_ok=True)
            (folder / RECORD).unlink(missing_ok=True)
        record = self.build(previous)
        for folder in folders:
            (folder / PACKAGE).mkdir(parents=True, exist_ok=True)
            (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if self.editable_mode and record["cuda"]:
            shutil.copy2(built / LIBRARY, ROOT / LIBRARY)

    def previous_library(self):
        """(digest, bytes) of the library in the source tree, or None."""
        try:
            record = json.loads((ROOT / RECORD).read_text(encoding="utf-8"))
            return record["digest"], (ROOT / LIBRARY).read_bytes()
        except (OSError, ValueError, KeyError):
            return None

    def build(self, previous=None):
        """The record: {cuda, archs, reason, torch, nvcc, digest}."""
        wish = os.environ.get("CLAM_CUDA") or "auto"
        if wish not in ("0", "1", "auto"):
            raise SystemExit(f"CLAM_CUDA: expected 0 or 1, got {wish!r}")
        record = dict.fromkeys(("cuda", "archs", "reason", "torch", "nvcc", "digest"))
        record.update(cuda=False, archs=[])
        started = time.monotonic()
        try:
            if wish == "0":
                raise NotBuilt("CLAM_CUDA=0")
            if not sys.platform.startswith("linux"):
                raise NotBuilt(f"the CUDA library is for Linux, this is {sys.platform}")
            nvcc = find_nvcc()
            torch, record["torch"] = find_torch()
            release = re.search(r"release (\S+),", call([nvcc, "--version"], "--version"))
            record["nvcc"] = release.group(1) if release else "unknown"
            archs = find_archs()
            digest = digest_of(archs, record["torch"], record["nvcc"])
            if previous is not None and previous[0] == digest:
                target = Path(self.build_lib) / LIBRARY
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(previous[1])
            else:
                self.compile(nvcc, torch, archs)
        except NotBuilt as error:
            record["reason"] = str(error)
            if wish == "1":
                raise SystemExit(f"{PACKAGE}: CLAM_CUDA=1, and no CUDA library: {error}") from None
            print(f"{PACKAGE}: pure Python install: {error}", file=sys.stderr)
        else:
            record.update(cuda=True, archs=archs, digest=digest)
            names, seconds = " ".join(archs), time.monotonic() - started
            print(f"{PACKAGE}: CUDA library for {names} in {seconds:.0f} s", file=sys.stderr)
        return record

    def compile(self, nvcc, torch, archs):
        """One object a file, in parallel, then one link."""
        temp = Path(self.build_temp).resolve() / "csrc"
        temp.mkdir(parents=True, exist_ok=True)
        cores = os.cpu_count() or 1
        # Messages then name a file of torch's, not a folder of the machine that built this.
        prefix = f"-ffile-prefix-map={torch}=torch"
        flags = [*FLAGS, f"-Xcompiler=-fPIC,-fvisibility=hidden,{prefix}", f"-I{torch}/include"]
        flags += [f"--threads={min(cores, len(archs))}", *targets(archs)]
        sources = sources_of("*.cu", "*.cpp")
        objects = [str(temp / f"{Path(source).name}.o") for source in sources]

        def one(source, target):
            call([nvcc, *flags, "-c", source, "-o", target], source)

        with ThreadPoolExecutor(cores) as pool:
            list(pool.map(one, sources, objects))
        library = (Path(self.build_lib) / LIBRARY).resolve()
        library.parent.mkdir(parents=True, exist_ok=True)
        # The static run time needs no libcudart beside it. torch is a DT_NEEDED although no symbol
        # binds at link time: without it the loader finds none of the C ABI. Through -Xlinker, since
        # the device linker writes its arguments into the library.
        host = f"-L{torch}/lib,--no-as-needed,-ltorch,-ltorch_cpu"
        link = ["-shared", "-cudart=static", f"-Xlinker={host}", *targets(archs)]
        call([nvcc, *objects, *link, "-o", str(library)], "the link")

    def get_source_files(self):
        """What an sdist must carry."""
        return sources_of("*")

    def get_outputs(self):
        made = [Path(self.build_lib) / name for name in (LIBRARY, RECORD)]
        return [str(path) for path in made if path.exists()]

    def get_output_mapping(self):
        if not self.editable_mode:
            return {}
        return {path: f"{PACKAGE}/{Path(path).name}" for path in self.get_outputs()}


def digest_of(*facts):
    """Digest of all that the library depends on: with the same digest it is not compiled again."""
    digest = hashlib.sha256(repr((FLAGS, facts)).encode())
    for path in [*sources_of("*"), "setup.py"]:
        digest.update(path.encode() + b"\0" + (ROOT / path).read_bytes())
    return digest.hexdigest()


def sources_of(*patterns):
    """Files of csrc/, relative to the root: absolute ones would enter the library and the sdist."""
    paths = {path for pattern in patterns for path in (ROOT / "csrc").glob(pattern)}
    return sorted(f"csrc/{p.name}" for p in paths if p.is_file() and not p.name.startswith("."))


class Build(build):
    sub_commands = (*build.sub_commands, ("build_cuda", None))


class BdistWheel(bdist_wheel):
    """py3-none-any without the library, py3-none-<platform> with it."""

    def get_tag(self):
        built = self.get_finalized_command("build").build_lib
        if not Path(built, LIBRARY).exists():
            return super().get_tag()
        # The library does not depend on Python: a tag of this interpreter would exclude others.
        self.root_is_pure = False
        return ("py3", "none", super().get_tag()[2])


setup(cmdclass={"build": Build, "build_cuda": build_cuda, "bdist_wheel": BdistWheel})
