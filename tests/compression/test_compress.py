"""The driver: what a compressed model computes, what its statistics come from, and what it refuses."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from patch.artefacts import PatchError
from patch.compression.compress import compress_model, compress_weight, input_norms
from patch.compression.inputs import quantise_inputs_
from patch.compression.options import Compression, make_compression
from patch.compression.quantisation import quantise
from patch.methods import Magnitude, SparseGPT
from patch.models import prunable_linears
from patch.pruning import prune_model
from patch.pruning.wanda import InputNorm
from patch.sparsity.maskset import LinearMask, MaskSet, fingerprint
from patch.sparsity.patterns import Pattern

GROUPS = Compression(group_size=32)
ADAPTERS = Compression(group_size=32, adapter_rank=0.25)


def tiled(shape: tuple[int, int], index: int) -> LinearMask:
    """Tiles of 16 x 16, every other one dense; 2:4 by position in the others."""
    rows, columns = -(-shape[0] // 16), -(-shape[1] // 16)
    tiles = (torch.arange(rows).unsqueeze(1) + torch.arange(columns) + index) % 2 == 0
    dense = tiles.repeat_interleave(16, 0)[: shape[0]].repeat_interleave(16, 1)[:, : shape[1]]
    keep = dense | (torch.arange(shape[1]) % 4 < 2)
    return LinearMask.from_keep_mask(keep, Pattern.parse("tiles:16x16"), dense_tiles=tiles)


@pytest.fixture
def masks(tiny_model: Callable) -> Callable[[str], MaskSet | None]:
    """`masks(kind)`: for the tiny Llama."""

    def make(kind: str) -> MaskSet | None:
        model = tiny_model()
        linears = prunable_linears(model)
        if kind == "tiles":
            made = {name: tiled(tuple(linear.weight.shape), i) for i, (name, linear) in enumerate(linears.items())}
            return MaskSet(made, fingerprint(linears))
        if kind == "dense":
            return None
        return prune_model(model, Magnitude(), Pattern.parse(kind), 0.4)

    return make


@pytest.mark.parametrize("options", [GROUPS, ADAPTERS, Compression(quantiser="slim_quant", order="prune_first")])
@pytest.mark.parametrize("kind", ["dense", "2:4", "unstructured", "tiles"])
def test_a_fresh_model_with_the_file_computes_what_the_compressed_one_does(
    kind: str, options: Compression, tiny_model: Callable, tokens: Callable, masks: Callable
) -> None:
    model, fresh, found = tiny_model(), tiny_model(), masks(kind)
    made = compress_model(model, options, found, tokens())
    made.apply_(prunable_linears(fresh))
    ids = tokens(seed=1).ids.long()
    assert torch.equal(model(ids).logits, fresh(ids).logits)
    for name, linear in prunable_linears(fresh).items():
        if found:
            assert (linear.weight[~found.linears[name].keep_mask()] == 0).all()
            assert made.linears[name].weight.mask.pattern == found.linears[name].pattern
        if options.adapter_rank:
            assert linear.adapter_left.shape[1] == int(min(linear.weight.shape) * 0.25)


@pytest.mark.parametrize("order", ["quantise_first", "prune_first"])
def test_without_adapters_weights_are_quantised_before_or_after_pruning(
    order: str, tiny_model: Callable, masks: Callable
) -> None:
    model, found = tiny_model(), masks("tiles")
    compress_model(model, Compression(group_size=32, order=order), found)
    changed = 0
    for (name, linear), original in zip(
        prunable_linears(model).items(), prunable_linears(tiny_model()).values(), strict=True
    ):
        keep = found.linears[name].keep_mask()
        first = quantise(original.weight, GROUPS).dequantise() * keep
        last = quantise(original.weight * keep, GROUPS).dequantise()
        assert torch.equal(linear.weight, first if order == "quantise_first" else last)
        changed += int((first != last).any())
    assert changed > 0


def test_statistics_come_through_the_compressed_blocks_before(tiny_model: Callable, tokens: Callable) -> None:
    """By hand: the second block's inputs after the first one is compressed, with that block itself still dense."""
    model, by_hand = tiny_model(), tiny_model()
    made = compress_model(model, ADAPTERS, None, tokens())
    linears = prunable_linears(by_hand)
    for name, linear in linears.items():
        if ".0." in name:
            made.linears[name].apply_(linear)
    statistic = InputNorm(64, torch.device("cpu"))
    last = "model.layers.1.self_attn.q_proj"
    handle = linears[last].register_forward_pre_hook(lambda _, arguments: statistic.add(arguments[0]))
    by_hand(tokens().ids.long())
    handle.remove()
    weight = linears[last].weight
    again = compress_weight(weight, LinearMask.dense((64, 64)), statistic.mean().sqrt(), ADAPTERS)
    for (_, ours), (_, theirs) in zip(made.linears[last].matrices(), again.matrices(), strict=True):
        torch.testing.assert_close(ours.dense(torch.float32), theirs.dense(torch.float32), rtol=0, atol=2e-3)


