"""Loading models, and finding their prunable layers by structure alone."""

from __future__ import annotations

import importlib
import json
import shutil

import pytest
import torch
import transformers
from huggingface_hub import errors
from torch import nn

from patch.artefacts import PatchError
from patch.hub import hub_access
from patch.models import (
    PreparedModel,
    content_checksum,
    decoder_blocks,
    load_model,
    load_tokenizer,
    prepare_model,
    prunable_linears,
    tokenizer_checksum,
)

http = importlib.import_module(errors.HTTPError.__module__.partition(".")[0])  # httpx, or what the hub's client uses
GATED = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
GATED += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
OPT = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2"]


# finding layers


def test_the_blocks_and_their_linears_are_found(architecture, tiny_model):
    prefix = "model.decoder.layers" if architecture == "opt" else "model.layers"
    inner = OPT if architecture == "opt" else GATED
    name, blocks = decoder_blocks(tiny_model(architecture))
    assert (name, len(blocks)) == (prefix, 2)
    found = prunable_linears(tiny_model(architecture))
    assert set(found) == {f"{prefix}.{index}.{part}" for index in range(2) for part in inner}
    assert [key.split(".layers.")[1][0] for key in found] == ["0"] * len(inner) + ["1"] * len(inner)
    assert all(isinstance(linear, nn.Linear) for linear in found.values())


@pytest.mark.parametrize("equal_to", ["hidden_size", "intermediate_size"])
def test_a_vocabulary_as_large_as_a_layer_hides_nothing(architecture, equal_to, tiny_model):
    size = {"hidden_size": 64, "intermediate_size": 96}[equal_to]
    model = tiny_model(architecture, vocab_size=size)
    found = prunable_linears(model)
    assert len(found) == 2 * (6 if architecture == "opt" else 7)
    assert not any(linear is model.get_output_embeddings() for linear in found.values())


def test_projections_around_the_blocks_are_left_alone(tiny_model):
    """OPT-350m has project_in and project_out beside its blocks."""
    model = tiny_model("opt", word_embed_proj_dim=32)
    assert isinstance(model.model.decoder.project_in, nn.Linear)
    assert all(".layers." in name for name in prunable_linears(model))


def test_lists_inside_the_blocks_are_not_mistaken_for_them():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])

    model = nn.Module()
    model.other = nn.ModuleList([nn.Linear(8, 8)])
    model.blocks = nn.ModuleList([Block(), Block()])
    assert decoder_blocks(model)[0] == "blocks"
    assert list(prunable_linears(model)) == [f"blocks.{i}.experts.{j}" for i in range(2) for j in range(4)]


def test_models_without_linears_in_blocks_are_refused():
    config = transformers.GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    with pytest.raises(PatchError, match=r"GPT2LMHeadModel: its decoder blocks hold no nn\.Linear"):
        prunable_linears(transformers.GPT2LMHeadModel(config))
    with pytest.raises(PatchError, match="model Linear"):
        decoder_blocks(nn.Linear(4, 4))


# loading


def test_models_load_frozen_and_in_evaluation_mode(model_directory, tiny_model):
    model = load_model(str(model_directory))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for name, tensor in tiny_model("llama").state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_precision_is_the_one_asked_for(model_directory, dtype):
    model = load_model(str(model_directory), dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}


def test_auto_is_the_precision_the_model_was_saved_in(tmp_path, tiny_model):
    tiny_model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "half")
    assert load_model(str(tmp_path / "half")).dtype == torch.bfloat16


def test_an_unknown_precision_is_told_with_the_known_ones(model_directory):
    with pytest.raises(PatchError, match="dtype 'int8': choose one of auto, float32, bfloat16, float16"):
        load_model(str(model_directory), dtype="int8")


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all"])
def test_a_directory_that_is_not_there_is_told(source):
    with pytest.raises(PatchError, match=f"model {source}: no such directory, or no config.json in it"):
        load_model(source)


def test_a_directory_without_config_is_told(tmp_path):
    with pytest.raises(PatchError, match=r"no config\.json in it"):
        load_model(str(tmp_path))


def spoil(directory, how):
    weights = directory / "model.safetensors"
    if how == "no weights":
        weights.unlink()
    elif how == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how == "config is not JSON":
        (directory / "config.json").write_text("{")
    elif how == "unknown architecture":
        (directory / "config.json").write_text('{"model_type": "perceptron"}')
    elif how == "other shapes":
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))


@pytest.mark.parametrize(
    "how", ["no weights", "truncated weights", "config is not JSON", "unknown architecture", "other shapes"]
)
def test_damaged_directories_are_told_in_one_line(model_directory, how):
    spoil(model_directory, how)
    with pytest.raises(PatchError, match="tiny-llama: ") as error:
        load_model(str(model_directory))
    assert "\n" not in str(error.value)


