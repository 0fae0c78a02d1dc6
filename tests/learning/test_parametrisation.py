from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor

from patch.artefacts import PatchError
from patch.data import TokenSet
from patch.learning.parametrisation import LearnableMasks, MaskedBlock, sample_tiles
from patch.learning.schedules import Sharpness
from patch.learning.selection import final_masks
from patch.learning.trainer import make_masks
from patch.methods import MaskLLM, PatchJoint
from patch.models import decoder_blocks, prunable_linears
from patch.sparsity.maskset import MaskSet, fingerprint
from patch.sparsity.patterns import Pattern

SHARP = Sharpness(1e6, 1e-2)
"""Noise no longer matters."""
SOFT = Sharpness(100.0, 2.0)


@pytest.mark.parametrize("name", ["maskllm", "patch_joint", "patch_tile"])
def test_a_sharp_sample_computes_what_the_final_mask_computes(
    learnable: Callable[..., LearnableMasks],
    tiny_model: Callable[..., transformers.PreTrainedModel],
    tokens: Callable[..., TokenSet],
    name: str,
) -> None:
    masks = learnable(name)
    with torch.no_grad():
        for parameter in masks.parameters():
            parameter.uniform_(-1, 1)
    ids = tokens().ids[:2].long()
    masks.draw(0, SHARP, SHARP, accumulate=False)
    masks.sample()
    sampled = _run(masks.blocks, ids, tiny_model("llama"))
    pruned = tiny_model("llama")
    final_masks(masks, fingerprint(prunable_linears(pruned))).apply_(prunable_linears(pruned))
    torch.testing.assert_close(sampled, pruned(input_ids=ids).logits, atol=1e-3, rtol=1e-3)


def _run(blocks: list[MaskedBlock], ids: Tensor, fresh: transformers.PreTrainedModel) -> Tensor:
    """Logits of a fresh copy of the model whose blocks are the masked ones."""
    _, own = decoder_blocks(fresh)
    for number, block in enumerate(blocks):
        own[number] = block
    with torch.no_grad():
        return fresh(input_ids=ids, use_cache=False).logits


def test_density_of_a_sample_is_the_share_of_weights_its_mask_keeps(learnable: Callable[..., LearnableMasks]) -> None:
    masks = learnable("patch_joint", pattern="tiles:24x20")  # ragged at both edges
    masks.draw(5, SOFT, SOFT, accumulate=False)
    masks.sample()
    kept = total = 0.0
    for block in masks.blocks:
        weights, _ = masks.weights_of(block)
        for linear in block.linears:
            weight = block.block.get_parameter(f"{linear.name_in_block}.weight")
            kept += float((weights[f"{linear.name_in_block}.weight"] / weight).detach().double().sum())
            total += weight.numel()
    assert masks.density().item() == pytest.approx(kept / total, abs=1e-4)


def test_density_per_block_averages_to_that_of_the_model(learnable: Callable[..., LearnableMasks]) -> None:
    masks = learnable("patch_joint", density_target="block")
    whole = learnable("patch_joint")
    for each in (masks, whole):
        each.draw(5, SOFT, SOFT, accumulate=False)
        each.sample()
    assert masks.density().shape == (2,)
    assert float(masks.density().mean()) == pytest.approx(float(whole.density()))  # both blocks are of one size


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("ratio", lambda masked, whole: sum(m.norm() for m in masked) / sum(w.norm() for w in whole)),
        (
            "squared_ratio",
            lambda masked, whole: sum(m.square().sum() for m in masked) / sum(w.square().sum() for w in whole),
        ),
        ("sum", lambda masked, whole: sum(m.norm() for m in masked)),
        ("squared_sum", lambda masked, whole: sum(m.square().sum() for m in masked)),
    ],
)
def test_norm_term_in_every_form(
    learnable: Callable[..., LearnableMasks],
    tokens: Callable[..., TokenSet],
    tiny_model: Callable[..., transformers.PreTrainedModel],
    form: str,
    expected: Callable[..., Tensor],
) -> None:
    masks = learnable("patch_joint", norm_form=form)
    masks.draw(2, SOFT, SOFT, accumulate=False)
    masks.sample()
    _run(masks.blocks, tokens().ids[:1].long(), tiny_model("llama"))
    masked = [weight for block in masks.blocks for weight in masks.weights_of(block)[0].values()]
    whole = [
        block.block.get_parameter(f"{linear.name_in_block}.weight")
        for block in masks.blocks
        for linear in block.linears
    ]
    torch.testing.assert_close(masks.norm_term().detach(), expected(masked, whole).detach())


