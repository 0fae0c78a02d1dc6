"""ProxSparse and fine-tuning on tiny models."""

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import transformers
from typer.testing import CliRunner

from patch.artefacts import PatchError
from patch.cli import app
from patch.data import PADDING, TokenSet
from patch.kernels.proximal import proximal_
from patch.learning.loop import LearnedMasks
from patch.learning.objective import NextTokenLoss
from patch.learning.weights import anchor, train_weights
from patch.methods import FineTune, Magnitude, ProxSparse, TrainedWeights
from patch.models import prunable_linears
from patch.pruning import prune_model
from patch.records import Record
from patch.sparsity.maskset import LinearMask, MaskSet, fingerprint
from patch.sparsity.patterns import Pattern, keep_n_of_m
from patch.sparsity.tiles import expand, grid_shape

TWO_OF_FOUR = Pattern.parse("2:4")
SHORT: dict[str, Any] = {"steps": 6, "batch_size": 4, "micro_batch_size": 2, "warmup_steps": 1, "learning_rate": 3e-3}
Model = transformers.PreTrainedModel


@pytest.fixture
def train(
    tiny_model: Callable[..., Model], tokens: Callable[..., TokenSet]
) -> Callable[..., tuple[Model, LearnedMasks]]:
    """`train(method, pattern="2:4", priors={}, **run)`: a run on a tiny Llama; the trained model and what came out."""

    def make(
        method: TrainedWeights, pattern: str = "2:4", priors: dict[str, MaskSet] | None = None, **run: Any
    ) -> tuple[Model, LearnedMasks]:
        model = tiny_model("llama")
        text = tokens(samples=method.steps * method.batch_size)
        return model, train_weights(model, method, Pattern.parse(pattern), text, priors or {}, **run)

    return make


def start_of(model: Model, pattern: str = "2:4", sparsity: float = 0.5) -> dict[str, MaskSet]:
    return {"start": prune_model(copy.deepcopy(model), Magnitude(), Pattern.parse(pattern), sparsity)}


def same(one: LearnedMasks, other: LearnedMasks) -> bool:
    """Masks and values, bit for bit."""
    pairs = itertools.zip_longest(one.masks.linears.values(), other.masks.linears.values())
    return all(
        torch.equal(a.keep_mask(), b.keep_mask()) and (a.values is b.values is None or torch.equal(a.values, b.values))
        for a, b in pairs
    )


# ---- ProxSparse


def test_a_step_is_adamw_and_then_the_proximal_operator(
    tiny_model: Callable[..., Model], tokens: Callable[..., TokenSet]
) -> None:
    method = ProxSparse(
        steps=1, batch_size=2, micro_batch_size=2, warmup_steps=0, learning_rate=1e-2, proximal_weight=2
    )
    text = tokens(samples=2)
    model, expected = tiny_model("llama"), tiny_model("llama")
    train_weights(model, method, TWO_OF_FOUR, text, {})

    expected.requires_grad_()
    optimizer = torch.optim.AdamW(
        expected.parameters(), lr=1e-2, betas=method.betas, eps=method.epsilon, weight_decay=0
    )
    expected(input_ids=text.ids.long(), labels=text.ids.long()).loss.backward()
    torch.nn.utils.clip_grad_norm_(expected.parameters(), method.max_grad_norm)
    optimizer.step()
    for linear in prunable_linears(expected).values():
        proximal_(linear.weight, 2)
    for (name, one), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.allclose(one, other, atol=2e-5), name