def test_tokenizers_load_from_the_models_directory(model_directory, tokenizer):
    read = load_tokenizer(str(model_directory))
    assert read("the tile mask").input_ids == tokenizer("the tile mask").input_ids
    assert tokenizer_checksum(read) == tokenizer_checksum(tokenizer)


def test_a_directory_without_tokenizer_is_told(model_directory):
    for path in model_directory.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(PatchError, match=r"tokenizer of .*tiny-llama: "):
        load_tokenizer(str(model_directory))


# prepared models


def test_preparing_describes_the_model(model_directory):
    prepared = prepare_model(str(model_directory))
    block = 64 * 64 * 2 + 2 * 32 * 64 + 3 * 64 * 96
    assert prepared.prunable_parameters == 2 * block
    assert prepared.parameters == 2 * block + 2 * 256 * 64 + (2 * 2 + 1) * 64
    assert (prepared.path, prepared.revision, prepared.dtype) == (str(model_directory.resolve()), None, "float32")


def test_a_prepared_model_loads_through_its_description(model_directory, tmp_path):
    prepare_model(str(model_directory), dtype="bfloat16").write(tmp_path / "model.json")
    assert PreparedModel.read(tmp_path / "model.json") == prepare_model(str(model_directory), dtype="bfloat16")
    assert load_model(str(tmp_path / "model.json")).dtype == torch.bfloat16
    assert load_model(str(tmp_path / "model.json"), dtype="float32").dtype == torch.float32
    assert load_tokenizer(str(tmp_path / "model.json")).bos_token_id == 1


def test_a_prepared_model_whose_files_are_gone_says_so(model_directory, tmp_path):
    prepare_model(str(model_directory)).write(tmp_path / "model.json")
    shutil.rmtree(model_directory)
    with pytest.raises(PatchError, match=r"model\.json: the model's files are gone from .*; prepare the model again"):
        load_model(str(tmp_path / "model.json"))


def test_a_description_that_is_missing_or_foreign_is_refused(tmp_path):
    with pytest.raises(PatchError, match=r"model\.json: no such file"):
        load_model(str(tmp_path / "model.json"))
    (tmp_path / "model.json").write_text('{"schema": "patch.record/1"}')
    with pytest.raises(PatchError, match=r"not a patch\.model file"):
        load_model(str(tmp_path / "model.json"))
    (tmp_path / "model.json").write_text('{"schema": "patch.model/1"}')
    with pytest.raises(PatchError, match=r"model\.json"):
        load_model(str(tmp_path / "model.json"))


# identity


def test_the_content_checksum_sees_a_single_weight(tiny_model):
    model = tiny_model("llama")
    before = content_checksum(model)
    assert before == content_checksum(tiny_model("llama"))
    model.model.norm.weight[5] += 1
    assert content_checksum(model) != before


def test_tokenizers_with_the_same_vocabulary_may_differ(tokenizer):
    import copy

    from tokenizers import normalizers

    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert other.get_vocab() == tokenizer.get_vocab()
    assert tokenizer_checksum(other) != tokenizer_checksum(tokenizer)


# the hub


@pytest.mark.parametrize("load", [load_model, load_tokenizer, prepare_model])
def test_offline_an_unknown_model_is_one_line_with_the_way_out(load):
    with pytest.raises(PatchError, match=r"nobody/no-such-model: not in the local cache .*HF_HUB_OFFLINE=1") as error:
        load("nobody/no-such-model")
    assert "\n" not in str(error.value)


def hub_error(kind: type[Exception]) -> Exception:
    request = http.Request("GET", "https://huggingface.co/api/models/some/model")
    return kind("Client error\nwith more lines", response=http.Response(403, request=request))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_error(errors.GatedRepoError), "access is restricted; accept its licence .*HF_TOKEN"),
        (hub_error(errors.RepositoryNotFoundError), "not found on the hub; correct the name, .*HF_TOKEN"),
        (hub_error(errors.RevisionNotFoundError), "not this revision; correct `revision`"),
        (hub_error(errors.HfHubHTTPError), "the hub refused the request .*HF_TOKEN"),
        (errors.OfflineModeIsEnabled("offline"), "the hub cannot be reached; .*HF_HUB_OFFLINE=1"),
        (http.ConnectError("no route"), "the hub cannot be reached"),
        (OSError("We couldn't connect to 'https://huggingface.co' to load the files"), "the hub cannot be reached"),
        (errors.HFValidationError("Repo id must be"), "neither a directory here nor a valid name on the hub"),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_every_failure_of_the_hub_is_one_line(error, message, wrapped):
    with pytest.raises(PatchError, match=f"model some/model: .*{message}") as caught, hub_access("model some/model"):  # noqa: PT012
        if wrapped:
            raise OSError("cannot load") from error
        raise error
    assert "\n" not in str(caught.value)


def test_other_errors_pass_through_the_hub_unchanged():
    with pytest.raises(ZeroDivisionError), hub_access("model"):
        _ = 1 / 0
