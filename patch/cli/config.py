"""Look at config files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from patch.artefacts import write_json, write_text
from patch.cli.options import Configs, Override

app = typer.Typer(help=__doc__, no_args_is_help=True)


@app.command("check")
def check(config: Configs, override: Override = "{}") -> None:
    """Validate a config and print the grid it expands to."""
    from patch.experiments import load_experiment

    typer.echo(load_experiment(config, json.loads(override)).expand().summary())


@app.command("name")
def name(config: Configs) -> None:
    """Print an experiment's name, which is its folder below results/."""
    from patch.experiments import load_experiment

    typer.echo(load_experiment(config).name)


@app.command("docs")
def docs(
    output: Annotated[Path, typer.Option(help="Directory for schema.json and options.md.")] = Path("workflow/config"),
) -> None:
    """Write the JSON schema of configs and the page of all keys, both generated from the code."""
    from patch.config_docs import options_markdown, schema

    write_json(output / "schema.json", schema())
    write_text(output / "options.md", options_markdown())
