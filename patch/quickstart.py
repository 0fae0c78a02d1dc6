"""The documented Python API, with the names and dictionary keys of the official repository's Quick Start.

    model, lm_eval_model = get_llm(model_name)
    compressed_model = prepare_pruned_model(model, tokenizer, checkpoint_name, prune_args, mask_tile_size, target)
    model, lm_eval_model = learn_mask(model_name, compressed_model, tokenizer, mask_args)
    perplexity, accuracies = evaluate(model, lm_eval_model, tokenizer)

`examples/quickstart.py` is a whole run. The pieces below are the same that the command line uses. Keys beyond the
official ones are optional: they name the data and the schedule, which the official code fixes.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from patch.artefacts import PatchError
from patch.data import TokenSet, make_tokens
from patch.evaluation.perplexity import perplexity
from patch.evaluation.zeroshot import TaskLibrary, harness_model, zero_shot
from patch.experiments import TASKS
from patch.learning import learn_masks
from patch.learning.curves import observer
from patch.methods import Learned, make_method
from patch.models import load_model, load_tokenizer, prunable_linears
from patch.pruning import prune_model
from patch.sparsity.maskset import MaskSet
from patch.sparsity.patterns import Pattern

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM

Arguments = Mapping[str, Any] | Any
"""A dictionary, or an object with attributes such as an argparse.Namespace."""

# official key: our hyper-parameter
_OPTIONS = {
    "lr": "learning_rate",
    "local_bs": "micro_batch_size",
    "optimizer": "optimizer",
    "weight_reg": "norm_weight",
}
_PATTERN_OPTIONS = {
    "temp_schedule_2_4": "pattern_temperature",
    "scaler_schedule_2_4": "pattern_scale",
    "hard_2_4": "hard_patterns",
    "prior_strength_2_4": "pattern_prior_strength",
}
_TILE_OPTIONS = {
    "sparse_reg": "density_weight",
    "temp_schedule_tile": "tile_temperature",
    "scaler_schedule_tile": "tile_scale",
    "hard_tile": "hard_tiles",
    "prior_strength_tile": "tile_prior_strength",
}
_MASK_KEYS = {"learnable_mask", "mask_tile_size", "fine_tuning_sequence_length", "target_sparsity_ratio"} | {
    "joint_optim", "mask_llm", "layer_target", "grad_checkpoint"
}  # fmt: skip
_OUR_MASK_KEYS = {"dataset", "epochs", "state", "seed", "steps", "batch_size", "selection", "warmup_steps"}
_PRUNE_KEYS = {"prune_method", "sparsity_type", "sparsity_ratio", "nsamples", "maskllm_checkpoint", "fine_tune"} | {
    "optimizer_FT_pruning", "calibration_dataset", "eval_dataset", "shift_zero_metrics"
}  # fmt: skip
_OUR_PRUNE_KEYS = {"calibration_length", "calibration_sampling"}


def get_llm(
    model_name: str, local_files_only: bool = False, hf_token: str | None = None, dtype: str = "auto"
) -> tuple[PreTrainedModel, HFLM]:
    """Load a causal LM, and the same model as lm-evaluation-harness sees it.

    model_name: hub id, directory, or "embedded:smollm2-135m". dtype: "auto" for bfloat16 on a GPU and the one that
    the model was saved in on a CPU; or a name such as "float32".
    """
    if hf_token:
        os.environ["HF_TOKEN"] = hf_token
    if local_files_only:
        os.environ["HF_HUB_OFFLINE"] = "1"
    if dtype == "auto" and torch.cuda.is_available():
        dtype = "bfloat16"
    model = load_model(model_name, dtype=dtype).to(_device())  # type: ignore[arg-type]
    return model, harness_model(model, load_tokenizer(model_name))


def prepare_pruned_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    checkpoint_name: str,
    prune_args: Arguments,
    mask_tile_size: tuple[int, int],
    target_sparsity_ratio: float,
    seed: int = 0,
) -> PreTrainedModel:
    """Prune `model` to 2:4 in place, which makes the prior of `learn_mask`, and return it.

    checkpoint_name: directory for the masks; where it holds some for this model, they are used instead.
    prune_args: `prune_method` (magnitude, wanda, sparsegpt, thanos, or maskllm with `maskllm_checkpoint`, a MaskSet
        file), `sparsity_type` ("2:4"), `sparsity_ratio` (0.5), `nsamples`, `calibration_dataset`, `shift_zero_metrics`;
        ours: `calibration_length` (2048), `calibration_sampling` ("windows").
    mask_tile_size: accepted as in the official API; the reference mask serves any tile size.
    target_sparsity_ratio: of the unstructured reference, whose density gives the prior of the tiles.
    """
    arguments = _Checked(prune_args, _PRUNE_KEYS | _OUR_PRUNE_KEYS, "prune_args")
    if arguments.get("fine_tune", False):
        raise PatchError("prune_args: fine_tune is not available; leave it False.")
    if arguments.get("sparsity_type", "2:4") != "2:4" or arguments.get("sparsity_ratio", 0.5) != 0.5:
        raise PatchError("prune_args: the prior of PATCH is a 2:4 mask: sparsity_type 2:4, sparsity_ratio 0.5.")
    name = arguments.get("prune_method", "wanda")
    folder = Path(checkpoint_name)
    files = {role: folder / f"{role}.safetensors" for role in ("pattern", "reference")}
    if not all(file.is_file() for file in files.values()):
        if name == "maskllm":
            if not arguments.get("maskllm_checkpoint", None):
                raise PatchError("prune_args: prune_method maskllm needs maskllm_checkpoint, a MaskSet file.")
            MaskSet.load(arguments.get("maskllm_checkpoint", None)).save(files["pattern"])
            name = "wanda"  # for the reference, as the official code does
        else:
            _one_shot(model, tokenizer, name, "2:4", 0.5, arguments, seed).save(files["pattern"])
        _one_shot(model, tokenizer, name, "unstructured", target_sparsity_ratio, arguments, seed).save(
            files["reference"]
        )
    masks = {role: MaskSet.load(file) for role, file in files.items()}
    masks["pattern"].apply_(prunable_linears(model))
    model.patch_masks = masks  # type: ignore[assignment]
    return model


def learn_mask(
    model_name: str,
    compressed_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    mask_args: Arguments,
    local_files_only: bool = False,
    hf_token: str | None = None,
    wandb: bool = False,
) -> tuple[PreTrainedModel, HFLM]:
    """Learn a mask on the frozen weights of `model_name`, from the priors in `compressed_model`; apply and return it.

    mask_args: the keys of the official API (`lr`, `sparse_reg`, `temp_schedule_tile`, ...); ours: `dataset` (a text
        source, default slimpajama), `epochs`, `steps`, `batch_size`, `warmup_steps`, `selection`, `seed`, and `state`
        (a directory, from which an interrupted run goes on).
    The returned model has exact zeros, and its MaskSet as attribute `patch_mask`.
    """
    options = {**_OPTIONS, **_PATTERN_OPTIONS, **_TILE_OPTIONS}
    arguments = _Checked(mask_args, _MASK_KEYS | _OUR_MASK_KEYS | options.keys(), "mask_args")
    method = _learned_method(arguments)
    share = 0.5 if arguments.get("mask_llm", False) else arguments.get("target_sparsity_ratio", 0.5)
    height, width = arguments.get("mask_tile_size", (128, 128))
    pattern = Pattern.parse("2:4" if arguments.get("mask_llm", False) else f"tiles:{height}x{width}")
    model, lm_eval_model = get_llm(model_name, local_files_only, hf_token)
    seed = arguments.get("seed", 0)
    state = arguments.get("state", None)
    training = make_tokens(
        tokenizer,
        arguments.get("dataset", "slimpajama"),
        sampling="packed",
        length=arguments.get("fine_tuning_sequence_length", 4096),
        samples=-(-method.steps * method.batch_size // arguments.get("epochs", 1)),
    )
    with observer("patch" if wandb else None, {"model": model_name, **method.model_dump(mode="json")}) as observe:
        learned = learn_masks(
            model, method, pattern, share, training, compressed_model.patch_masks,  # type: ignore[arg-type]
            seed=seed, epochs=arguments.get("epochs", 1), device=_device(),
            state=Path(state) if state else None, observe=observe,
        )  # fmt: skip
    learned.masks.apply_(prunable_linears(model))
    model.patch_mask = learned.masks  # type: ignore[assignment]
    return model, lm_eval_model


def evaluate(
    model: PreTrainedModel,
    lm_eval_model: HFLM | None,
    tokenizer: PreTrainedTokenizerBase,
    evaluate_perplexity: bool = True,
    eval_dataset: str = "wikitext2",
    eval_batch_size: int = 1,
    test_lmharness: bool = True,
    *,
    tasks: tuple[str, ...] = TASKS,
    task_source: str = "hub",
    limit: int | None = None,
    length: int = 4096,
) -> tuple[float, dict[str, float]]:
    """Perplexity (0.0 if not asked for) and zero-shot accuracies by task, with their "average".

    lm_eval_model: as `get_llm` returned it; it wraps `model`, which is what is scored. eval_batch_size: questions
    scored together. tasks: the paper's eight by default (the official code has six). length: tokens per window.
    """
    value = 0.0
    if evaluate_perplexity:
        tokens = make_tokens(tokenizer, eval_dataset, sampling="joined", length=length)
        value = perplexity(model, eval_dataset, tokens).metrics[0].value
    accuracies: dict[str, float] = {}
    if test_lmharness:
        library = TaskLibrary(list(tasks), task_source)
        for task in tasks:
            metrics = zero_shot(model, tokenizer, library, task, limit, eval_batch_size).metrics
            accuracies[task] = next(metric.value for metric in metrics if metric.name == "acc")
        accuracies["average"] = sum(accuracies.values()) / len(accuracies)
    return value, accuracies


class _Checked:
    """Arguments by key, whatever they came in; unknown keys are errors."""

    def __init__(self, arguments: Arguments, known: set[str], name: str):
        self._values = dict(arguments) if isinstance(arguments, Mapping) else dict(vars(arguments))
        unknown = sorted(self._values.keys() - known)
        if unknown:
            raise PatchError(f"{name}: unknown key {unknown[0]!r}; known are {', '.join(sorted(known))}.")

    def get(self, key: str, default: Any) -> Any:
        return self._values.get(key, default)

    def __contains__(self, key: str) -> bool:
        return key in self._values


def _learned_method(arguments: _Checked) -> Learned:
    """The method that the official switches name, with the options it has."""
    if arguments.get("mask_llm", False):
        name, known = "maskllm", _OPTIONS | _PATTERN_OPTIONS
    elif arguments.get("joint_optim", False):
        name, known = "patch_joint", _OPTIONS | _PATTERN_OPTIONS | _TILE_OPTIONS
    else:
        name, known = "patch_tile", _OPTIONS | _TILE_OPTIONS
    options = {ours: arguments.get(key, None) for key, ours in known.items() if key in arguments}
    options["checkpointing"] = "activations" if arguments.get("grad_checkpoint", False) else "off"
    options |= {key: arguments.get(key, None) for key in ("steps", "batch_size", "warmup_steps") if key in arguments}
    if name != "maskllm":
        options["density_target"] = "block" if arguments.get("layer_target", False) else "global"
        options["selection"] = arguments.get("selection", "sign")
    method = make_method(name, options)
    assert isinstance(method, Learned)
    return method


def _one_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    pattern: str,
    share: float,
    arguments: _Checked,
    seed: int,
) -> MaskSet:
    """Masks of a one-shot method; the model stays as it is."""
    options = {"shift_zero_metrics": arguments.get("shift_zero_metrics", False)} if name == "wanda" else {}
    method = make_method(name, options)
    tokens: TokenSet | None = None
    if method.uses_calibration:
        tokens = make_tokens(
            tokenizer,
            arguments.get("calibration_dataset", "c4"),
            sampling=arguments.get("calibration_sampling", "windows"),
            length=arguments.get("calibration_length", 2048),
            samples=arguments.get("nsamples", 128),
            seed=seed,
            split="train",
        )
    return prune_model(copy.deepcopy(model), method, Pattern.parse(pattern), share, tokens, _device(), seed)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
