import json
import os
import random
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from patch.artefacts import PatchError
from patch.data import TokenSet
from patch.learning import LearnedMasks, Stopped, distributed, learn_masks, loop
from patch.learning.loop import gradient_norm
from patch.learning.optimizers import apply
from patch.learning.state import State, StateDirectory
from patch.methods import MaskLLM, PatchJoint
from patch.sparsity.maskset import MaskSet
from patch.sparsity.patterns import Pattern

BFLOAT16 = {"gradient_dtype": "bfloat16", "optimizer": "adamw_fused"}
WORDS = ["the", "tile", "mask", "weight", "river", "mountain", "paper", "because", "while", "never"]


def bits(learned: LearnedMasks) -> list[bytes]:
    """The masks, bit for bit."""
    return [
        mask.packed.numpy().tobytes() + (b"" if mask.packed_tiles is None else mask.packed_tiles.numpy().tobytes())
        for mask in learned.masks.linears.values()
    ]


@pytest.fixture
def repetitive(tiny_model: Callable[..., transformers.PreTrainedModel]) -> TokenSet:
    """Text that the tiny model itself finds likely, so that a mask can be better or worse at it."""
    torch.manual_seed(3)
    starts = torch.randint(3, 256, (96, 1))
    ids = tiny_model("llama").generate(starts, do_sample=True, max_new_tokens=23, min_new_tokens=23, top_k=0)
    return TokenSet(ids.int(), {"source": "the model"})


@pytest.mark.parametrize("name", ["maskllm", "patch_joint", "patch_tile"])
def test_learning_beats_the_one_shot_mask_it_starts_from(
    tiny_model: Callable[..., transformers.PreTrainedModel],
    priors: Callable[..., dict[str, MaskSet]],
    repetitive: TokenSet,
    name: str,
) -> None:
    from patch.learning.objective import NextTokenLoss
    from patch.methods import make_method
    from patch.models import prunable_linears

    model = tiny_model("llama")
    masks = priors(model, 0.35)
    options = {"steps": 60, "batch_size": 16, "micro_batch_size": 16, "learning_rate": 0.01, "norm_weight": 0}
    pattern = Pattern.parse("2:4" if name == "maskllm" else "tiles:8x8")

    def final_loss(steps: int, learning_rate: float) -> float:
        method = make_method(name, {**options, "steps": steps, "learning_rate": learning_rate})
        result = learn_masks(model, method, pattern, 0.35, repetitive, masks, epochs=99)  # type: ignore[arg-type]
        pruned = tiny_model("llama")
        result.masks.apply_(prunable_linears(pruned))
        return float(NextTokenLoss(pruned)(repetitive.ids.long()))

    assert final_loss(60, 0.01) < final_loss(1, 1e-12) - 0.02


def test_joint_density_reaches_its_target(learn: Callable[..., LearnedMasks]) -> None:
    learned = learn("patch_joint", sparsity=0.3, steps=60, learning_rate=0.02)
    assert learned.curves[-1]["density"] == pytest.approx(0.7, abs=0.02)
    assert learned.masks.sparsity == pytest.approx(0.3, abs=0.03)


def test_curves_have_a_row_per_step_with_all_terms(learn: Callable[..., LearnedMasks]) -> None:
    seen: list[dict[str, float]] = []
    learned = learn("patch_joint", run={"observe": seen.append})
    assert seen[0].pop("seconds_left") > 0
    assert [row.pop("seconds_left") for row in seen[1:]][-1] == 0
    assert learned.curves == seen
    assert [row["step"] for row in seen] == [1, 2, 3, 4, 5, 6]
    first = seen[0]
    assert first["density_loss"] == pytest.approx(7 * abs(first["density"] - 0.65), abs=0.2)  # of means over samples
    assert first["loss"] == pytest.approx(first["cross_entropy"] + first["density_loss"] - 10 * first["norm_ratio"])
    assert seen[-1]["pattern_scale"] == pytest.approx(100 + 400 * 5 / 6)


def test_micro_batches_are_a_matter_of_memory_alone_when_noise_is_drawn_per_step(
    learn: Callable[..., LearnedMasks],
) -> None:
    one = learn("patch_joint", micro_batch_size=4, noise="step")
    four = learn("patch_joint", micro_batch_size=1, noise="step")
    for a, b in zip(one.curves, four.curves, strict=True):
        assert a["cross_entropy"] == pytest.approx(b["cross_entropy"], abs=1e-4)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-3)


