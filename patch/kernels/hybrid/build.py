"""Compile the CUDA kernels of this folder on first use and load them: no PyTorch headers, so it takes seconds.

The shared objects are kept in the project's cache directory, named by a hash of the sources, the flags and the
compiler's version: another version of any of them makes a new file and never meets an old one.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shutil
import subprocess
from pathlib import Path

import filelock

from patch.artefacts import PatchError, atomic_path
from patch.cache import cache_directory

FLAGS = ("-std=c++17", "-O3", "-DNDEBUG", "-gencode=arch=compute_90a,code=sm_90a", "-shared", "-Xcompiler", "-fPIC")
_FOLDER = Path(__file__).parent
log = logging.getLogger(__name__)


@functools.cache
def compiler() -> str | None:
    """Path of nvcc: of $CUDA_HOME, else on the PATH, else where CUDA installs itself; None if there is none."""
    folders = [Path(home) / "bin" for home in (os.environ.get("CUDA_HOME"),) if home]
    folders += [*map(Path, os.environ.get("PATH", "").split(os.pathsep)), Path("/usr/local/cuda/bin")]
    return shutil.which("nvcc", path=os.pathsep.join(map(str, folders)))


@functools.cache
def load(name: str) -> ctypes.CDLL:
    """The shared object of `name`.cu; compiled if it is not in the cache.

    Raises PatchError where there is no compiler, or it fails.
    """
    nvcc = compiler()
    if nvcc is None:
        raise PatchError("hybrid kernels: no CUDA compiler; install the CUDA toolkit, or set CUDA_HOME to its folder.")
    path = cache_directory() / "kernels" / f"{name}-{_key(name, nvcc)}.so"
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{path}.lock"):
        if not path.exists():
            log.info("compiling %s.cu for this GPU, once", name)
            with atomic_path(path) as temporary:
                _compile(name, nvcc, temporary)
    return ctypes.CDLL(str(path))


def _key(name: str, nvcc: str) -> str:
    content = hashlib.sha256()
    for source in (f"{name}.cu", "hopper.cuh"):
        content.update((_FOLDER / source).read_bytes())
    content.update(" ".join(FLAGS).encode())
    content.update(_run([nvcc, "--version"]).encode())
    return content.hexdigest()[:16]


def _compile(name: str, nvcc: str, path: Path) -> None:
    _run([nvcc, *FLAGS, str(_FOLDER / f"{name}.cu"), "-o", str(path)])


def _run(command: list[str]) -> str:
    """Standard output of `command`; PatchError with its first error line if it fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise PatchError(f"{command[0]}: cannot be run ({error}); set CUDA_HOME to a CUDA toolkit.") from None
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()
        reason = lines[0] if lines else f"exit status {result.returncode}"
        raise PatchError(f"{command[0]}: failed ({reason}); the hybrid kernels need CUDA 12.4 or later.")
    return result.stdout
