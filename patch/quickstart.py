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
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from patch.artefacts import PatchError
from patch.data import TokenSet, check_source, make_tokens
from patch.evaluation.perplexity import perplexity
from patch.evaluation.zeroshot import TaskLibrary, harness_model, zero_shot
from patch.experiments import TASKS, Documents
from patch.learning import learn_masks, train_weights
from patch.learning.curves import observer
from patch.methods import Learned, TrainedWeights, make_method
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
_OUR_PRUNE_KEYS = {"calibration_length", "calibration_sampling"} | {
    "fine_tuning_dataset", "fine_tuning_samples", "fine_tuning_length", "fine_tuning_batch_size"
}  # fmt: skip


EVALUATED = "wikitext2"
"""The text on which perplexity is measured unless another is asked for."""


def get_llm(
    model_name: str, local_files_only: bool = False, hf_token: str | None = None, dtype: str = "auto"
) -> tuple[PreTrainedModel, HFLM]:
    """Load a causal LM, and the same model as lm-evaluation-harness sees it.

    model_name: hub id, directory, or "embedded:smollm2-135m". local_files_only: take what is in the hub's local cache.
    hf_token: for models behind a licence; default: HF_TOKEN. dtype: "auto" for bfloat16 on a GPU and the one that the
    model was saved in on a CPU; or a name such as "float32".
    """
    if dtype == "auto" and torch.cuda.is_available():
        dtype = "bfloat16"
    access: dict[str, Any] = {"local_files_only": local_files_only, "token": hf_token}
    model = load_model(model_name, dtype=dtype, **access).to(_device())  # type: ignore[arg-type]
    return model, harness_model(model, load_tokenizer(model_name, **access))


