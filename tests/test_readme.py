"""What the README tells people to type exists: commands, options, targets, files."""

import re
import shlex
from pathlib import Path

import click
import pytest
import typer

from patch.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CODE = "\n".join(re.findall(r"^    (.*)$", README, flags=re.MULTILINE)).replace("\\\n", " ")
COMMANDS = [
    line.partition(" # ")[0].strip()
    for line in [*CODE.splitlines(), *re.findall(r"`([^`\n]+)`", README)]
    if re.match(r"(patch-llm|make|snakemake) \S", line.strip())
]


def test_the_readme_has_commands_to_check() -> None:
    assert sum(command.startswith("patch-llm") for command in COMMANDS) >= 3
    assert sum(command.startswith("make") for command in COMMANDS) >= 4
    assert sum(command.startswith("snakemake") for command in COMMANDS) >= 3


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


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("snakemake")])
def test_snakemake_commands_name_existing_rules_and_files(command: str) -> None:
    rules = set(re.findall(r"^rule (\w+):", "\n".join(p.read_text() for p in ROOT.glob("workflow/rules/*.smk")), re.M))
    words = shlex.split(command)
    for word in words:
        if word.startswith("workflow/"):
            assert (ROOT / word).is_file(), word
    if "--until" in words:
        until = words[words.index("--until") + 1 :]
        for word in until[: next((i for i, w in enumerate(until) if w.startswith("-")), len(until))]:
            assert word in rules, word


def test_linked_files_exist() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
