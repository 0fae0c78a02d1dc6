"""Several masks in one pass: each must be the one that it would be alone, and forward passes must be shared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch

from patch.artefacts import PatchError
from patch.methods import Magnitude, Method, Random, SparseGPT, Thanos, Wanda
from patch.models import decoder_blocks, prunable_linears
from patch.pruning import Job, hidden_states, prune_model, prune_together
from patch.pruning.hessian import Hessian
from patch.pruning.wanda import InputNorm
from patch.sparsity.maskset import MaskSet
from patch.sparsity.patterns import Pattern

TWO_FOUR, UNSTRUCTURED = Pattern("n:m", 2, 4), Pattern("unstructured")
DENSE: dict[str, object] = {"calibration_inputs": "dense"}


def mixed_jobs() -> list[Job]:
    return [
        Job(Wanda(), TWO_FOUR, 0.5),
        Job(Random(), TWO_FOUR, 0.5),
        Job(SparseGPT(block_size=32), UNSTRUCTURED, 0.45),
        Job(SparseGPT(block_size=32, **DENSE), UNSTRUCTURED, 0.45),
        Job(Magnitude(), UNSTRUCTURED, 0.3),
        Job(Thanos(block_size=32), TWO_FOUR, 0.5),
        Job(Thanos(block_size=32, dense_row=True, **DENSE), TWO_FOUR, 0.5),
        Job(Wanda(layers="mlp", **DENSE), UNSTRUCTURED, 0.25),
        Job(Wanda(**DENSE), TWO_FOUR, 0.5),
    ]


def checksum(masks: MaskSet | PatchError, path) -> str:
    assert isinstance(masks, MaskSet)
    return masks.save(path)


@pytest.mark.parametrize("tokens_per_batch", [24, 10**6], ids=["a sequence at a time", "all at once"])
def test_every_mask_is_the_one_it_is_alone(architecture, tokens_per_batch, tiny_model, tokens, tmp_path, monkeypatch):
    monkeypatch.setitem(hidden_states.TOKENS_PER_BATCH, "cpu", tokens_per_batch)
    jobs = mixed_jobs()
    together = prune_together(tiny_model(architecture), jobs, tokens(), seed=3)
    for job, masks in zip(jobs, together, strict=True):
        alone = prune_model(tiny_model(architecture), job.method, job.pattern, job.sparsity, tokens(), seed=3)
        assert checksum(masks, tmp_path / "together") == checksum(alone, tmp_path / "alone"), job


def test_the_model_stays_as_it_is(architecture, tiny_model, tokens):
    model, fresh = tiny_model(architecture), tiny_model(architecture)
    prune_together(model, mixed_jobs(), tokens())
    for (name, ours), theirs in zip(model.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert not any(module._forward_pre_hooks or "forward" in vars(module) for module in model.modules())


def block_calls(model, run: Callable[[], object]) -> list[int]:
    """Forward passes of every block, in sequences."""
    calls: Counter[int] = Counter()

    def count(index: int):
        return lambda _, arguments: calls.update({index: len(arguments[0])})

    blocks = decoder_blocks(model)[1]
    hooks = [block.register_forward_pre_hook(count(index)) for index, block in enumerate(blocks)]
    run()
    for hook in hooks:
        hook.remove()
    return [calls[index] for index in range(len(blocks))]


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        # one to look at the inputs of the first block and one for every job's outputs; then two for every job
        ({}, [1 + 3, 2 * 3]),
        # one for all
        (DENSE, [1, 1]),
    ],
    ids=["pruned", "dense"],
)
def test_forward_passes_are_not_repeated(options, passes, tiny_model, tokens):
    model, calibration = tiny_model("llama"), tokens(samples=6)
    jobs = [
        Job(Wanda(**options), TWO_FOUR, 0.5),
        Job(SparseGPT(**options), TWO_FOUR, 0.5),
        Job(SparseGPT(**options), UNSTRUCTURED, 0.3),
    ]
    # the shapes of what the model passes to its blocks are asked for with one sequence each
    asked = block_calls(model, lambda: hidden_states.HiddenStates(model, calibration, "cpu"))
    counted = block_calls(model, lambda: prune_together(model, jobs, calibration))
    assert [(total - probe) / 6 for total, probe in zip(counted, asked, strict=True)] == passes


def count_statistics(monkeypatch) -> Counter[str]:
    made: Counter[str] = Counter()
    for kind in (InputNorm, Hessian):
        original = kind.__init__

        def count(self, *arguments, original=original, name=kind.__name__):
            made[name] += 1
            original(self, *arguments)

        monkeypatch.setattr(kind, "__init__", count)
    return made


@pytest.mark.parametrize(("options", "hessians"), [({}, 4 + 3 * 4), (DENSE, 4 + 4)], ids=["pruned", "dense"])
def test_the_same_statistics_of_the_same_inputs_are_shared(options, hessians, tiny_model, tokens, monkeypatch):
    """q k v, o, gate up, down of two blocks: in the first they are the same for all, later for dense inputs only."""
    made = count_statistics(monkeypatch)
    jobs = [
        Job(SparseGPT(**options), TWO_FOUR, 0.5),
        Job(SparseGPT(**options), UNSTRUCTURED, 0.3),
        Job(Thanos(**options), TWO_FOUR, 0.5),
    ]
    prune_together(tiny_model("llama"), jobs, tokens())
    assert made == {"Hessian": hessians}


def test_one_factor_serves_all_jobs_of_one_damping(tiny_model, tokens, monkeypatch):
    factored = []
    original = Hessian._invert
    monkeypatch.setattr(Hessian, "_invert", lambda self, damping: (factored.append(1), original(self, damping))[1])
    jobs = [Job(SparseGPT(**DENSE), UNSTRUCTURED, share) for share in (0.25, 0.35, 0.45)]
    prune_together(tiny_model("llama"), jobs, tokens())
    assert len(factored) == 2 * 4


def test_dense_inputs_are_those_of_the_unpruned_model(tiny_model, tokens):
    calibration, model = tokens(), tiny_model("llama")
    seen = {}
    linears = prunable_linears(model)
    hooks = [
        linear.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0].double()}))
        for name, linear in linears.items()
    ]
    with torch.no_grad():
        model(input_ids=calibration.ids.long(), use_cache=False)
    for hook in hooks:
        hook.remove()
    masks = prune_model(tiny_model("llama"), Wanda(**DENSE), TWO_FOUR, 0.5, calibration)
    behind_pruned = prune_model(tiny_model("llama"), Wanda(), TWO_FOUR, 0.5, calibration)
    for name, linear in linears.items():
        scores = (linear.weight.double().abs() * seen[name].flatten(0, 1).norm(dim=0)).unflatten(1, (-1, 4))
        expected = (scores.argsort(-1).argsort(-1) >= 2).flatten(1)
        assert torch.equal(masks.linears[name].keep_mask(), expected), name
    same = [torch.equal(masks.linears[n].keep_mask(), behind_pruned.linears[n].keep_mask()) for n in masks.linears]
    assert all(same[: len(same) // 2])
    assert not all(same)


# failures


def failing(method: Method) -> list[Job]:
    """A job that fails between two that do not."""
    return [Job(Wanda(), TWO_FOUR, 0.5), Job(method, TWO_FOUR, 0.5), Job(Magnitude(), TWO_FOUR, 0.5)]


@pytest.mark.parametrize("options", [{}, DENSE], ids=["pruned", "dense"])
def test_a_job_that_fails_midway_leaves_the_others_alone(options, tiny_model, tokens, tmp_path, monkeypatch):
    blocks = []

    def fail_in_the_second_block(self, damping):
        blocks.append(1)
        if len(blocks) > 4:
            raise PatchError("not invertible")
        return torch.eye(len(self.sum))

    monkeypatch.setattr(Hessian, "_invert", fail_in_the_second_block)
    model, fresh = tiny_model("llama"), tiny_model("llama")
    results = prune_together(model, failing(SparseGPT(**options)), tokens())
    assert str(results[1]) == "not invertible"
    assert len(blocks) == 5
    alone = prune_model(tiny_model("llama"), Wanda(), TWO_FOUR, 0.5, tokens())
    assert checksum(results[0], tmp_path / "together") == checksum(alone, tmp_path / "alone")
    assert isinstance(results[2], MaskSet)
    for ours, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_what_cannot_be_done_is_known_before_anything_is_computed(tiny_model, tokens):
    jobs = [Job(Wanda(), Pattern.parse("3:5"), 0.5), Job(Wanda(), Pattern.parse("tiles:8x8"), 0.5)]
    model = tiny_model("llama")
    results: list = []
    assert block_calls(model, lambda: results.extend(prune_together(model, jobs, tokens()))) == [0, 0]
    assert "64 inputs do not split into 5s" in str(results[0])
    assert "cannot make the pattern tiles:8x8" in str(results[1])


def test_without_calibration_the_others_are_made(tiny_model):
    results = prune_together(tiny_model("llama"), failing(SparseGPT()))
    assert [type(result) for result in results] == [PatchError, PatchError, MaskSet]
    assert "method SparseGPT: needs calibration tokens" in str(results[1])


def test_damaged_inputs_fail_all_that_look_at_them(tiny_model, tokens):
    model, calibration = tiny_model("llama"), tokens()
    model.get_input_embeddings().weight[int(calibration.ids[2, 5])] = torch.nan
    results = prune_together(model, failing(SparseGPT()), calibration)
    for result in results[:2]:
        assert "layer model.layers.0.self_attn.q_proj: its inputs hold NaN or Inf" in str(result)
    assert isinstance(results[2], MaskSet)


# precision


@pytest.mark.parametrize("preferred", ["ieee", "tf32"])
def test_tf32_is_off_while_masks_are_made_and_as_before_afterwards(preferred, tiny_model, tokens, monkeypatch):
    matmul, seen = torch.backends.cuda.matmul, []
    before = matmul.fp32_precision
    add = InputNorm.add
    monkeypatch.setattr(InputNorm, "add", lambda self, inputs: (seen.append(matmul.fp32_precision), add(self, inputs)))
    try:
        matmul.fp32_precision = preferred
        prune_model(tiny_model("llama"), Wanda(), TWO_FOUR, 0.5, tokens())
        with pytest.raises(PatchError):
            prune_model(tiny_model("llama"), Wanda(), TWO_FOUR, 0.5)
        assert set(seen) == {"ieee"}
        assert matmul.fp32_precision == preferred
    finally:
        matmul.fp32_precision = before