@pytest.mark.parametrize("name", ["maskllm", "patch_joint", "patch_tile"])
def test_noise_per_step_is_noise_per_micro_batch_where_a_step_has_one(
    learn: Callable[..., LearnedMasks], name: str
) -> None:
    runs = [learn(name, micro_batch_size=4, norm_weight=1.0, noise=noise) for noise in ("step", "micro_batch")]
    for a, b in zip(runs[0].curves, runs[1].curves, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-3)


def test_gradients_add_up_over_micro_batches(learn: Callable[..., LearnedMasks]) -> None:
    """With noise that does not matter, four micro-batches of one are one of four."""
    sharp = {"pattern_scale": (1e5, 1e5), "tile_scale": (1e5, 1e5), "hard_patterns": True, "hard_tiles": True}
    soft = {"pattern_temperature": (1e4, 1e4), "tile_temperature": (1e4, 1e4), "density_weight": 0, "norm_weight": 0}
    one = learn("patch_joint", micro_batch_size=4, steps=1, **sharp, **soft)
    four = learn("patch_joint", micro_batch_size=1, steps=1, **sharp, **soft)
    assert one.curves[0]["gradient_norm"] > 0
    assert four.curves[0]["gradient_norm"] == pytest.approx(one.curves[0]["gradient_norm"], rel=0.05)


@pytest.mark.parametrize("options", [{"micro_batch_size": 1}, {"micro_batch_size": 4}, {"noise": "step"}, BFLOAT16])
@pytest.mark.parametrize("name", ["maskllm", "patch_joint", "patch_tile"])
def test_the_gradient_norm_is_that_of_what_the_optimiser_gets(
    learn: Callable[..., LearnedMasks], monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, str]
) -> None:
    seen: list[float] = []

    def spy(optimizer: torch.optim.Optimizer, gradients: list[torch.Tensor], factor: torch.Tensor) -> None:
        seen.append(float(gradient_norm(gradients)))
        apply(optimizer, gradients, factor)

    monkeypatch.setattr("patch.learning.trainer.apply", spy)
    curves = learn(name, **options).curves
    assert [row["gradient_norm"] for row in curves] == pytest.approx(seen, rel=1e-3 if options is BFLOAT16 else 1e-5)


def test_checkpointing_changes_nothing_but_memory(learn: Callable[..., LearnedMasks]) -> None:
    runs = [learn("patch_joint", checkpointing=what) for what in ("off", "activations", "all")]
    assert bits(runs[0]) == bits(runs[1]) == bits(runs[2])


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_fused", "adamw_8bit"])
def test_a_stopped_run_goes_on_to_the_same_mask_bit_for_bit(
    learn: Callable[..., LearnedMasks], tmp_path: Path, optimizer: str
) -> None:
    def stop_at_3(row: dict[str, float]) -> None:
        if row["step"] == 3:
            os.kill(os.getpid(), signal.SIGUSR1)

    whole = learn("patch_joint", optimizer=optimizer)
    with pytest.raises(Stopped) as stopped:
        learn("patch_joint", optimizer=optimizer, run={"state": tmp_path, "observe": stop_at_3})
    assert stopped.value.signal == signal.SIGUSR1
    assert stopped.value.step == 3
    resumed = learn("patch_joint", optimizer=optimizer, run={"state": tmp_path})
    assert bits(resumed) == bits(whole)
    timeless = [{k: v for k, v in row.items() if k not in ("wall_s", "tokens_per_second")} for row in whole.curves]
    again = [{k: v for k, v in row.items() if k not in ("wall_s", "tokens_per_second")} for row in resumed.curves]
    assert again == timeless


def test_a_run_killed_at_any_step_and_resumed_ends_with_the_same_mask(model_directory: Path, tmp_path: Path) -> None:
    """SIGKILL through the command line: nothing can react to it."""
    text = tmp_path / "text.jsonl"
    generator = random.Random(0)
    documents = [" ".join(generator.choices(WORDS, k=40)) for _ in range(100)]
    text.write_text("\n".join(json.dumps({"text": document}) for document in documents))

    def command(output: str) -> list[str]:
        options = {"steps": 40, "batch_size": 2, "checkpoint_every": 3, "pattern_prior_strength": 0}
        settings = [item for name, value in options.items() for item in ("--set", f"{name}={value}")]
        return [
            *(sys.executable, "-m", "patch", "learn", "--model", str(model_directory), "--method", "maskllm"),
            *("--pattern", "2:4", "--training", str(text), "--length", "16", "--epochs", "9", "--device", "cpu"),
            *("--threads", "1", "--output", str(tmp_path / output), *settings),
        ]

    subprocess.run(command("whole"), check=True, capture_output=True, timeout=120)
    for delay in (0.0, 0.15):  # after the first and after some later state appeared
        process = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        states = tmp_path / "killed" / "state" / "by-hand"
        before = max(states.glob("step-*"), default=None)
        while max(states.glob("step-*"), default=None) == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "killed" / "record.json").exists()
    subprocess.run(command("killed"), check=True, capture_output=True, timeout=120)
    masks = [MaskSet.load(tmp_path / name / "mask.safetensors") for name in ("whole", "killed")]
    assert masks[0].checksum == masks[1].checksum
    assert not (tmp_path / "killed" / "state" / "by-hand").exists()


