"""What all tests share: tiny models of six architectures, a tiny tokenizer, token sets. Nothing is downloaded."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from patch.data import TokenSet

# A test run in the background ignores Ctrl-C, and so would the programs that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

torch.set_num_threads(1)
settings.register_profile("tests", derandomize=True, deadline=None, max_examples=30, database=None)
settings.load_profile("tests")

VOCABULARY = 256
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
GATED = COMMON | {"intermediate_size": 96, "num_key_value_heads": 2, "initializer_range": 0.1}
# Gemma 3 alternates local attention, whose window is far below the length of `tokens`, and global attention.
LOCAL_AND_GLOBAL = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
ARCHITECTURES: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**GATED),
    "qwen2": lambda: transformers.Qwen2Config(**GATED),
    "qwen3": lambda: transformers.Qwen3Config(**GATED, head_dim=16),
    "gemma3": lambda: transformers.Gemma3TextConfig(**GATED, **LOCAL_AND_GLOBAL, head_dim=16, query_pre_attn_scalar=16),
    "opt": lambda: transformers.OPTConfig(**COMMON, ffn_dim=96, word_embed_proj_dim=64, init_std=0.1),
    "mistral": lambda: transformers.MistralConfig(**GATED, head_dim=16, sliding_window=8),
}
WORDS = """the a of and to in tile mask weight layer model sparse dense pattern learns prunes keeps drops token text
river mountain small large seven twelve quickly because while never again paper method score input output"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = {}
    if not torch.cuda.is_available():
        missing["gpu"] = pytest.mark.skip(reason="needs a CUDA GPU; torch.cuda.is_available() is False")
    # Not on any other cluster: they kill its daemons.
    if not (Path(os.environ.get("SLURM_CONF", "")).parent.parent / "run" / "slurmctld.pid").is_file():
        missing["slurm"] = pytest.mark.skip(reason="needs the Slurm cluster of tests/slurm/cluster.sh; none is started")
    for item in items:
        for marker, skip in missing.items():
            if item.get_closest_marker(marker):
                item.add_marker(skip)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests of the Slurm cluster run one after the other on one worker, since they share it; others wherever."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "slurm" if nodeid.startswith("tests/slurm/") else nodeid

    return Scheduling(config, log)


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    """Runs the test once per architecture."""
    return request.param


@pytest.fixture
def tiny_model() -> Callable[..., transformers.PreTrainedModel]:
    """`tiny_model("llama", seed=0, **config)`: 2 blocks, 64 wide, float32; always the same weights."""

    def make(architecture: str = "llama", seed: int = 0, **changes: object) -> transformers.PreTrainedModel:
        config = ARCHITECTURES[architecture]()
        for key, value in changes.items():
            assert hasattr(config, key), key
            setattr(config, key, value)
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        return model.requires_grad_(False).eval()

    return make


@pytest.fixture
def tokens() -> Callable[..., TokenSet]:
    """`tokens(samples=6, length=24, seed=0)`: random ids of the tiny models' vocabulary."""

    def make(samples: int = 6, length: int = 24, seed: int = 0, vocabulary: int = VOCABULARY) -> TokenSet:
        ids = torch.randint(3, vocabulary, (samples, length), generator=torch.Generator().manual_seed(seed))
        return TokenSet(ids.to(torch.int32), {"source": "random", "length": length, "samples": samples, "seed": seed})

    return make


def make_documents(count: int, seed: int = 0) -> list[str]:
    """Documents of 1 to 60 words."""
    generator = random.Random(seed)
    return [" ".join(generator.choices(WORDS.split(), k=generator.randint(1, 60))) for _ in range(count)]


@pytest.fixture(scope="session")
def documents() -> list[str]:
    return make_documents(40)


@pytest.fixture(scope="session")
def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Byte-pair encoding with fewer than 256 tokens that puts <s> (id 1) before every text."""
    inner = Tokenizer(models.BPE(unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False, initial_alphabet=["Ċ", "Ġ"]
    )
    inner.train_from_iterator(make_documents(80, seed=1), trainer)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture
def model_directory(tmp_path: Path, tiny_model: Callable, tokenizer: transformers.PreTrainedTokenizerFast) -> Path:
    """A tiny Llama and its tokenizer as transformers saves them."""
    directory = tmp_path / "tiny-llama"
    tiny_model("llama").save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
