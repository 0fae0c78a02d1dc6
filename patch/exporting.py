"""Pruned models as checkpoints that any tool loads: dense weights with exact zeros, and the MaskSet beside them.

    patch.export("path/or/hub-id", "mask.safetensors", "pruned-model")

The directory is an ordinary transformers checkpoint. No key of its config speaks of sparsity: the formats that did
are gone from vLLM and transformers, and both refuse or misread such models. They run it dense; what makes use of the
pattern is `mask.safetensors`, which such a loader finds with `masks_in`.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from patch.artefacts import PatchError, write_text
from patch.model_card import model_card
from patch.models import load_model, load_tokenizer, prunable_linears
from patch.records import Record
from patch.sparsity.maskset import LinearMask, MaskSet
from patch.sparsity.tiles import expand

MASK_FILE = "mask.safetensors"
log = logging.getLogger(__name__)


def export(
    model: str,
    masks: MaskSet | Path | str,
    output: Path | str,
    *,
    records: Sequence[Record] = (),
    revision: str | None = None,
    dtype: str = "auto",
    shard_size: str = "5GB",
) -> Path:
    """Write the pruned model into the directory `output`, verify what was written, and return the directory.

    model: the unpruned one, as `load_model` takes it. masks: a MaskSet of it, or its file.
    records: of its stages, and of the dense model's evaluation; their numbers go into the model card.
    shard_size: larger checkpoints are several files, as transformers writes them.

    It appears whole or not at all. An earlier export there is replaced, anything else is refused. Memory: the model
    once in `dtype`, and the keep mask of a layer.
    Raises PatchError where mask, records and model do not belong together, or what was written is not what was meant.
    """
    output = Path(output)
    _refuse_foreign(output, model)
    masks = masks if isinstance(masks, MaskSet) else MaskSet.load(masks)
    card = model_card(masks, records, model, revision)
    loaded = load_model(model, revision=revision, dtype=dtype)
    tokenizer = load_tokenizer(model, revision=revision)
    masks.apply_(prunable_linears(loaded))
    _make_valid(loaded)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
    try:
        loaded.save_pretrained(temporary, max_shard_size=shard_size)
        tokenizer.save_pretrained(temporary)
        masks.save(temporary / MASK_FILE)
        write_text(temporary / "README.md", card)
        verify(temporary, masks, loaded)
        _show(temporary)
        _replace(temporary, output)
    except SafetensorError as error:  # its Rust code reports system errors as text
        raise PatchError(f"{output}: could not be written ({error}); nothing was changed.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    log.info("%s: %.2f %% of the prunable weights are 0, verified", output, 100 * masks.sparsity)
    return output


def masks_in(directory: Path | str) -> Path | None:
    """The MaskSet of an export; None for a directory that is not one."""
    path = Path(directory) / MASK_FILE
    return path if path.is_file() and (Path(directory) / "config.json").is_file() else None


def verify(directory: Path | str, masks: MaskSet, model: PreTrainedModel | None = None) -> None:
    """Read a checkpoint's weights one by one: pruned ones are 0, and groups of M keep at most N where they must.

    model: what was written, to compare all its weights with.
    Raises PatchError that names file and weight.
    """
    expected: Mapping[str, Tensor] = model.state_dict() if model else {}
    wanted = {f"{name}.weight": mask for name, mask in masks.linears.items()}
    for path in sorted(path for path in Path(directory).glob("*.safetensors") if path.name != MASK_FILE):
        try:
            with safe_open(path, framework="pt") as stream:
                for name in stream.keys():  # noqa: SIM118
                    weight = stream.get_tensor(name)
                    if name in wanted:
                        _verify_weight(weight, wanted.pop(name), f"{path}: {name}")
                    if name in expected and not torch.equal(weight, expected[name]):
                        raise PatchError(f"{path}: {name}: not the weights that were written; export again.")
        except SafetensorError as error:
            raise PatchError(f"{path}: truncated or not a safetensors file ({error}); export again.") from None
    if wanted:
        raise PatchError(f"{directory}: {next(iter(wanted))} is in the mask but not in the checkpoint.")


def _verify_weight(weight: Tensor, mask: LinearMask, where: str) -> None:
    if tuple(weight.shape) != mask.shape:
        raise PatchError(f"{where}: its shape is {tuple(weight.shape)}, the mask's {mask.shape}.")
    nonzero = weight != 0
    if (nonzero & ~mask.keep_mask()).any():
        raise PatchError(f"{where}: weights that the mask prunes are not 0.")
    if mask.pattern.m:
        tiles = mask.dense_tiles()
        if tiles is not None:
            nonzero &= ~expand(tiles, mask.shape, mask.pattern.tile)
        if (nonzero.view(-1, mask.pattern.m).sum(1) > mask.pattern.n).any():
            raise PatchError(f"{where}: a group keeps more than {mask.pattern.n} of {mask.pattern.m}.")


def _make_valid(model: PreTrainedModel) -> None:
    """Some models were published with sampling settings but without `do_sample`, which transformers refuses to save."""
    settings = model.generation_config
    if settings is None:
        return
    try:
        settings.validate(strict=True)
    except ValueError:
        settings.do_sample = True


def _refuse_foreign(output: Path, model: str) -> None:
    if not output.exists():
        return
    if Path(model).exists() and output.resolve() == Path(model).resolve():
        raise PatchError(f"{output}: is the model itself; choose another directory for the export.")
    if output.is_dir() and (not any(output.iterdir()) or masks_in(output)):
        return
    raise PatchError(f"{output}: exists and is no earlier export; choose another directory, or remove it.")


def _show(directory: Path) -> None:
    """Temporary files and folders are made for the user alone, which would hide results from colleagues."""
    mode = (directory / "config.json").stat().st_mode  # by the umask
    directory.chmod(mode | (mode & 0o444) >> 2)
    for path in directory.glob("*.safetensors"):
        path.chmod(mode)


def _replace(new: Path, output: Path) -> None:
    """A directory takes another's name only where that is empty: the old one steps aside first."""
    if output.exists():
        old = Path(tempfile.mkdtemp(dir=output.parent, prefix=f".{output.name}."))
        output.replace(old)
        try:
            new.replace(output)
        except BaseException:
            old.replace(output)
            raise
        shutil.rmtree(old)
    else:
        new.replace(output)