def test_slow_saving_takes_a_tenth_of_the_time(
    learn: Callable[..., LearnedMasks], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of a second, states that take half of one: after the first, one in five steps is enough."""
    clock, saved = [0.0], []

    def save(self: StateDirectory, state: State) -> None:
        saved.append(state.step)
        clock[0] += 0.5

    def a_second_passes(row: dict[str, float]) -> None:
        clock[0] += 1

    monkeypatch.setattr(StateDirectory, "save", save)
    monkeypatch.setattr(loop, "SAVING", 0.1)
    fake = types.SimpleNamespace(monotonic=lambda: clock[0], perf_counter=time.perf_counter)
    monkeypatch.setattr(loop, "time", fake)
    learn("maskllm", steps=14, checkpoint_every=1, run={"state": tmp_path, "observe": a_second_passes})
    assert saved == [1, 6, 11]


def test_other_settings_do_not_go_on_from_a_state(learn: Callable[..., LearnedMasks], tmp_path: Path) -> None:
    learn("patch_joint", checkpoint_every=4, run={"state": tmp_path})
    with pytest.raises(PatchError, match="other settings"):
        learn("patch_joint", checkpoint_every=4, learning_rate=0.03, run={"state": tmp_path})


def test_too_little_text_is_refused_with_the_numbers(
    tiny_model: Callable[..., transformers.PreTrainedModel], tokens: Callable[..., TokenSet]
) -> None:
    method = MaskLLM(steps=10, batch_size=4, pattern_prior_strength=0)
    with pytest.raises(PatchError, match=r"need 40, there are 15 \(epochs: 2\); allow 3 epochs"):
        learn_masks(tiny_model("llama"), method, Pattern.parse("2:4"), 0.5, tokens(samples=15), {}, epochs=2)


def test_more_than_half_sparsity_is_refused(
    tiny_model: Callable[..., transformers.PreTrainedModel], tokens: Callable[..., TokenSet]
) -> None:
    with pytest.raises(PatchError, match="0 to 50 %"):
        learn_masks(tiny_model("llama"), PatchJoint(), Pattern.parse("tiles:8x8"), 0.6, tokens(), {})


def test_priors_of_another_model_are_refused(
    tiny_model: Callable[..., transformers.PreTrainedModel],
    tokens: Callable[..., TokenSet],
    priors: Callable[..., dict[str, MaskSet]],
) -> None:
    masks = priors(tiny_model("llama", seed=1), 0.35)
    method = PatchJoint(steps=1, batch_size=1)
    with pytest.raises(PatchError, match="pattern mask belongs to another model"):
        learn_masks(tiny_model("llama"), method, Pattern.parse("tiles:8x8"), 0.35, tokens(), masks)


def test_nan_ends_the_run_with_the_step_and_the_term(
    tiny_model: Callable[..., transformers.PreTrainedModel], tokens: Callable[..., TokenSet]
) -> None:
    model = tiny_model("llama")
    model.model.norm.weight.data[3] = float("inf")
    method = MaskLLM(steps=2, batch_size=2, pattern_prior_strength=0)
    with pytest.raises(PatchError, match=r"step 1: cross_entropy is nan.* lower the learning rate\.$"):
        learn_masks(model, method, Pattern.parse("2:4"), 0.5, tokens(), {})


def test_divergence_ends_the_run_and_keeps_the_last_state(
    learn: Callable[..., LearnedMasks], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def diverge_after_4(row: dict[str, float]) -> None:
        if row["step"] == 4:
            monkeypatch.setattr("patch.learning.loop.DIVERGED", 0.1)

    with pytest.raises(PatchError, match=r"step 5: cross_entropy is .* worse than guessing.* after step 3 is kept"):
        learn("maskllm", checkpoint_every=3, run={"state": tmp_path, "observe": diverge_after_4})


def test_a_density_that_is_not_reached_is_an_error_and_topk_ends_without_another_step(
    learn: Callable[..., LearnedMasks], tmp_path: Path
) -> None:
    lost: dict[str, Any] = {"sparsity": 0.2, "density_weight": 0, "tile_prior_strength": 0, "norm_weight": 0}
    with pytest.raises(PatchError, match=r"end at .* sparsity, the target is 20.0 %\. Raise density_weight .*topk\.$"):
        learn("patch_joint", **lost)
    with pytest.raises(PatchError, match=r"state after step 6 is kept.* or use selection topk, which goes on"):
        learn("patch_joint", **lost, run={"state": tmp_path})
    rows: list[dict[str, float]] = []
    learned = learn("patch_joint", **lost, selection="topk", run={"state": tmp_path, "observe": rows.append})
    assert rows == []
    assert bits(learned) == bits(learn("patch_joint", **lost, selection="topk"))
    assert [row["step"] for row in learned.curves] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("selection", ["topk", "balanced"])
def test_a_tile_larger_than_the_layers_makes_whole_layers_dense_or_sparse(
    tiny_model: Callable[..., transformers.PreTrainedModel], tokens: Callable[..., TokenSet], selection: str
) -> None:
    """Of 21 layers of one size, 14 sparse ones come nearest to 34 %."""
    model = tiny_model(num_hidden_layers=3, intermediate_size=64, num_key_value_heads=4)
    options = {"pattern_prior_strength": 0, "tile_prior_strength": 0, "selection": selection}
    method = PatchJoint(steps=2, batch_size=2, **options)
    learned = learn_masks(model, method, Pattern.parse("tiles:4096x4096"), 0.34, tokens(), {})
    assert sorted(mask.sparsity for mask in learned.masks.linears.values()) == 7 * [0.0] + 14 * [0.5]
    assert learned.masks.sparsity == pytest.approx(1 / 3)


def test_tiles_as_large_as_layers_can_miss_the_density(learn: Callable[..., LearnedMasks]) -> None:
    with pytest.raises(PatchError, match=r"end at 18.3 % sparsity, the target is 30.0 %.*topk"):
        learn("patch_joint", sparsity=0.3, pattern="tiles:4096x4096")


@pytest.mark.parametrize(
    ("name", "temperatures"),
    [
        ("maskllm", "0.708 (patterns)"),
        ("patch_joint", "0.708 (patterns) and 0.375 (tiles)"),
        ("patch_tile", "0.375 (tiles)"),
    ],
)
def test_the_line_of_a_step_names_the_loss_and_the_temperatures_that_there_are(
    learn: Callable[..., LearnedMasks], caplog: pytest.LogCaptureFixture, name: str, temperatures: str
) -> None:
    with caplog.at_level("INFO"):
        row = learn(name).curves[-1]
    line = next(message for message in caplog.messages if message.startswith("step 6/6"))
    assert line.startswith(f"step 6/6, loss {row['loss']:.3f}, cross-entropy {row['cross_entropy']:.3f}, density ")
    assert f", temperature {temperatures}, learning rate " in line
    assert line.endswith(" tokens/s, 0 s left")


def test_processes_that_find_different_states_do_not_go_on(
    learn: Callable[..., LearnedMasks], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one process saves for all, another one that sees less reads another disk."""
    learn("maskllm", checkpoint_every=2, run={"state": tmp_path})
    monkeypatch.setattr(distributed, "minimum", lambda value, device: value - 2)
    with pytest.raises(PatchError, match=r"process 0 finds a state after step 4 there, another .* none after step 2"):
        learn("maskllm", checkpoint_every=2, run={"state": tmp_path})
    assert StateDirectory(tmp_path, {}, 0).newest() == 4


def test_out_of_memory_prints_the_estimate_per_component(
    learn: Callable[..., LearnedMasks], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("patch.learning.objective.NextTokenLoss.__call__", fail)
    with pytest.raises(PatchError, match=r"estimate in GiB: weights .*, logits .*, optimizer .*, sum .*adamw_8bit"):
        learn("patch_joint")


def test_float16_models_are_refused(
    tiny_model: Callable[..., transformers.PreTrainedModel], tokens: Callable[..., TokenSet]
) -> None:
    with pytest.raises(PatchError, match="bfloat16 or float32"):
        learn_masks(tiny_model("llama").half(), MaskLLM(), Pattern.parse("2:4"), 0.5, tokens(), {})
