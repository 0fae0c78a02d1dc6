"""Options that several commands share, and what turns their text into objects."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from patch.artefacts import PatchError

if TYPE_CHECKING:
    from patch.data import TokenSet
    from patch.methods import Learned, Trained
    from patch.records import Metric
    from patch.sparsity.maskset import MaskSet

Model = Annotated[
    str, typer.Option(help="Hub id, directory, `embedded:smollm2-135m`, or a model.json of `prepare model`.")
]
Revision = Annotated[str | None, typer.Option(help="Commit, tag or branch on the hub.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto for the one it was saved in.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, or auto for a GPU where there is one.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; all cores if not given.", min=1)]
Output = Annotated[Path, typer.Option(help="Directory for results; made if missing.")]
Key = Annotated[str, typer.Option(help="Identity to store in the record; the workflow passes its cell key.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
Sampling = Annotated[
    str,
    typer.Option(help="windows (of documents that are long enough), packed, documents, or joined (for perplexity)."),
]
Samples = Annotated[int | None, typer.Option(help="Number of sequences; all if not given.", min=1)]
CalibrationText = Annotated[
    str | None, typer.Option(help="Token file of `prepare tokens`, or a text source; default: c4.")
]
CalibrationSamples = Annotated[int, typer.Option(help="Calibration sequences.", min=1)]
Length = Annotated[int, typer.Option(help="Tokens per sequence.", min=2)]
Configs = Annotated[list[Path], typer.Option("--config", help="Config layer; repeat for more, later ones win.")]
Override = Annotated[str, typer.Option(help="A last config layer as JSON.")]
Runs = Annotated[Path, typer.Argument(help="The runs table, runs.parquet, of `collect`.")]
MethodOptions = Annotated[
    list[str] | None, typer.Option("--set", help="A hyper-parameter, NAME=VALUE; repeat for more.")
]
TrainedMethod = Annotated[str, typer.Option(help="maskllm, patch_joint, patch_tile, proxsparse or fine_tune.")]
LearnedMethod = Annotated[str, typer.Option(help="maskllm, patch_joint or patch_tile.")]
Shard = Annotated[
    bool, typer.Option(help="Split weights and logits over all processes; `learn` does where they do not fit one.")
]
RowsFile = Annotated[Path, typer.Option(help="CSV file to add rows to.")]
Numbers = Annotated[str, typer.Option(help="Numbers, separated by commas.")]
Official = Annotated[Path | None, typer.Option(help="Checkout of Paramathic/patch to time too.")]


def trained_method(name: str, options: list[str] | None) -> Trained:
    from patch.methods import Trained, make_method

    chosen = make_method(name, parse_options(options or []))
    if not isinstance(chosen, Trained):
        raise PatchError(f"method {name!r}: does not learn; use `patch-llm prune`.")
    return chosen


def learned_method(name: str, options: list[str] | None) -> Learned:
    """One that learns masks on frozen weights."""
    from patch.methods import Learned

    chosen = trained_method(name, options)
    if not isinstance(chosen, Learned):
        raise PatchError(f"method {name!r}: trains weights; use one that learns masks on frozen ones.")
    return chosen


def tokens_from(
    source: str, model: str, revision: str | None, sampling: str, samples: int | None, length: int, seed: int | None
) -> TokenSet:
    """A token file as it is, or tokens made from a text source now."""
    from patch.data import TokenSet, make_tokens
    from patch.models import load_tokenizer

    if source.endswith(".safetensors"):
        return TokenSet.load(source)
    tokenizer = load_tokenizer(model, revision=revision)
    return make_tokens(tokenizer, source, sampling=sampling, length=length, samples=samples, seed=seed)


def parse_options(pairs: list[str]) -> dict[str, Any]:
    import yaml

    return {name: yaml.safe_load(value) for name, value in parse_pairs(pairs, "--set").items()}


def options_of(methods: list[str], pairs: list[str]) -> dict[str, dict[str, Any]]:
    """By method: the options NAME=VALUE, which all get, and its own METHOD.NAME=VALUE, which go before them."""
    found: dict[str, dict[str, Any]] = {name: {} for name in methods}
    own: dict[str, dict[str, Any]] = {name: {} for name in methods}
    for name, value in parse_options(pairs).items():
        method, dot, option = name.partition(".")
        if not dot:
            for options in found.values():
                options[name] = value
        elif method in own:
            own[method][option] = value
        else:
            raise PatchError(f"--set {name}: the methods asked for are {', '.join(methods)}.")
    return {name: found[name] | own[name] for name in methods}


def parse_pairs(texts: list[str], option: str) -> dict[str, str]:
    for text in texts:
        if "=" not in text:
            raise PatchError(f"{option} {text}: write it as NAME=VALUE.")
    return dict(text.split("=", 1) for text in texts)


def parse_integer(name: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise PatchError(f"--limit-for {name}={value}: the limit must be a whole number.") from None


def parse_numbers(option: str, text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise PatchError(f"{option} {text}: write numbers with commas between them, such as 25,45.") from None


def parse_counts(option: str, text: str) -> list[int]:
    """Whole numbers from 1."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise PatchError(f"{option} {text}: write whole numbers with commas between them, such as 1,16.")
    return [int(number) for number in text.split(",")]


def parse_lengths(option: str, text: str) -> list[tuple[int, int]]:
    """Pairs of tokens of a prompt and tokens to generate, of which the prefill gives the first."""
    lengths = [tuple(map(int, part.split("+"))) for part in text.split(",") if re.fullmatch(r"[1-9]\d*\+\d+", part)]
    if len(lengths) != text.count(",") + 1 or any(generated < 2 for _, generated in lengths):
        raise PatchError(
            f"{option} {text}: write PROMPT+GENERATED with at least 2 tokens to generate, such as 128+128,128+1024."
        )
    return [(prefill, generated) for prefill, generated in lengths]


def device_name(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise PatchError("--device cuda: PyTorch sees no GPU here; use --device cpu, or a CUDA build of PyTorch.")
    return name


def use_threads(threads: int | None) -> None:
    import torch

    if threads:
        torch.set_num_threads(threads)


def sparsity_metrics(masks: MaskSet) -> list[Metric]:
    """Realised sparsity of the model and of every layer."""
    from patch.records import Metric

    sizes = {name: mask.size for name, mask in masks.linears.items()}
    return [
        Metric("model", "sparsity", masks.sparsity, samples=sum(sizes.values())),
        *(Metric(name, "sparsity", mask.sparsity, samples=sizes[name]) for name, mask in masks.linears.items()),
    ]


def fail(message: str, code: int = 1) -> None:
    typer.echo(f"patch-llm: error: {' '.join(message.split())}", err=True)
    sys.exit(code)
