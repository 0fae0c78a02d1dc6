"""The command line: one command per stage, with typed options. Everything a rule of the workflow runs is here.

Results go to files, the log to standard error, tables to standard output. A PatchError ends a command with
one line; heavy imports happen inside the commands, so that --help is instant.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable

import typer

from patch.artefacts import PatchError
from patch.cli import benchmark, cluster, config, prepare, results
from patch.cli.compress import compress
from patch.cli.evaluate import evaluate
from patch.cli.export import export
from patch.cli.inspect import inspect
from patch.cli.learn import learn
from patch.cli.options import fail
from patch.cli.plan import plan
from patch.cli.prune import prune

app = typer.Typer(
    name="patch-llm",
    help="Prune language models to any sparsity from 0 to 50 % and measure what it costs (PATCH, arXiv 2509.23410).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.add_typer(prepare.app, name="prepare")
STAGES: list[Callable[..., None]] = [prune, learn, compress, evaluate, export, inspect]
RESULTS: list[Callable[..., None]] = [
    plan, results.collect, results.tables, results.figures, results.mlflow, results.show, results.status,
]  # fmt: skip
for command in STAGES + RESULTS:
    app.command()(command)
app.add_typer(benchmark.app, name="benchmark")
app.add_typer(config.app, name="config")
app.add_typer(cluster.app, name="cluster")


def main() -> None:
    """Run the command line; errors that a person can mend end in one line."""
    # Before any library reads them: no progress bars in logs, no network for telemetry.
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for name in ("httpx", "lm_eval", "datasets", "fsspec", "filelock", "matplotlib", "fontTools", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        app()
    except PatchError as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("stopped; finished parts are kept, the same command goes on from there.", 130)
    except OSError as error:
        if error.errno != 28:
            raise
        fail(f"{error.filename or 'disk'}: no space left; free some and run the same command again.")
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        fail(f"out of GPU memory ({str(error).splitlines()[0]}); use --device cpu, a smaller batch, or a larger GPU.")
