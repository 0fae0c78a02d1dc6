"""What the README tells people to type exists: commands, options, targets, files."""

import re
import shlex
from pathlib import Path

import click
import pytest
import typer
from snakemake.cli import get_argument_parser

from patch.cli import app
from patch.reporting.targets import FIGURES, TABLES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CODE = "\n".join(re.findall(r"^    (.*)$", README, flags=re.MULTILINE)).replace("\\\n", " ")
COMMANDS = [
    line.partition(" # ")[0].strip()
    for line in [*CODE.splitlines(), *re.findall(r"`([^`\n]+)`", README)]
    if re.match(r"(patch-llm|make|snakemake) \S", line.strip())
]
DOCUMENTS = [
    path.read_text()
    for pattern in (
        "README.md",
        "Makefile",
        "Snakefile",
        "docs/*.md",
        "results/reference/**/README.md",
        "workflow/config/*.yaml",
    )
    for path in sorted(ROOT.glob(pattern))
]
SNAKEMAKE = sorted(
    {
        found.partition(" # ")[0].partition("     ")[0].strip()
        for document in DOCUMENTS
        for found in re.findall(r"(?:^[#\s@]*|`)(snakemake [^`\n]*-[^`\n]*)", re.sub(r"\\\n[#\s]*", "", document), re.M)
    }
)


def test_the_readme_has_commands_to_check() -> None:
    assert sum(command.startswith("patch-llm") for command in COMMANDS) >= 3
    assert sum(command.startswith("make") for command in COMMANDS) >= 4
    assert len(SNAKEMAKE) >= 15


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("patch-llm")])
def test_patch_llm_commands_parse(command: str) -> None:
    words = shlex.split(command)[1:]
    group = typer.main.get_command(app)
    context = click.Context(group)
    while isinstance(group, click.Group):
        name = words.pop(0)
        found = group.get_command(context, name)
        assert found is not None, name
        group = found
    if words:
        group.make_context(group.name, words, resilient_parsing=False).close()


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make")])
def test_make_targets_exist(command: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    target = command.split()[1]
    assert re.search(rf"^{re.escape(target)}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize("command", SNAKEMAKE)
def test_snakemake_takes_its_commands_as_they_are_meant(command: str) -> None:
    """Options with several values (--resources, --configfile, --config) take a target behind them for one of these."""
    words = shlex.split(re.sub(r"\$\((CORES|GPU_JOBS)\)", "1", command))
    arguments = get_argument_parser().parse_args(words[1:])  # fails where a bare word follows gpu=1
    for file in arguments.configfile or []:
        assert str(file) in ("…", "...", "FILE", "$(CONFIG)") or (ROOT / file).is_file(), file
    rules = set(re.findall(r"^rule (\w+):", "\n".join(p.read_text() for p in ROOT.glob("workflow/rules/*.smk")), re.M))
    rules |= {f"table_{name}" for name in TABLES} | {f"figure_{name}" for name in FIGURES}
    for target in arguments.targets:
        assert target in {*rules, "…", "results/RUN/CELL/learn/record.json"}, target


def test_targets_that_the_documentation_names_exist() -> None:
    for kind, name in re.findall(r"\b(table|figure)_(\w+)`", "\n".join(DOCUMENTS)):
        assert name in {"table": TABLES, "figure": FIGURES}[kind], name


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