def test_adapters_bring_the_outputs_nearer(tiny_model: Callable, tokens: Callable, masks: Callable) -> None:
    ids, found = tokens(seed=1).ids.long(), masks("2:4")
    exact = tiny_model()(ids).logits

    def error(**settings: object) -> float:
        model = tiny_model()
        compress_model(model, Compression(group_size=32, **settings), found, tokens())  # type: ignore[arg-type]
        return (model(ids).logits - exact).norm().item()

    plain = error()
    assert error(adapter_rank=0.25) < 0.9 * plain
    assert error(adapter_rank=0.5) < error(adapter_rank=0.25)
    for settings in (
        {"adapter_norm": "mean_abs"},
        {"adapter_norm": "none"},
        {"adapter_sparsity": "2:4"},
        {"adapter_bits": 4},
    ):
        assert error(adapter_rank=0.5, **settings) < plain


def test_updated_weights_are_quantised_and_adapters_start_from_the_models_own(
    tiny_model: Callable, tokens: Callable
) -> None:
    updated = prune_model(tiny_model(), SparseGPT(), Pattern("n:m", 2, 4), 0.5, tokens())
    pattern_only = MaskSet(
        {name: LinearMask(mask.pattern, mask.shape, mask.packed) for name, mask in updated.linears.items()},
        updated.base_fingerprint,
    )

    def weights(masks: MaskSet, options: Compression) -> dict[str, Tensor]:
        model = tiny_model()
        compress_model(model, options, masks, tokens())
        return {name: linear.weight for name, linear in prunable_linears(model).items()}

    expected = tiny_model()
    updated.apply_(prunable_linears(expected))
    quantised, from_pattern = weights(updated, GROUPS), weights(pattern_only, GROUPS)
    beside_adapters, the_same = weights(updated, ADAPTERS), weights(pattern_only, ADAPTERS)
    for name, linear in prunable_linears(expected).items():
        assert torch.equal(quantised[name], quantise(linear.weight, GROUPS).dequantise())
        assert not torch.equal(quantised[name], from_pattern[name])
        assert torch.equal(beside_adapters[name], the_same[name])


def test_norms_of_inputs() -> None:
    statistic, linear = InputNorm(4, torch.device("cpu")), torch.nn.Linear(4, 2)
    statistic.add(torch.tensor([[[3.0, 0, 1, 2], [4, 0, 1, 0]]]))
    torch.testing.assert_close(input_norms(statistic, ADAPTERS, linear), torch.tensor([5.0, 0, 2**0.5, 2]))
    shifted = ADAPTERS.model_copy(update={"shift_zero_metrics": True})
    torch.testing.assert_close(input_norms(statistic, shifted, linear).square(), torch.tensor([26.0, 1, 3, 5]))
    assert torch.equal(input_norms(None, ADAPTERS, linear), torch.ones(4))


def test_inputs_are_quantised_for_adapters_too(tiny_model: Callable, tokens: Callable) -> None:
    model = tiny_model()
    compress_model(model, ADAPTERS, None, tokens())
    layer = prunable_linears(model)["model.layers.0.mlp.up_proj"]
    inputs = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    quantise_inputs_([layer], "int8")
    step = inputs.abs().amax(-1, keepdim=True) / 127
    seen = (inputs / step).round() * step
    expected = seen @ (layer.weight.T + layer.adapter_left @ layer.adapter_right)
    torch.testing.assert_close(layer(inputs), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("architecture_", ["opt", "gemma3"])
def test_other_architectures(architecture_: str, tiny_model: Callable, tokens: Callable) -> None:
    model = tiny_model(architecture_)
    compress_model(model, ADAPTERS, None, tokens())
    assert model(tokens().ids.long()).logits.isfinite().all()


def test_what_cannot_be_compressed_is_told(tiny_model: Callable, tokens: Callable, masks: Callable) -> None:
    with pytest.raises(PatchError, match="adapters need calibration tokens; or set adapter_norm: none"):
        compress_model(tiny_model(), ADAPTERS)
    with pytest.raises(PatchError, match="the mask belongs to another model"):
        compress_model(tiny_model(seed=1), GROUPS, masks("2:4"))
    for damage in (float("nan"), float("inf")):
        model = tiny_model()
        prunable_linears(model)["model.layers.1.mlp.up_proj"].weight[3, 5] = damage
        with pytest.raises(PatchError, match=r"layer model.layers.1.mlp.up_proj: its weights hold NaN or Inf"):
            compress_model(model, GROUPS)
    model = tiny_model()
    model.model.layers[0].input_layernorm.weight[0] = float("nan")
    with pytest.raises(PatchError, match=r"model.layers.0.self_attn.q_proj: its inputs hold NaN or Inf"):
        compress_model(model, ADAPTERS, None, tokens())
    model = tiny_model(hidden_size=40, head_dim=10, intermediate_size=90)
    with pytest.raises(PatchError, match=r"layer model.layers.0.mlp.down_proj: 90 inputs do not split into 4s"):
        compress_model(model, ADAPTERS.model_copy(update={"adapter_sparsity": "2:4"}), None, tokens())


def test_settings_are_closed() -> None:
    assert make_compression({"adapter_rank": 0.1}).adapter_rank == 0.1
    with pytest.raises(PatchError, match="setting 'rank': Extra inputs are not permitted; the settings are: quanti"):
        make_compression({"rank": 0.1})
    with pytest.raises(PatchError, match="compression, setting 'group_size': Input should be greater than 0"):
        make_compression({"group_size": 0})