def test_samples_differ_by_number_and_repeat_for_the_same_number(learnable: Callable[..., LearnableMasks]) -> None:
    masks = learnable("patch_joint")

    def sample(number: int) -> tuple[Tensor, Tensor]:
        masks.draw(number, SOFT, SOFT, accumulate=False)
        masks.sample()
        weights, _ = masks.weights_of(masks.blocks[1])
        return masks.tile_sample.detach().clone(), next(iter(weights.values())).detach()

    first, second, again = sample(0), sample(1), sample(0)
    for one, other, repeated in zip(first, second, again, strict=True):
        assert torch.equal(one, repeated)
        assert not torch.equal(one, other)


def test_tile_samples_follow_the_gumbel_softmax(learnable: Callable[..., LearnableMasks]) -> None:
    logits = torch.full((200_000,), 0.01)
    uniform = torch.rand(200_000, generator=torch.Generator().manual_seed(0))
    hard = sample_tiles(logits, uniform, 100.0, 0.5, hard=True)
    # the arg-max of a Gumbel-softmax over (0, scale * logit) follows their plain softmax, whatever the temperature
    assert float(hard.mean()) == pytest.approx(1 / (1 + torch.tensor(-1.0).exp().item()), abs=4e-3)
    assert set(hard.unique().tolist()) == {0.0, 1.0}
    assert sample_tiles(logits[:2], torch.tensor([0.0, 1.0]), 500.0, 0.05, hard=False).isfinite().all()


def test_hard_tile_samples_pass_the_gradient_of_soft_ones() -> None:
    logits = torch.tensor([0.02, -0.01], requires_grad=True)
    uniform = torch.tensor([0.3, 0.6])
    (hard,) = torch.autograd.grad(sample_tiles(logits, uniform, 100.0, 2.0, hard=True).sum(), logits)
    (soft,) = torch.autograd.grad(sample_tiles(logits, uniform, 100.0, 2.0, hard=False).sum(), logits)
    torch.testing.assert_close(hard, soft)


def test_prior_starts_patch_joint_at_the_one_shot_masks(learnable: Callable[..., LearnableMasks]) -> None:
    masks = learnable("patch_joint", sparsity=0.35)
    model_priors = learnable("patch_tile")  # frozen codes are the one-shot patterns themselves
    for block, frozen in zip(masks.blocks, model_priors.blocks, strict=True):
        codes = block.final_codes()
        for linear in block.linears:
            assert torch.equal(codes[linear.name], frozen.final_codes()[linear.name])
    dense = (masks.tile_logits > 0).float().mean()
    assert float(dense) == pytest.approx(0.3, abs=0.02)


def test_panels_as_wide_as_a_layer(learnable: Callable[..., LearnableMasks]) -> None:
    masks = learnable("patch_joint", pattern="tiles:16xK")
    assert {linear.grid[1] for linear in masks.linears} == {1}
    assert str(final_masks(masks, "base").linears[masks.linears[0].name].pattern) == "tiles:16x64"


def test_the_model_gets_its_own_blocks_back(
    tiny_model: Callable[..., transformers.PreTrainedModel], priors: Callable[..., dict[str, MaskSet]]
) -> None:
    model = tiny_model("llama")
    before, names = list(decoder_blocks(model)[1]), list(prunable_linears(model))
    masks = make_masks(
        model, PatchJoint(), Pattern.parse("tiles:16x16"), 0.35, priors(model, 0.35), seed=0,
        device=torch.device("cpu"),
    )  # fmt: skip
    masks.remove()
    assert list(decoder_blocks(model)[1]) == before
    assert list(prunable_linears(model)) == names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda priors: priors.pop("pattern"), "needs a pattern mask"),
        (lambda priors: priors.pop("reference"), "needs a reference mask"),
        (lambda priors: priors.update(pattern=priors["reference"]), "it has to be 2:4"),
        (lambda priors: priors["pattern"].linears.popitem(), "belongs to another model"),
    ],
)
def test_missing_and_foreign_priors_are_named(
    tiny_model: Callable[..., transformers.PreTrainedModel],
    priors: Callable[..., dict[str, MaskSet]],
    change: Callable[..., object],
    message: str,
) -> None:
    model = tiny_model("llama")
    masks = priors(model, 0.35)
    change(masks)
    with pytest.raises(PatchError, match=message):
        make_masks(model, PatchJoint(), Pattern.parse("tiles:16x16"), 0.35, masks, seed=0, device=torch.device("cpu"))


def test_maskllm_adds_its_prior_to_noise_and_needs_none_at_strength_0(
    tiny_model: Callable[..., transformers.PreTrainedModel],
) -> None:
    model = tiny_model("llama")
    method = MaskLLM(pattern_prior_strength=0)
    masks = make_masks(model, method, Pattern.parse("2:4"), 0.5, {}, seed=0, device=torch.device("cpu"))
    logits = torch.cat(list(masks.parameters()))
    assert logits.std().item() == pytest.approx(0.014, rel=0.02)
    assert abs(logits.mean().item()) < 1e-4
