"""The files that install the project agree with each other."""

import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_environment_yml_has_the_pins_of_pyproject() -> None:
    packages = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    pip = next(entry["pip"] for entry in packages if isinstance(entry, dict))
    assert sorted(pip) == sorted(project()["dependencies"])
    assert f"python{project()['requires-python']}" in packages


def test_tested_versions_satisfy_the_pins() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    tested = dict(line.lower().replace("_", "-").split("==") for line in lines if "==" in line)
    extras = project()["optional-dependencies"]["test"]
    for text in [*project()["dependencies"], *extras]:
        requirement = Requirement(text)
        if requirement.name != "torch":  # chosen by the Makefile, see there
            assert Version(tested[requirement.name.lower()]) in requirement.specifier, text


def test_makefile_installs_a_torch_within_the_pins() -> None:
    line = next(line for line in (ROOT / "Makefile").read_text().splitlines() if line.startswith("TORCH ?= "))
    version = Requirement(line.removeprefix("TORCH ?= ")).specifier
    pin = next(Requirement(text) for text in project()["dependencies"] if text.startswith("torch"))
    assert next(iter(version)).version in pin.specifier


def test_torch_is_not_pinned_among_the_constraints() -> None:
    """A CPU build that is installed or offered must be able to satisfy the installation."""
    names = [line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()]
    assert "torch" not in names
    assert not [name for name in names if name.startswith("nvidia-")]
