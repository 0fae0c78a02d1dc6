"""Loading causal language models, and finding the linear layers that are pruned.

Works on any transformers causal LM whose decoder blocks hold `nn.Linear`s: the blocks are found by
structure, so embeddings and the head, which lie outside them, are never touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from patch import embedded
from patch.artefacts import PatchError, checksum_tensors, read_json, write_json
from patch.hub import first_line, hub_access

SCHEMA = "patch.model/1"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class PreparedModel:
    """Where a model lies on this machine and what it is: the content of `model.json`."""

    source: str
    """Hub id, directory, or "embedded:NAME"."""
    revision: str | None
    """Commit on the hub; None for directories and embedded models."""
    path: str
    dtype: str
    parameters: int
    prunable_parameters: int

    def write(self, path: Path | str) -> None:
        write_json(path, {"schema": SCHEMA, **asdict(self)})

    @classmethod
    def read(cls, path: Path | str) -> PreparedModel:
        content = read_json(path, SCHEMA)
        content.pop("schema")
        try:
            return cls(**content)
        except TypeError as error:
            raise PatchError(f"{path}: not a complete description ({error}); prepare the model again.") from None


def prepare_model(source: str, revision: str | None = None, dtype: str = "auto") -> PreparedModel:
    """Bring a model to this machine (hub download, or conversion of an embedded one) and describe it."""
    path, revision = _locate(source, revision)
    model = load_model(str(path), dtype=dtype)
    return PreparedModel(
        source=source,
        revision=revision,
        path=str(path),
        dtype=str(model.dtype).removeprefix("torch."),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        prunable_parameters=sum(linear.weight.numel() for linear in prunable_linears(model).values()),
    )


def load_model(
    source: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    local_files_only: bool = False,
    token: str | None = None,
) -> PreTrainedModel:
    """Load a causal LM into CPU memory, in evaluation mode, weights frozen.

    source: a `model.json` of `prepare_model`, a directory, a hub id, or "embedded:NAME".
    dtype: "float32", "bfloat16", "float16", or "auto" for the one it was saved in.
    local_files_only: of the hub's models, take what is in the local cache. token: for the hub; default: HF_TOKEN.
    Raises PatchError with the way out when it cannot be had.
    """
    path, revision, dtype = _resolve(source, revision, dtype)
    try:
        with hub_access(f"model {source}"):
            model = AutoModelForCausalLM.from_pretrained(
                path, revision=revision, dtype=DTYPES.get(dtype, "auto"), attn_implementation="sdpa",
                local_files_only=local_files_only, token=token,
            )  # fmt: skip
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise PatchError(
            f"model {source}: transformers cannot load it as a causal LM ({first_line(error)})."
        ) from error
    model.requires_grad_(False)
    return model.eval()


def load_tokenizer(
    source: str, *, revision: str | None = None, local_files_only: bool = False, token: str | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model; arguments as in `load_model`."""
    path, revision, _ = _resolve(source, revision, "auto")
    try:
        with hub_access(f"tokenizer of {source}"):
            return AutoTokenizer.from_pretrained(
                path, revision=revision, local_files_only=local_files_only, token=token
            )
    except (OSError, ValueError, KeyError) as error:
        raise PatchError(f"tokenizer of {source}: transformers cannot load it ({first_line(error)}).") from error


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder blocks: the `ModuleList` that holds most of the linear weights.

    Raises PatchError where there is none.
    """
    candidates = [
        (sum(linear.weight.numel() for linear in _linears(module)), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    ]
    weights, name, blocks = max(candidates, key=lambda found: found[0], default=(0, "", nn.ModuleList()))
    if weights == 0:
        raise PatchError(
            f"model {type(model).__name__}: its decoder blocks hold no nn.Linear, so there is nothing to prune "
            "(Llama, Qwen, Gemma, Mistral and OPT are among the architectures that work)."
        )
    return name, blocks


def prunable_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """All `nn.Linear`s in the decoder blocks by their full name, in order of execution of the blocks."""
    prefix, blocks = decoder_blocks(model)
    return {
        f"{prefix}.{index}.{name}": module
        for index, block in enumerate(blocks)
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    }


def in_attention(name: str) -> bool:
    """Whether a linear layer belongs to attention, by its full name such as "model.layers.0.self_attn.q_proj"."""
    return any("attn" in part or "attention" in part for part in name.split(".")[:-1])


def content_checksum(model: nn.Module) -> str:
    """SHA-256 of all weights as they are in memory: what exactly was scored."""
    return checksum_tensors(dict(model.state_dict()))


def vocabulary_size(model: PreTrainedModel) -> int:
    """Number of rows of the input embedding, which may exceed the tokenizer's vocabulary."""
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    return embedding.num_embeddings


def tokenizer_checksum(tokenizer: PreTrainedTokenizerBase) -> str:
    """Identity of a tokenizer: its vocabulary, and what it makes of a probe text."""
    import hashlib

    vocabulary: Mapping[str, Any] = tokenizer.get_vocab()
    probe = tokenizer("PATCH: 2:4 tiles,\n\n  naïve 你好 1234567890").input_ids
    return hashlib.sha256(repr((sorted(vocabulary.items()), probe)).encode()).hexdigest()


def _resolve(source: str, revision: str | None, dtype: str) -> tuple[str, str | None, str]:
    if dtype != "auto" and dtype not in DTYPES:
        raise PatchError(f"dtype {dtype!r}: choose one of auto, {', '.join(DTYPES)}.")
    if source.endswith(".json"):
        prepared = PreparedModel.read(source)
        if not Path(prepared.path).is_dir():
            raise PatchError(f"{source}: the model's files are gone from {prepared.path}; prepare the model again.")
        return prepared.path, None, dtype if dtype != "auto" else prepared.dtype
    if source.startswith(embedded.PREFIX):
        return str(embedded.model_directory(source)), None, dtype
    if source.startswith((".", "/", "~")) or Path(source).is_dir():
        path = Path(source).expanduser()
        if not (path / "config.json").is_file():
            raise PatchError(f"model {source}: no such directory, or no config.json in it.")
        return str(path), None, dtype
    return source, revision, dtype


def _locate(source: str, revision: str | None) -> tuple[Path, str | None]:
    path, revision, _ = _resolve(source, revision, "auto")
    if Path(path).is_dir():
        return Path(path).resolve(), None
    from huggingface_hub import snapshot_download

    with hub_access(f"model {source}"):
        snapshot = Path(
            snapshot_download(
                path, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
            )
        )
    return snapshot, snapshot.name


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [child for child in module.modules() if isinstance(child, nn.Linear)]