def test_groups_become_two_of_four_and_the_mask_keeps_original_values(
    train: Callable[..., tuple[Model, LearnedMasks]], tiny_model: Callable[..., Model]
) -> None:
    model, learned = train(ProxSparse(**SHORT | {"steps": 12}, proximal_weight=10.0))
    shares = [row["two_of_four"] for row in learned.curves]
    assert shares[0] < shares[-1]
    assert shares[-1] > 0.5
    original = prunable_linears(tiny_model("llama"))
    for name, linear in prunable_linears(model).items():
        mask = learned.masks.linears[name]
        largest = linear.weight.abs().view(-1, 4).topk(2).indices
        kept = torch.zeros(linear.weight.numel() // 4, 4, dtype=torch.bool).scatter_(1, largest, True)
        assert torch.equal(mask.keep_mask(), kept.view_as(linear.weight))
        assert mask.values is None
        assert not torch.equal(linear.weight, original[name].weight)
    learned.masks.apply_(original)  # made for the model as it was


def test_padding_of_documents_counts_for_nothing(
    tiny_model: Callable[..., Model], tokens: Callable[..., TokenSet]
) -> None:
    method = ProxSparse(steps=2, batch_size=1, warmup_steps=0)
    text = tokens(samples=2)
    padded = torch.cat([text.ids, torch.full((2, 5), PADDING, dtype=torch.int32)], dim=1)
    runs = [
        train_weights(tiny_model("llama"), method, TWO_OF_FOUR, TokenSet(ids, {}), {}) for ids in (text.ids, padded)
    ]
    assert same(*runs)
    assert [row["loss"] for row in runs[0].curves] == [row["loss"] for row in runs[1].curves]


def test_the_anchors_slope_is_the_derivative_of_its_value() -> None:
    original = torch.tensor([0.5, -0.3, 0.0, 0.2], dtype=torch.float64)
    weight = torch.tensor([0.4, 0.1, 0.7, 0.0], dtype=torch.float64, requires_grad=True)
    divisor = original + 0.1 * torch.tensor([1.0, -1.0, 1.0, 1.0])
    term = (weight * (weight - original) / divisor).square().sum()
    (slope,) = torch.autograd.grad(term, weight)
    value, ours = anchor(weight.detach(), original, 0.1)
    assert float(value) == pytest.approx(term.item())
    assert torch.allclose(ours, slope)


# ---- fine-tuning


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_fine_tuning_lowers_the_loss_and_keeps_every_zero(
    train: Callable[..., tuple[Model, LearnedMasks]],
    tiny_model: Callable[..., Model],
    tokens: Callable[..., TokenSet],
    pattern: str,
) -> None:
    start = start_of(tiny_model("llama"), pattern)
    method = FineTune(**SHORT | {"steps": 30, "batch_size": 2})
    model, learned = train(method, pattern, start)
    text = tokens(samples=60).ids.long()

    def loss(masks: MaskSet) -> float:
        pruned = tiny_model("llama")
        masks.apply_(prunable_linears(pruned))
        return float(NextTokenLoss(pruned)(text))

    assert loss(learned.masks) < loss(start["start"]) - 0.01
    for name, mask in learned.masks.linears.items():
        keep = start["start"].linears[name].keep_mask()
        weight = prunable_linears(model)[name].weight
        assert torch.equal(mask.keep_mask(), keep)
        assert not weight[~keep].any()
        assert torch.equal(mask.values, weight[keep])


def test_learned_tiles_and_updated_weights_are_starts_like_others(
    train: Callable[..., tuple[Model, LearnedMasks]], tiny_model: Callable[..., Model]
) -> None:
    linears = prunable_linears(tiny_model("llama"))
    tiles = Pattern.parse("tiles:16xK")
    masks = {}
    for number, (name, linear) in enumerate(linears.items()):
        shape = (linear.out_features, linear.in_features)
        pattern = tiles.for_layer(*shape)
        dense = torch.arange(grid_shape(shape, pattern.tile)[0]).unsqueeze(1) % 2 == number % 2
        keep = keep_n_of_m(linear.weight.abs(), 2, 4) | expand(dense, shape, pattern.tile)
        masks[name] = LinearMask.from_keep_mask(keep, pattern, dense_tiles=dense, new_weight=2 * linear.weight)
    start = MaskSet(masks, fingerprint(linears))
    _, learned = train(FineTune(**SHORT | {"learning_rate": 1e-9}), "tiles:16xK", {"start": start})
    assert learned.curves[-1]["density"] == pytest.approx(1 - start.sparsity)
    for name, mask in learned.masks.linears.items():
        assert torch.equal(mask.dense_tiles(), masks[name].dense_tiles())
        assert torch.allclose(mask.values, masks[name].values, atol=1e-6)  # goes on from the updated weights


def test_only_the_weights_of_linears_train(
    train: Callable[..., tuple[Model, LearnedMasks]], tiny_model: Callable[..., Model]
) -> None:
    before = tiny_model("llama")
    model, _ = train(FineTune(**SHORT), "2:4", start_of(before))
    trained = {f"{name}.weight" for name in prunable_linears(model)}
    changed = {
        name
        for (name, one), other in zip(model.named_parameters(), before.parameters(), strict=True)
        if not torch.equal(one, other)
    }
    assert changed == trained


def test_micro_batches_add_up_to_the_batch(
    train: Callable[..., tuple[Model, LearnedMasks]], tiny_model: Callable[..., Model]
) -> None:
    start = start_of(tiny_model("llama"))
    curves = [train(FineTune(**SHORT | {"micro_batch_size": size}), "2:4", start)[1].curves for size in (1, 4)]
    for one, other in zip(*curves, strict=True):
        assert one["cross_entropy"] == pytest.approx(other["cross_entropy"], abs=1e-4)


@pytest.mark.parametrize("rounding", ["none", "stochastic", "nearest"])
def test_small_steps_of_bfloat16_weights_count_unless_they_are_rounded_away(
    tiny_model: Callable[..., Model], tokens: Callable[..., TokenSet], rounding: str
) -> None:
    model = tiny_model("llama").bfloat16()
    start = start_of(model)
    before = {name: linear.weight.detach().clone() for name, linear in prunable_linears(model).items()}
    options = SHORT | {"learning_rate": 2e-5, "steps": 20, "batch_size": 2}
    method = FineTune(**options, optimizer="adamw_fused", rounding=rounding)
    learned = train_weights(model, method, TWO_OF_FOUR, tokens(samples=40), start)
    kept = [(mask.values, before[name][mask.keep_mask()]) for name, mask in learned.masks.linears.items()]
    # every step is below half a unit in the last place of most weights, all of them together are not
    moved = sum(int((one != other).sum()) for one, other in kept) / sum(one.numel() for one, _ in kept)
    assert moved < 0.001 if rounding == "nearest" else moved > 0.005


def test_pruned_weights_that_come_back_are_found_before_anything_is_saved(
    train: Callable[..., tuple[Model, LearnedMasks]],
    tiny_model: Callable[..., Model],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    from patch.learning.weights import FineTuneTrainer

    monkeypatch.setattr(FineTuneTrainer, "constrain_", lambda self: self.leaves[0].add_(1))
    with pytest.raises(PatchError, match=r"q_proj.weight: \d+ pruned weights are not 0 any more"):
        train(FineTune(**SHORT, checkpoint_every=2), "2:4", start_of(tiny_model("llama")), state=tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


# ---- both


class InterruptedRunError(Exception):
    """As a kill would end a run, between two steps."""


@pytest.mark.parametrize("name", ["proxsparse", "fine_tune"])
@pytest.mark.parametrize("stop", [1, 3, 5])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    train: Callable[..., tuple[Model, LearnedMasks]],
    tiny_model: Callable[..., Model],
    tmp_path: Path,
    name: str,
    stop: int,
) -> None:
    options = SHORT | {"checkpoint_every": 2}
    method: TrainedWeights = ProxSparse(**options, proximal_weight=50) if name == "proxsparse" else FineTune(**options)
    priors = {} if name == "proxsparse" else start_of(tiny_model("llama"))
    _, whole = train(method, priors=priors)

    def interrupt(row: dict[str, float]) -> None:
        if row["step"] == stop:
            raise InterruptedRunError

    with pytest.raises(InterruptedRunError):
        train(method, priors=priors, state=tmp_path, observe=interrupt)
    seen: list[float] = []
    _, resumed = train(method, priors=priors, state=tmp_path, observe=lambda row: seen.append(row["step"]))
    assert seen[0] == (stop - 1) // 2 * 2 + 1
    assert same(resumed, whole)
    assert [row["loss"] for row in resumed.curves] == [row["loss"] for row in whole.curves]


def test_divergence_names_step_and_remedy(
    train: Callable[..., tuple[Model, LearnedMasks]], tiny_model: Callable[..., Model]
) -> None:
    with pytest.raises(PatchError, match=r"step \d: .*lower the learning rate"):
        train(FineTune(**SHORT | {"learning_rate": 1e38}), "2:4", start_of(tiny_model("llama")))


def test_the_command_finds_a_mask_and_goes_on_to_train_what_it_keeps(
    model_directory: Path, documents: list[str], tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("\n\n".join(documents))

    def learn(method: str, **options: str) -> None:
        settings = {"steps": 4, "batch_size": 2, "learning_rate": 1e-3}
        arguments = ["learn", "--model", str(model_directory), "--method", method, "--pattern", "2:4", "--length", "16"]
        arguments += ["--training", str(tmp_path / "text.txt"), "--device", "cpu", "--output", str(tmp_path / method)]
        arguments += [item for name, value in settings.items() for item in ("--set", f"{name}={value}")]
        arguments += [item for name, value in options.items() for item in (f"--{name}", value)]
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output

    learn("proxsparse")
    found = MaskSet.load(tmp_path / "proxsparse" / "mask.safetensors")
    learn("fine_tune", **{"start-mask": str(tmp_path / "proxsparse" / "mask.safetensors")})
    tuned = MaskSet.load(tmp_path / "fine_tune" / "mask.safetensors")
    for name, mask in tuned.linears.items():
        assert torch.equal(mask.packed, found.linears[name].packed)
        assert found.linears[name].values is None
        assert mask.values is not None
    record = Record.read(tmp_path / "fine_tune")
    assert record.inputs["start"] == found.checksum
    assert Record.read(tmp_path / "proxsparse").protocol["training"]["sampling"] == "documents"
    curves = pd.read_parquet(tmp_path / "proxsparse" / "curves.parquet")
    assert curves[["loss", "learning_rate", "tokens_per_second", "two_of_four"]].notna().all(axis=None)


def test_a_missing_start_is_told(train: Callable[..., tuple[Model, LearnedMasks]]) -> None:
    with pytest.raises(PatchError, match="needs a start mask"):
        train(FineTune(**SHORT))


def test_a_start_of_another_pattern_is_told(
    train: Callable[..., tuple[Model, LearnedMasks]], tiny_model: Callable[..., Model]
) -> None:
    with pytest.raises(PatchError, match="the start mask is 2:4, not unstructured"):
        train(FineTune(**SHORT), "unstructured", start_of(tiny_model("llama")))


def test_a_start_of_another_model_is_told(
    train: Callable[..., tuple[Model, LearnedMasks]], tiny_model: Callable[..., Model]
) -> None:
    other = tiny_model("llama")
    with torch.no_grad():
        next(iter(prunable_linears(other).values())).weight.add_(1)
    with pytest.raises(PatchError, match="belongs to another model"):
        train(FineTune(**SHORT), "2:4", start_of(other))


def test_proxsparse_makes_two_of_four_only(train: Callable[..., tuple[Model, LearnedMasks]]) -> None:
    with pytest.raises(PatchError, match="cannot make the pattern unstructured; it makes 2:4"):
        train(ProxSparse(**SHORT), "unstructured")
