"""Bring models, tokens and questions to this machine."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from patch.artefacts import PatchError, write_json
from patch.cli.options import Device, Dtype, Length, Model, Revision, Samples, Sampling, device_name

log = logging.getLogger("patch")
app = typer.Typer(help=__doc__, no_args_is_help=True)


@app.command("model")
def model(
    model: Model,
    output: Annotated[Path, typer.Option(help="File to write: where the model lies and what it is.")],
    revision: Revision = None,
    dtype: Dtype = "auto",
) -> None:
    """Download or convert a model, and describe it in a small JSON file that other commands take as --model."""
    from patch import models

    prepared = models.prepare_model(model, revision, dtype)
    prepared.write(output)
    log.info(
        "%s: %.1f M parameters, %.1f M prunable", model, prepared.parameters / 1e6, prepared.prunable_parameters / 1e6
    )


@app.command("tokens")
def tokens(
    model: Model,
    source: Annotated[
        str, typer.Option(help="c4, wikitext2, slimpajama, embedded:c4, embedded:wikipedia, self, or a file.")
    ],
    output: Annotated[Path, typer.Option(help="File to write, .safetensors.")],
    sampling: Sampling = "windows",
    length: Length = 2048,
    samples: Samples = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the draw; none for text in order.")] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences sampled together, for `self`.", min=1)] = 256,
    device: Device = "auto",
) -> None:
    """Tokenise text once, so that every method sees the same tokens; `--source self` samples it from the model."""
    from patch.data import generate_tokens, make_tokens
    from patch.models import load_model, load_tokenizer

    if source == "self":
        if samples is None:
            raise PatchError("--source self: say with --samples how many sequences to sample.")
        loaded = load_model(model).to(device_name(device))  # type: ignore[arg-type]
        bos = load_tokenizer(model).bos_token_id
        sampled = generate_tokens(
            loaded, samples=samples, length=length, seed=seed or 0, batch_size=batch_size, bos=bos
        )
        sampled.save(output)
        return
    tokens = make_tokens(load_tokenizer(model), source, sampling=sampling, length=length, samples=samples, seed=seed)
    tokens.save(output)


@app.command("tasks")
def tasks(
    names: Annotated[list[str], typer.Argument(help="Task names of lm-evaluation-harness.")],
    output: Annotated[Path, typer.Option(help="File to write: what was brought.")],
    source: Annotated[str, typer.Option(help="hub or embedded.")] = "hub",
) -> None:
    """Bring the questions of zero-shot tasks to this machine, for nodes without network."""
    from patch.evaluation.zeroshot import TaskLibrary

    library = TaskLibrary(names, source)
    for name in names:
        log.info("questions of %s", name)
        library.download(name)
    write_json(output, {"schema": "patch.tasks/1", "source": source, "names": names})


@app.command("released")
def released(
    source: Annotated[str, typer.Option(help="Repository on the hub, directory or file of a published mask.")],
    output: Annotated[Path, typer.Option(help="File to write: where the mask lies and what it is.")],
    file: Annotated[str, typer.Option(help="Name of the file there.")] = "mask.npz",
    revision: Revision = None,
) -> None:
    """Download a published mask, and describe it in a small JSON file that `prune --method released` takes."""
    from patch.pruning.released import fetch

    found = fetch(source, file, revision)
    found.write(output)
    log.info("%s: %s", found.path, f"commit {found.revision}" if found.revision else "a file of this machine")
