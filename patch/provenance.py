"""Where a number comes from: versions, hardware, commit, and a hash of the code that computed it."""

from __future__ import annotations

import ast
import datetime
import functools
import hashlib
import platform
import socket
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent

# The modules that compute each stage's numbers; whatever they import of this package counts too.
STAGE_MODULES = {
    "prepare": ("patch.embedded", "patch.data", "patch.models"),
    "prune": ("patch.pruning",),
    "learn": ("patch.learning",),
    "compress": ("patch.compression.compress",),
    # Adapters and quantised inputs compute while the model runs.
    "evaluate": ("patch.evaluation", "patch.compression.artefact", "patch.compression.inputs"),
    "benchmark": ("patch.benchmarking",),
    "collect": ("patch.collect",),
    "report": ("patch.reporting",),
}


@functools.cache
def code_hash(stage: str) -> str:
    """Hash of the code of `stage`: of its modules and all modules of this package that they import.

    Taken over syntax trees without docstrings, so that comments, formatting and documentation do not make results
    stale, and over the CUDA sources beside them. Snakemake needs this because it does not see edits in imported
    modules.
    """
    digest = hashlib.sha256()
    closure = _import_closure(STAGE_MODULES[stage])
    for path in sorted(closure):
        digest.update(path.relative_to(PACKAGE).as_posix().encode())
        digest.update(_canonical(_without_docstrings(ast.parse(path.read_text()))).encode())
    for source in sorted(file for folder in {path.parent for path in closure} for file in folder.glob("*.cu*")):
        digest.update(source.relative_to(PACKAGE).as_posix().encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def provenance() -> dict[str, Any]:
    """Commit, versions, machine and accelerator of this process, for a record."""
    import torch

    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "commit": commit(),
        "dirty": None if changes is None else changes != "",
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": {name: _version(name) for name in ("torch", "transformers", "lm-eval", "datasets", "numpy")},
    }


def stamp() -> dict[str, str | None]:
    """The columns gpu, torch, commit and date of every row in results/reference."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return {"gpu": gpu, "torch": torch.__version__, "commit": commit(), "date": today}


def commit() -> str | None:
    """Full hash of the checkout's commit; None outside a checkout."""
    return _git("rev-parse", "HEAD")


def _git(*arguments: str) -> str | None:
    try:
        return subprocess.run(
            ["git", "-C", str(PACKAGE.parent), *arguments], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _import_closure(modules: tuple[str, ...]) -> set[Path]:
    found: set[Path] = set()
    waiting = [path for module in modules if (path := _module_path(module))]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            waiting.extend(target for name in _imported(node, path) if (target := _module_path(name)))
        if path.name == "__init__.py" and path.parent != PACKAGE:
            waiting.extend(path.parent.glob("*.py"))
    return found


def _imported(node: ast.AST, path: Path) -> list[str]:
    """Absolute names of all modules of this package that an import statement in the file `path` may mean."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        module = node.module or ""
        if node.level:
            parents = path.relative_to(PACKAGE.parent).parts[: -node.level]
            module = ".".join(["patch", *parents[1:], *([module] if module else [])])
        names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
    else:
        return []
    return [name for name in names if name.split(".")[0] == "patch"]


def _module_path(module: str) -> Path | None:
    parts = module.split(".")[1:]
    if not parts:
        return None
    base = PACKAGE.joinpath(*parts)
    for path in (base / "__init__.py", base.with_suffix(".py")):
        if path.is_file():
            return path
    return None


def _canonical(node: object) -> str:
    """Like `ast.dump`, but the same in every version of Python: newer ones have more fields, which are empty here."""
    if isinstance(node, ast.AST):
        fields = [(name, value) for name, value in ast.iter_fields(node) if value is not None and value != []]
        return f"{type(node).__name__}({', '.join(f'{name}={_canonical(value)}' for name, value in fields)})"
    if isinstance(node, list):
        return f"[{', '.join(map(_canonical, node))}]"
    return repr(node)


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = [s for s in node.body if not _is_string(s)] or [ast.Pass()]
    return tree


def _is_string(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