def prepare_pruned_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    checkpoint_name: str,
    prune_args: Arguments,
    mask_tile_size: tuple[int, int],
    target_sparsity_ratio: float,
    seed: int = 0,
) -> PreTrainedModel:
    """Prune `model` in place, to 2:4 for the prior of `learn_mask`, and return it.

    checkpoint_name: directory for the masks; where it holds some for this model, they are used instead.
    prune_args: `prune_method` (magnitude, wanda, sparsegpt, thanos, prox_sparse, or maskllm with `maskllm_checkpoint`,
        a MaskSet file), `sparsity_type` ("2:4", or "unstructured", which `learn_mask` cannot start from),
        `sparsity_ratio` (0.5), `nsamples` (128; documents that prox_sparse trains on: 400), `calibration_dataset`,
        `shift_zero_metrics`, `eval_dataset` (what `evaluate` takes unless told otherwise), `fine_tune` (train the kept
        weights of the returned model; a mask is learned on the original ones all the same), `optimizer_FT_pruning`
        (of fine_tune and prox_sparse); ours: `calibration_length` (2048; prox_sparse: 4096), `calibration_sampling`
        ("windows"), and for fine_tune, with SLiM's defaults, `fine_tuning_dataset` ("slimpajama"),
        `fine_tuning_samples` (30000), `fine_tuning_length` (1024), `fine_tuning_batch_size` (64).
    mask_tile_size: accepted as in the official API; the reference mask serves any tile size.
    target_sparsity_ratio: of the unstructured reference, whose density gives the prior of the tiles.
    """
    arguments = _Checked(prune_args, _PRUNE_KEYS | _OUR_PRUNE_KEYS, "prune_args")
    name = arguments.get("prune_method", "wanda").replace("prox_sparse", "proxsparse")
    pattern, share = _pruned_to(name, arguments)
    eval_dataset = arguments.get("eval_dataset", None) or EVALUATED
    check_source(eval_dataset)  # hours before it is read
    folder = Path(checkpoint_name)
    files = {role: folder / f"{role}.safetensors" for role in ("pattern", "reference")}
    if not all(file.is_file() for file in files.values()):
        if name == "maskllm":
            masks = MaskSet.load(arguments.get("maskllm_checkpoint", None))
        elif name == "proxsparse":
            masks = _proxsparse(model, tokenizer, arguments, seed)
        else:
            masks = _one_shot(model, tokenizer, name, pattern, share, arguments, seed)
        if arguments.get("fine_tune", False):
            masks = _fine_tuned(model, tokenizer, masks, pattern, arguments, seed)
        masks.save(files["pattern"])
        # as the official code does where the method cannot make it
        name = "wanda" if name in ("maskllm", "proxsparse") else name
        unstructured = Pattern.parse("unstructured")
        _one_shot(model, tokenizer, name, unstructured, target_sparsity_ratio, arguments, seed).save(files["reference"])
    loaded = {role: MaskSet.load(file) for role, file in files.items()}
    if other := {mask.pattern.kind for mask in loaded["pattern"].linears.values()} - {"dense", pattern.kind}:
        raise PatchError(
            f"checkpoint_name {folder}: holds masks of another kind ({other.pop()}), not {pattern} as asked for; name "
            "another directory."
        )
    loaded["pattern"].apply_(prunable_linears(model))
    model.patch_masks = loaded  # type: ignore[assignment]
    model.patch_eval_dataset = eval_dataset  # type: ignore[assignment]
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
        (a directory, from which an interrupted run goes on). `learnable_mask` False learns nothing, and returns
        `compressed_model` with its own mask.
    The returned model has exact zeros, and its MaskSet as attribute `patch_mask`.
    """
    options = {**_OPTIONS, **_PATTERN_OPTIONS, **_TILE_OPTIONS}
    arguments = _Checked(mask_args, _MASK_KEYS | _OUR_MASK_KEYS | options.keys(), "mask_args")
    priors: dict[str, MaskSet] = compressed_model.patch_masks  # type: ignore[assignment]
    if not arguments.get("learnable_mask", True):
        compressed_model.patch_mask = priors["pattern"]  # type: ignore[assignment]
        return compressed_model, harness_model(compressed_model, tokenizer)
    if any(mask.pattern.kind == "unstructured" for mask in priors["pattern"].linears.values()):
        raise PatchError(
            "compressed_model: pruned without a pattern; masks are learned from a 2:4 prior, prepare it with "
            "sparsity_type 2:4 in a checkpoint_name of its own, or set learnable_mask False."
        )
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
            model, method, pattern, share, training, priors,
            seed=seed, epochs=arguments.get("epochs", 1), device=_device(),
            state=Path(state) if state else None, observe=observe,
        )  # fmt: skip
    learned.masks.apply_(prunable_linears(model))
    model.patch_mask = learned.masks  # type: ignore[assignment]
    model.patch_eval_dataset = getattr(compressed_model, "patch_eval_dataset", EVALUATED)  # type: ignore[arg-type]
    return model, lm_eval_model


def evaluate(
    model: PreTrainedModel,
    lm_eval_model: HFLM | None,
    tokenizer: PreTrainedTokenizerBase,
    evaluate_perplexity: bool = True,
    eval_dataset: str | None = None,
    eval_batch_size: int = 1,
    test_lmharness: bool = True,
    *,
    tasks: tuple[str, ...] = TASKS,
    task_source: str = "hub",
    limit: int | None = None,
    length: int = 4096,
) -> tuple[float, dict[str, float]]:
    """Perplexity (0.0 if not asked for) and zero-shot accuracies by task, with their "average".

    lm_eval_model: as `get_llm` returned it; it wraps `model`, which is what is scored. eval_dataset: default: that of
    the `prune_args` that the model was prepared with, else wikitext2. eval_batch_size: questions scored together.
    tasks: the paper's eight by default (the official code has six). length: tokens per window.
    """
    value = 0.0
    if evaluate_perplexity:
        eval_dataset = eval_dataset or str(getattr(model, "patch_eval_dataset", EVALUATED))
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


def _pruned_to(name: str, arguments: _Checked) -> tuple[Pattern, float]:
    """Pattern and share of pruned weights that `prune_args` ask for. Raises PatchError where the method cannot."""
    kind, share = arguments.get("sparsity_type", "2:4"), arguments.get("sparsity_ratio", 0.5)
    if kind not in ("2:4", "unstructured"):
        raise PatchError(f"prune_args: sparsity_type {kind!r}: choose 2:4 or unstructured.")
    if kind == "2:4" and share != 0.5:
        raise PatchError(
            f"prune_args: sparsity_ratio {share}: 2:4 prunes half; leave it 0.5, or choose sparsity_type unstructured."
        )
    if kind != "2:4" and name in ("maskllm", "proxsparse"):
        raise PatchError(f"prune_args: prune_method {name} makes 2:4 masks only; set sparsity_type 2:4.")
    if name == "maskllm" and not arguments.get("maskllm_checkpoint", None):
        raise PatchError("prune_args: prune_method maskllm needs maskllm_checkpoint, a MaskSet file.")
    return Pattern.parse(kind), share


def _one_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    pattern: Pattern,
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
    return prune_model(copy.deepcopy(model), method, pattern, share, tokens, _device(), seed)


def _proxsparse(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arguments: _Checked, seed: int) -> MaskSet:
    """2:4 masks of ProxSparse, which reads `nsamples` documents once; the model stays as it is."""
    usual = Documents()
    samples = arguments.get("nsamples", usual.samples)
    method = _training_method("proxsparse", arguments, steps=samples, warmup_steps=samples // 10)
    documents = make_tokens(
        tokenizer,
        arguments.get("calibration_dataset", usual.source),
        sampling="documents",
        length=arguments.get("calibration_length", usual.length),
        samples=samples,
        seed=usual.seed,
    )
    trained = train_weights(
        copy.deepcopy(model), method, Pattern.parse("2:4"), documents, {}, seed=seed, device=_device()
    )
    return trained.masks


def _fine_tuned(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    masks: MaskSet,
    pattern: Pattern,
    arguments: _Checked,
    seed: int,
) -> MaskSet:
    """The masks with trained weights (SLiM's `fine_tune`); the model stays as it is."""
    samples, batch = arguments.get("fine_tuning_samples", 30_000), arguments.get("fine_tuning_batch_size", 64)
    method = _training_method("fine_tune", arguments, steps=samples // batch, batch_size=batch)
    training = make_tokens(
        tokenizer,
        arguments.get("fine_tuning_dataset", "slimpajama"),
        sampling="packed",
        length=arguments.get("fine_tuning_length", 1024),
        samples=samples,
    )
    trained = train_weights(
        copy.deepcopy(model), method, pattern, training, {"start": masks}, seed=seed, device=_device()
    )
    return trained.masks


def _training_method(name: str, arguments: _Checked, **options: int) -> TrainedWeights:
    method = make_method(name, {"optimizer": arguments.get("optimizer_FT_pruning", "adamw_torch"), **options})
    assert isinstance(method, TrainedWeights)
    return method


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
