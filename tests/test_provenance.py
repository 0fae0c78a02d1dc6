"""The code hash follows the code, not its documentation."""

from __future__ import annotations

import ast
import importlib
import shutil
import subprocess
from pathlib import Path

import pytest

from patch import provenance
from patch.provenance import STAGE_MODULES, code_hash


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A copy of the package that may be edited."""
    copy = tmp_path / "patch"
    shutil.copytree(provenance.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(provenance, "PACKAGE", copy)
    code_hash.cache_clear()
    yield copy
    code_hash.cache_clear()


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    code_hash.cache_clear()


def test_the_hash_is_the_same_again_and_elsewhere(package, monkeypatch):
    copied = code_hash("prune")
    code_hash.cache_clear()
    assert code_hash("prune") == copied
    monkeypatch.setattr(provenance, "PACKAGE", Path(importlib.import_module("patch").__file__).parent)
    code_hash.cache_clear()
    assert code_hash("prune") == copied


def test_comments_docstrings_and_formatting_do_not_change_the_hash(package):
    before = code_hash("prune")
    wanda = package / "pruning" / "wanda.py"
    edit(wanda, '"""Wanda: keep', '"""Wanda keeps')
    edit(wanda, "    def mean(self)", "    # a comment\n\n    def mean(self)")
    edit(wanda, '    """|w_ij| * sqrt(a_j)', '    """The score: |w_ij| * sqrt(a_j)')
    edit(
        wanda,
        "return (self.sum_of_squares / self.sequences).float()",
        "return (self.sum_of_squares\n                / self.sequences).float()",
    )
    assert code_hash("prune") == before


@pytest.mark.parametrize("kind", [ast.FunctionDef, ast.ClassDef, ast.Call])
def test_syntax_that_only_newer_pythons_have_does_not_change_the_hash(package, monkeypatch, kind):
    before = code_hash("prune")
    monkeypatch.setattr(kind, "_fields", (*kind._fields, "of_a_newer_python"))
    monkeypatch.setattr(kind, "of_a_newer_python", [], raising=False)
    code_hash.cache_clear()
    assert code_hash("prune") == before


def test_code_changes_the_hash(package):
    before = code_hash("prune")
    edit(
        package / "pruning" / "wanda.py", "self.sum_of_squares / self.sequences", "self.sum_of_squares * self.sequences"
    )
    assert code_hash("prune") != before


@pytest.mark.parametrize("module", ["sparsity/patterns.py", "models.py", "data.py", "methods.py"])
def test_modules_imported_by_a_stage_count_too(package, module):
    before = code_hash("prune")
    with (package / module).open("a") as stream:
        stream.write("\nADDED = 1\n")
    code_hash.cache_clear()
    assert code_hash("prune") != before


def test_modules_that_a_stage_does_not_use_do_not_count(package):
    before = code_hash("prune")
    (package / "reporting").mkdir(exist_ok=True)
    (package / "reporting" / "new.py").write_text("ADDED = 1\n")
    (package / "unrelated.py").write_text("ADDED = 1\n")
    code_hash.cache_clear()
    assert code_hash("prune") == before


@pytest.mark.parametrize(
    "statement",
    [
        "from patch.added import value",
        "from patch import added",
        "import patch.added",
        "from . import added",
        "from .added import value",
    ],
)
def test_every_way_of_importing_is_followed(package, statement):
    added = package / "added.py"
    added.write_text("value = 1\n")
    with (package / "models.py").open("a") as stream:
        stream.write(f"\n{statement}\n")
    code_hash.cache_clear()
    before = code_hash("prune")
    edit(added, "value = 1", "value = 2")
    assert code_hash("prune") != before


@pytest.mark.parametrize("stage", STAGE_MODULES)
def test_the_modules_of_every_stage_exist(stage):
    for module in STAGE_MODULES[stage]:
        assert importlib.util.find_spec(module) is not None, module


def test_a_class_of_nothing_but_a_docstring_still_parses():
    tree = ast.parse('class Empty(Exception):\n    """Only this."""\n')
    assert ast.unparse(provenance._without_docstrings(tree)) == "class Empty(Exception):\n    pass"


def test_provenance_outside_a_checkout_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path / "patch")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    (tmp_path / "patch").mkdir()
    found = provenance.provenance()
    assert found["commit"] is None
    assert found["dirty"] is None


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_provenance_names_the_commit_and_whether_the_tree_is_clean(tmp_path, monkeypatch):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    (tmp_path / "patch").mkdir()
    (tmp_path / "patch" / "module.py").write_text("value = 1\n")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path / "patch")
    clean = provenance.provenance()
    assert clean["commit"] == provenance.commit() == git("rev-parse", "HEAD")
    assert clean["dirty"] is False
    (tmp_path / "patch" / "module.py").write_text("value = 2\n")
    assert provenance.provenance()["dirty"] is True


def test_provenance_lists_the_versions_that_matter():
    import torch

    found = provenance.provenance()
    assert (
        found["versions"]["torch"] == torch.__version__.split("+")[0] or found["versions"]["torch"] == torch.__version__
    )
    assert found["threads"] == torch.get_num_threads()


def test_cuda_sources_count_for_what_runs_them(package):
    before = {stage: code_hash(stage) for stage in ("benchmark", "learn")}
    (package / "kernels" / "hybrid" / "decode.cu").write_text("// another kernel")
    code_hash.cache_clear()
    assert code_hash("benchmark") != before["benchmark"]
    assert code_hash("learn") == before["learn"]
