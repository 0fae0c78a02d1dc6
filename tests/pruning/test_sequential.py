"""The calibration driver on every architecture, against whole-model forwards with hooks."""

from __future__ import annotations

import logging

import pytest
import torch
import transformers
from torch import nn

from patch.artefacts import PatchError
from patch.methods import Dense, Magnitude, SparseGPT, Thanos, Wanda
from patch.models import prunable_linears
from patch.pruning import hidden_states, prune_model, sequential
from patch.pruning.wanda import InputNorm
from patch.sparsity.maskset import MaskSet
from patch.sparsity.patterns import Pattern

TWO_FOUR = Pattern("n:m", 2, 4)
UNSTRUCTURED = Pattern("unstructured")
METHODS = {
    "magnitude": Magnitude(),
    "wanda": Wanda(),
    "sparsegpt": SparseGPT(block_size=32),
    "thanos": Thanos(block_size=32),
}
UPDATES_WEIGHTS = ("sparsegpt", "thanos")


def linears_by_block(model: nn.Module) -> list[dict[str, nn.Linear]]:
    """Found by what the names say: "….layers.0.…", independent of the code under test."""
    blocks: list[dict[str, nn.Linear]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".layers." in name:
            index = int(name.split(".layers.")[1].split(".")[0])
            blocks.extend({} for _ in range(index + 1 - len(blocks)))
            blocks[index][name] = module
    return blocks


def inputs_of(model: nn.Module, linears: dict[str, nn.Linear], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inputs [sequences * tokens, in] of every layer in one forward pass of the whole model."""
    seen: dict[str, torch.Tensor] = {}

    def watch(name: str):
        def hook(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            seen[name] = arguments[0].reshape(-1, arguments[0].shape[-1]).double()

        return hook

    handles = [linear.register_forward_pre_hook(watch(name)) for name, linear in linears.items()]
    model(input_ids=ids.long(), use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


def wanda_2_4(weight: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    scores = (weight.double().abs() * inputs.norm(dim=0)).reshape(weight.shape[0], -1, 4)
    return (scores.argsort(-1).argsort(-1) >= 2).reshape(weight.shape)


@pytest.mark.parametrize("method", METHODS)
def test_every_linear_of_the_blocks_is_pruned_and_nothing_else(architecture, method, tiny_model, tokens):
    model, original = tiny_model(architecture), tiny_model(architecture)
    masks = prune_model(model, METHODS[method], TWO_FOUR, 0.5, tokens())
    names = [name for block in linears_by_block(original) for name in block]
    assert list(masks.linears) == names
    for name in names:
        weight, before = model.get_submodule(name).weight, original.get_submodule(name).weight
        keep = masks.linears[name].keep_mask()
        assert (keep.reshape(-1, 4).sum(1) == 2).all()
        assert torch.equal(weight != 0, keep)
        if method not in UPDATES_WEIGHTS:
            assert torch.equal(weight, before * keep)
    before = dict(original.named_parameters())
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") not in names:
            assert torch.equal(parameter, before[name]), name
    assert masks.sparsity == 0.5


@pytest.mark.parametrize("method", METHODS)
def test_masks_on_a_fresh_copy_give_the_same_weights(architecture, method, tiny_model, tokens, tmp_path):
    model, fresh = tiny_model(architecture), tiny_model(architecture)
    prune_model(model, METHODS[method], TWO_FOUR, 0.5, tokens()).save(tmp_path / "masks")
    MaskSet.load(tmp_path / "masks").apply_(prunable_linears(fresh))
    for (name, ours), theirs in zip(model.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


def test_each_block_is_scored_on_what_the_pruned_blocks_before_it_put_out(architecture, tiny_model, tokens):
    """Within a block all inputs are seen before anything of it is pruned; between blocks they are not."""
    calibration, model, reference = tokens(), tiny_model(architecture), tiny_model(architecture)
    expected = {}
    with torch.no_grad():
        for block in linears_by_block(reference):
            inputs = inputs_of(reference, block, calibration.ids)
            for name, linear in block.items():
                expected[name] = wanda_2_4(linear.weight, inputs[name])
            for name, linear in block.items():
                linear.weight.mul_(expected[name])
    masks = prune_model(model, Wanda(), TWO_FOUR, 0.5, calibration)
    for name, keep in expected.items():
        assert torch.equal(masks.linears[name].keep_mask(), keep), name
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=calibration.ids.long()).logits, reference(input_ids=calibration.ids.long()).logits
        )


def test_the_second_block_would_be_scored_otherwise_on_the_dense_model(tiny_model, tokens):
    """So that the test above can fail: the inputs do change when block 0 is pruned."""
    calibration, model = tokens(), tiny_model("llama")
    block = linears_by_block(model)[1]
    with torch.no_grad():
        inputs = inputs_of(model, block, calibration.ids)
    on_dense = {name: wanda_2_4(linear.weight, inputs[name]) for name, linear in block.items()}
    masks = prune_model(model, Wanda(), TWO_FOUR, 0.5, calibration)
    assert any(not torch.equal(masks.linears[name].keep_mask(), keep) for name, keep in on_dense.items())


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "thanos"])
@pytest.mark.parametrize("architecture_with_batches", ["llama", "gemma3", "opt"])
def test_the_batch_size_of_calibration_does_not_matter(
    architecture_with_batches, method, tiny_model, tokens, monkeypatch
):
    results = []
    for tokens_per_batch in (1, 48, 10**6):  # one sequence, two, all six at a time
        monkeypatch.setitem(hidden_states.TOKENS_PER_BATCH, "cpu", tokens_per_batch)
        model = tiny_model(architecture_with_batches)
        masks = prune_model(model, METHODS[method], TWO_FOUR, 0.5, tokens())
        results.append((masks, model.state_dict()))
    for masks, state in results[1:]:
        for name, mask in results[0][0].linears.items():
            flipped = masks.linears[name].keep_mask() != mask.keep_mask()
            assert flipped.sum() <= 4, name  # sums in another order may decide a near tie otherwise
            rows = ~flipped.any(dim=1)
            torch.testing.assert_close(
                state[f"{name}.weight"][rows], results[0][1][f"{name}.weight"][rows], rtol=1e-3, atol=1e-3
            )


def test_the_same_call_twice_gives_the_same_file(tiny_model, tokens, tmp_path):
    checksums = {
        prune_model(tiny_model("llama"), METHODS["sparsegpt"], TWO_FOUR, 0.5, tokens()).save(tmp_path / "masks")
        for _ in range(2)
    }
    assert len(checksums) == 1


@pytest.mark.parametrize(
    ("method", "per"), [("magnitude", "layer"), ("wanda", "row"), ("sparsegpt", "block"), ("thanos", "layer")]
)
def test_unstructured_pruning_meets_the_target_in_every_layer(method, per, tiny_model, tokens):
    masks = prune_model(tiny_model("llama"), METHODS[method], UNSTRUCTURED, 0.45, tokens())
    for name, mask in masks.linears.items():
        rows, columns = mask.shape
        unit = {"layer": rows * columns, "row": columns, "block": rows * 32}[per]
        pruned = rows * columns // unit * int(unit * 45 / 100)
        assert mask.shape[0] * mask.shape[1] - mask.kept == pruned, name


def test_n_m_patterns_fix_the_sparsity_whatever_is_asked_for(tiny_model, tokens):
    masks = prune_model(tiny_model("llama"), Wanda(), Pattern("n:m", 1, 4), 0.1, tokens())
    assert masks.sparsity == 0.75


def test_bfloat16_models_stay_bfloat16(tiny_model, tokens):
    model = tiny_model("llama").to(torch.bfloat16)
    masks = prune_model(model, METHODS["sparsegpt"], TWO_FOUR, 0.5, tokens())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {mask.values.dtype for mask in masks.linears.values()} == {torch.bfloat16}


def test_layers_with_the_same_inputs_share_one_statistic(tiny_model, tokens, monkeypatch):
    made = []

    class Counted(InputNorm):
        def __init__(self, in_features, device):
            made.append(in_features)
            super().__init__(in_features, device)

    monkeypatch.setattr(sequential.WandaPruner, "statistic", Counted)
    prune_model(tiny_model("llama"), Wanda(), TWO_FOUR, 0.5, tokens())
    assert made == [64, 64, 64, 96] * 2  # q k v; o; gate up; down


def test_the_model_works_as_before_once_pruned(architecture, tiny_model, tokens):
    """No hook and no replaced forward is left behind."""
    calibration, model = tokens(), tiny_model(architecture)
    prune_model(model, Wanda(), TWO_FOUR, 0.5, calibration)
    fresh = tiny_model(architecture)
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        ours, theirs = (m(input_ids=calibration.ids.long()).logits for m in (model, fresh))
    assert torch.equal(ours, theirs)
    assert not any(module._forward_pre_hooks or "forward" in vars(module) for module in model.modules())


def test_progress_is_logged_with_the_blocks(tiny_model, tokens, monkeypatch, caplog):
    monkeypatch.setattr("patch.progress.SECONDS_BETWEEN_LINES", 0.0)
    with caplog.at_level(logging.INFO, logger="patch"):
        prune_model(tiny_model("llama"), Wanda(), TWO_FOUR, 0.5, tokens())
    assert any("block 1/2" in message and "left" in message for message in caplog.messages)


@pytest.mark.parametrize("method", METHODS)
def test_3_4_prunes_a_quarter_of_every_group(method, tiny_model, tokens, tmp_path):
    model = tiny_model("llama")
    prune_model(model, METHODS[method], Pattern.parse("3:4"), 0.5, tokens()).save(tmp_path / "masks")
    masks = MaskSet.load(tmp_path / "masks")
    assert masks.sparsity == 0.25
    for name, linear in prunable_linears(model).items():
        keep = masks.linears[name].keep_mask()
        assert (keep.reshape(-1, 4).sum(1) == 3).all()
        assert torch.equal(linear.weight != 0, keep)


# pruning MLPs only


@pytest.mark.parametrize("method", METHODS)
def test_attention_stays_dense_and_the_mask_says_so(architecture, method, tiny_model, tokens, tmp_path):
    model, original = tiny_model(architecture), tiny_model(architecture)
    options = METHODS[method].model_copy(update={"layers": "mlp"})
    prune_model(model, options, TWO_FOUR, 0.5, tokens()).save(tmp_path / "masks")
    masks, linears, pruned, total = MaskSet.load(tmp_path / "masks"), prunable_linears(model), 0, 0
    assert list(masks.linears) == list(linears)
    for name, linear in linears.items():
        attention = any(projection in name for projection in ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj"))
        assert str(masks.linears[name].pattern) == ("dense" if attention else "2:4")
        if attention:
            assert torch.equal(linear.weight, original.get_submodule(name).weight)
        pruned, total = pruned + (linear.weight == 0).sum().item(), total + linear.weight.numel()
    assert 0.1 < pruned / total < 0.45
    assert masks.sparsity == pytest.approx(pruned / total)
    masks.apply_(prunable_linears(original))
    for ours, theirs in zip(model.parameters(), original.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_mlps_may_divide_where_attention_does_not(tiny_model, tokens):
    masks = prune_model(
        tiny_model("qwen3", head_dim=6, num_attention_heads=3, num_key_value_heads=1),
        Wanda(layers="mlp"), TWO_FOUR, 0.5, tokens(),
    )  # fmt: skip
    assert masks.linears["model.layers.0.self_attn.o_proj"].shape == (64, 18)


def test_layers_without_attention_in_their_names_are_all_or_nothing():
    linears = {"blocks.0.mix": nn.Linear(4, 4), "blocks.0.up": nn.Linear(4, 4)}
    assert sequential._chosen(linears, Wanda()) == linears
    with pytest.raises(PatchError, match=r"do not divide into attention and MLP by their names \(blocks\.0\.mix"):
        sequential._chosen(linears, Wanda(layers="mlp"))


# what cannot be pruned


def test_inputs_that_do_not_divide_name_the_layer_and_the_count(tiny_model, tokens):
    model = tiny_model("llama", intermediate_size=98)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        PatchError, match=r"layer model\.layers\.0\.mlp\.down_proj \(64x98\): 98 inputs do not split into 4s"
    ):
        prune_model(model, Wanda(), TWO_FOUR, 0.5, tokens())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_damaged_weights_name_the_layer(method, bad, tiny_model, tokens):
    model = tiny_model("llama")
    model.model.layers[1].mlp.down_proj.weight[3, 5] = bad
    with pytest.raises(PatchError, match=r"layer model\.layers\.1\.mlp\.down_proj: its weights hold NaN or Inf"):
        prune_model(model, METHODS[method], TWO_FOUR, 0.5, tokens())


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "thanos"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_damaged_activations_name_the_first_layer_that_sees_them(method, bad, tiny_model, tokens):
    model, calibration = tiny_model("llama"), tokens()
    model.get_input_embeddings().weight[int(calibration.ids[2, 5])] = bad
    with pytest.raises(PatchError, match=r"layer model\.layers\.0\.self_attn\.q_proj: its inputs hold NaN or Inf"):
        prune_model(model, METHODS[method], TWO_FOUR, 0.5, calibration)


def test_activations_that_overflow_midway_name_the_layer(tiny_model, tokens):
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.mul_(1e38)
    model.model.layers[1].mlp.gate_proj.weight.mul_(1e5)
    with pytest.raises(PatchError, match=r"layer model\.layers\.1\.mlp\.down_proj: its inputs hold NaN or Inf"):
        prune_model(model, Wanda(), TWO_FOUR, 0.5, tokens())


def test_tokens_of_another_vocabulary_are_refused(tiny_model, tokens):
    with pytest.raises(PatchError, match=r"id \d+ does not exist in the model's vocabulary of 256"):
        prune_model(tiny_model("llama"), Wanda(), TWO_FOUR, 0.5, tokens(vocabulary=1000))


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "thanos"])
def test_missing_calibration_is_told(method, tiny_model):
    with pytest.raises(PatchError, match=f"method {METHODS[method].title}: needs calibration tokens"):
        prune_model(tiny_model("llama"), METHODS[method], TWO_FOUR, 0.5)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "thanos"])
def test_calibration_without_a_sequence_is_told(method, tiny_model, tokens):
    with pytest.raises(PatchError, match=f"method {METHODS[method].title}: needs calibration tokens"):
        prune_model(tiny_model("llama"), METHODS[method], TWO_FOUR, 0.5, tokens(samples=0))


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "thanos"])
def test_a_single_token_of_calibration_is_enough(method, tiny_model, tokens):
    """Far fewer tokens than inputs: damping alone keeps the Hessians regular."""
    model = tiny_model("llama")
    assert prune_model(model, METHODS[method], TWO_FOUR, 0.5, tokens(samples=1, length=1)).sparsity == 0.5
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_magnitude_needs_no_calibration(tiny_model):
    assert prune_model(tiny_model("llama"), Magnitude(), TWO_FOUR, 0.5).sparsity == 0.5


def test_patterns_that_a_method_cannot_make_are_refused(tiny_model, tokens):
    with pytest.raises(PatchError, match="Wanda: cannot make the pattern tiles:8x8"):
        prune_model(tiny_model("llama"), Wanda(), Pattern.parse("tiles:8x8"), 0.5, tokens())


def test_dense_is_not_a_pruning_method(tiny_model):
    with pytest.raises(PatchError, match="Dense: does not prune in one shot"):
        prune_model(tiny_model("llama"), Dense(), Pattern("dense"), 0.0)


@pytest.mark.parametrize("sparsity", [-0.5, 1.0, 45])
def test_impossible_sparsities_are_refused(sparsity, tiny_model):
    with pytest.raises(PatchError, match="must be at least 0 and below 1"):
        prune_model(tiny_model("llama"), Magnitude(), UNSTRUCTURED, sparsity)


def test_models_without_linear_layers_are_refused(tokens):
    """GPT-2 keeps its weights in Conv1D."""
    config = transformers.GPT2Config(vocab_size=256, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    with pytest.raises(PatchError, match=r"GPT2LMHeadModel: its decoder blocks hold no nn\.Linear"):
        prune_model(model, Wanda(), TWO_FOUR, 0.5, tokens())


def test_an_error_inside_the_model_is_the_one_that_is_seen(tiny_model, tokens):
    model = tiny_model("llama")

    def fail(*_: object) -> None:
        raise RuntimeError("the cause")

    model.model.layers[0].self_attn.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="the cause"):
        prune_model(model, Wanda(), TWO_FOUR, 0.5, tokens())
