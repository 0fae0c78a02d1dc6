"""The ways of sampling text, against plain loops, and every source that needs no network."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from patch import data
from patch.artefacts import PatchError
from patch.data import TokenSet, generate_tokens, make_tokens, read_documents
from patch.models import content_checksum, tokenizer_checksum

LENGTH = 16


@pytest.fixture
def source(tmp_path, documents) -> str:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return str(path)


# windows


def naive_windows(tokenizer, documents, length, samples, seed):
    """The papers' calls in the papers' order: draw documents until one is long enough, then a window of it."""
    generator = random.Random(seed)
    windows = []
    for _ in range(samples):
        while True:
            ids = tokenizer(documents[generator.randint(0, len(documents) - 1)]).input_ids
            if len(ids) > length:
                break
        start = generator.randint(0, len(ids) - length - 1)
        windows.append(ids[start : start + length])
    return windows


@pytest.mark.parametrize("seed", [0, 1])
def test_windows_are_the_papers_draws(source, tokenizer, documents, seed):
    made = make_tokens(tokenizer, source, sampling="windows", length=LENGTH, samples=20, seed=seed)
    assert made.ids.dtype == torch.int32
    assert made.ids.tolist() == naive_windows(tokenizer, documents, LENGTH, 20, seed)


def test_windows_need_a_number(source, tokenizer):
    with pytest.raises(PatchError, match="needs the number of samples"):
        make_tokens(tokenizer, source, sampling="windows", length=LENGTH, seed=0)


def test_windows_of_documents_that_are_all_too_short_do_not_loop_for_ever(source, tokenizer):
    with pytest.raises(PatchError, match=r"no document has more than 500 tokens, .*use 'packed' or a shorter length"):
        make_tokens(tokenizer, source, sampling="windows", length=500, samples=1, seed=0)


def test_a_document_of_exactly_the_length_is_too_short_for_windows(tmp_path, tokenizer):
    length = len(tokenizer("the tile mask of a layer").input_ids)
    (tmp_path / "a.txt").write_text("the tile mask of a layer")
    with pytest.raises(PatchError, match="no document"):
        make_tokens(tokenizer, str(tmp_path / "a.txt"), sampling="windows", length=length, samples=1, seed=0)
    made = make_tokens(tokenizer, str(tmp_path / "a.txt"), sampling="windows", length=length - 1, samples=3, seed=0)
    assert made.ids.shape == (3, length - 1)


def test_one_character_may_be_several_tokens(tmp_path):
    """Bytes are the tokens here: 10 characters of 3 bytes each are long enough for a window of 20."""
    alphabet = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    inner = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    (tmp_path / "a.txt").write_text("稀疏矩阵很小但很快乐", encoding="utf-8")
    made = make_tokens(
        PreTrainedTokenizerFast(tokenizer_object=inner),
        str(tmp_path / "a.txt"),
        sampling="windows",
        length=20,
        samples=2,
        seed=0,
    )
    assert made.ids.shape == (2, 20)


# packed


def naive_packed(tokenizer, documents, length, batch=1000):
    blocks = []
    for first in range(0, len(documents), batch):
        stream = []
        for text in documents[first : first + batch]:
            stream += tokenizer(text).input_ids
        while len(stream) >= length:
            blocks.append(stream[:length])
            stream = stream[length:]
    return blocks


def test_packed_blocks_are_the_documents_in_order(source, tokenizer, documents):
    made = make_tokens(tokenizer, source, sampling="packed", length=LENGTH)
    assert made.ids.tolist() == naive_packed(tokenizer, documents, LENGTH)


def test_the_tail_of_every_batch_of_documents_is_dropped(source, tokenizer, documents, monkeypatch):
    monkeypatch.setattr(data, "PACKING_BATCH", 7)
    made = make_tokens(tokenizer, source, sampling="packed", length=LENGTH)
    expected = naive_packed(tokenizer, documents, LENGTH, batch=7)
    assert made.ids.tolist() == expected
    assert len(expected) < len(naive_packed(tokenizer, documents, LENGTH))


def test_the_papers_batches_have_1000_documents():
    assert data.PACKING_BATCH == 1000


@pytest.mark.parametrize("batch", [7, 1000])
def test_without_a_seed_the_first_blocks_are_taken(source, tokenizer, documents, batch, monkeypatch):
    monkeypatch.setattr(data, "PACKING_BATCH", batch)
    made = make_tokens(tokenizer, source, sampling="packed", length=LENGTH, samples=9)
    assert made.ids.tolist() == naive_packed(tokenizer, documents, LENGTH, batch)[:9]


def test_with_a_seed_all_blocks_are_shuffled_before_the_first_are_taken(source, tokenizer, documents):
    expected = naive_packed(tokenizer, documents, LENGTH)
    random.Random(3).shuffle(expected)
    made = make_tokens(tokenizer, source, sampling="packed", length=LENGTH, samples=9, seed=3)
    assert made.ids.tolist() == expected[:9]


def test_documents_are_the_first_of_the_references_training_split(source, tokenizer, documents):
    import datasets

    split = datasets.Dataset.from_dict({"text": documents}).train_test_split(test_size=0.95, seed=42)["train"]["text"]
    assert len(split) == 2
    made = make_tokens(tokenizer, source, sampling="documents", length=LENGTH, samples=30, seed=42)
    for row, text in zip(made.ids[: len(split)].tolist(), split, strict=True):
        ids = tokenizer(text).input_ids[:LENGTH]
        assert row == ids + [data.PADDING] * (LENGTH - len(ids))
    assert len({tuple(row) for row in made.ids.tolist()}) == 30  # beyond the split, the others


def test_documents_without_a_seed_come_in_order_and_those_of_one_token_are_left_out(tmp_path, tokenizer):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("tile mask", "", "river")))
    made = make_tokens(tokenizer, str(path), sampling="documents", length=LENGTH)
    expected = [tokenizer(text).input_ids for text in ("tile mask", "river")]
    assert [[token for token in row if token != data.PADDING] for row in made.ids.tolist()] == expected


class Lazy:
    """Documents as a data set on disk gives them: by slices, never all of them."""

    def __init__(self, documents: list[str]):
        self.documents = documents
        self.read = 0

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: slice) -> list[str]:
        part = self.documents[index]
        assert len(part) <= data.PACKING_BATCH
        self.read += len(part)
        return part


def test_documents_are_read_in_batches_and_no_further_than_needed(tokenizer, documents, monkeypatch):
    monkeypatch.setattr(data, "PACKING_BATCH", 7)
    lazy = Lazy(documents)
    monkeypatch.setattr(data, "read_documents", lambda *_: (lazy, None))
    made = make_tokens(tokenizer, "large", sampling="packed", length=LENGTH, samples=9)
    assert made.ids.tolist() == naive_packed(tokenizer, documents, LENGTH, batch=7)[:9]
    assert lazy.read < len(documents)


def test_a_data_set_of_the_hub_is_not_read_into_memory(tokenizer, documents, monkeypatch):
    import datasets

    table = datasets.Dataset.from_dict({"text": documents, "meta": list(range(len(documents)))})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    found, _ = read_documents("slimpajama", "train")
    assert not isinstance(found, list)
    assert list(found) == documents
    packed = make_tokens(tokenizer, "slimpajama", sampling="packed", length=LENGTH, samples=9)
    assert packed.ids.tolist() == naive_packed(tokenizer, documents, LENGTH)[:9]
    windows = make_tokens(tokenizer, "slimpajama", sampling="windows", length=LENGTH, samples=9, seed=0)
    assert windows.ids.tolist() == naive_windows(tokenizer, documents, LENGTH, 9, seed=0)
    joined = make_tokens(tokenizer, "slimpajama", sampling="joined", length=LENGTH)
    assert joined.ids.flatten().tolist() == tokenizer("\n\n".join(documents)).input_ids[: joined.ids.numel()]


# joined


def test_joined_text_is_tokenised_once_and_the_remainder_dropped(source, tokenizer, documents):
    ids = tokenizer("\n\n".join(documents)).input_ids
    made = make_tokens(tokenizer, source, sampling="joined", length=LENGTH)
    assert made.ids.flatten().tolist() == ids[: len(ids) - len(ids) % LENGTH]
    assert made.ids.shape == (len(ids) // LENGTH, LENGTH)


def test_only_the_first_block_of_joined_text_has_a_bos(source, tokenizer):
    made = make_tokens(tokenizer, source, sampling="joined", length=LENGTH)
    assert made.ids[0, 0] == tokenizer.bos_token_id
    assert (made.ids == tokenizer.bos_token_id).sum() == 1
    assert made.protocol["bos"] is True


def test_fewer_windows_are_the_first_ones(source, tokenizer):
    every = make_tokens(tokenizer, source, sampling="joined", length=LENGTH)
    assert torch.equal(make_tokens(tokenizer, source, sampling="joined", length=LENGTH, samples=3).ids, every.ids[:3])


# all of them


@pytest.mark.parametrize(
    ("sampling", "samples", "split"),
    [("windows", 4, "train"), ("packed", 4, "train"), ("joined", 4, "test"), ("joined", None, "test")],
)
def test_the_protocol_tells_how_the_tokens_came_about(source, tokenizer, sampling, samples, split):
    made = make_tokens(tokenizer, source, sampling=sampling, length=LENGTH, samples=samples, seed=0)
    protocol = dict(made.protocol)
    bos = protocol.pop("bos")
    assert bos == (made.ids[0, 0].item() == 1)
    assert protocol == {
        "source": source,
        "revision": None,
        "split": split,
        "sampling": sampling,
        "length": LENGTH,
        "samples": samples or len(made.ids),
        "complete": samples is None,
        "seed": 0,
        "tokenizer": tokenizer_checksum(tokenizer),
    }


@pytest.mark.parametrize(("sampling", "samples"), [("packed", 10_000), ("joined", 10_000)])
def test_too_little_text_says_how_much_there_is(source, tokenizer, sampling, samples):
    has = len(make_tokens(tokenizer, source, sampling=sampling, length=LENGTH).ids)
    message = rf"holds {has} sequences of {LENGTH} tokens \({sampling}\), 10000 wanted"
    with pytest.raises(PatchError, match=message):
        make_tokens(tokenizer, source, sampling=sampling, length=LENGTH, samples=samples, seed=0)


@pytest.mark.parametrize("sampling", ["packed", "joined", "windows"])
@pytest.mark.parametrize("content", ["", '{"text": "the tile"}\n'])
def test_a_source_with_next_to_nothing_in_it_is_refused(tmp_path, tokenizer, sampling, content):
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(PatchError, match=r"holds 0 sequences of 100 tokens|no document has more than 100 tokens"):
        make_tokens(tokenizer, str(tmp_path / "a.jsonl"), sampling=sampling, length=100, samples=1, seed=0)


# written by the model


def naive_generation(model, first: list[int], length: int, seed: int) -> list[list[int]]:
    """Without a cache: the whole prefix again for every token."""
    generator = torch.Generator().manual_seed(seed)
    torch.randint(0, 2, (len(first), 1), generator=generator)
    ids = torch.tensor(first)[:, None]
    while ids.shape[1] < length:
        shares = model(input_ids=ids).logits[:, -1].softmax(dim=-1)
        ids = torch.cat([ids, torch.multinomial(shares, 1, generator=generator)], dim=1)
    return ids.tolist()


def test_the_model_writes_what_its_own_distribution_gives(tiny_model, architecture):
    model = tiny_model(architecture)
    made = generate_tokens(model, samples=3, length=20, seed=5, batch_size=3, bos=1)
    assert made.ids.dtype == torch.int32
    assert made.ids.tolist() == naive_generation(model, [1, 1, 1], 20, seed=5)


def test_shares_of_the_tokens_are_those_of_the_distribution(tiny_model):
    model = tiny_model("llama", vocab_size=8)
    made = generate_tokens(model, samples=4000, length=2, seed=0, batch_size=1000, bos=1)
    expected = model(input_ids=torch.tensor([[1]])).logits[0, -1].softmax(dim=-1)
    found = made.ids[:, 1].long().bincount(minlength=8) / 4000
    assert torch.allclose(found, expected, atol=0.03)


def test_generated_text_is_the_same_for_a_seed_and_another_for_others(tiny_model):
    def write(**changes):
        return generate_tokens(
            tiny_model(), **({"samples": 5, "length": 9, "seed": 0, "batch_size": 2, "bos": 1} | changes)
        )

    assert torch.equal(write().ids, write().ids)
    assert not torch.equal(write().ids, write(seed=1).ids)
    assert len({tuple(row) for row in write(samples=8).ids.tolist()}) == 8  # of all batches


@pytest.mark.gpu
def test_generated_text_is_the_same_for_a_seed_on_a_gpu(tiny_model):
    model = tiny_model().cuda()
    first, again = (generate_tokens(model, samples=8, length=64, seed=0, batch_size=8, bos=1) for _ in range(2))
    assert torch.equal(first.ids, again.ids)
    assert first.ids.device.type == "cpu"


def test_an_end_of_text_token_ends_nothing(tiny_model):
    model = tiny_model("llama", vocab_size=8)
    made = generate_tokens(model, samples=30, length=30, seed=0, batch_size=30, bos=1)
    ends = (made.ids[:, :-1] == model.config.eos_token_id).any(dim=1)
    assert ends.any()
    assert made.ids.unique().tolist() == list(range(8))


def test_without_a_first_token_the_first_one_is_any(tiny_model):
    model = tiny_model("llama", vocab_size=8)
    made = generate_tokens(model, samples=400, length=2, seed=0, batch_size=400, bos=None)
    counts = made.ids[:, 0].long().bincount(minlength=8)
    assert counts.min() > 20
    assert made.protocol["bos"] is False


def test_the_protocol_of_generated_text_names_the_model_and_the_seed(tiny_model):
    model = tiny_model()
    assert generate_tokens(model, samples=3, length=4, seed=7, batch_size=2, bos=1).protocol == {
        "source": "self",
        "sampling": "generated",
        "length": 4,
        "samples": 3,
        "seed": 7,
        "batch_size": 2,
        "model": content_checksum(model),
        "dtype": "float32",
        "device": "cpu",
        "bos": True,
    }


# sources


@pytest.mark.parametrize("suffix", [".txt", ".json", ".jsonl", ".parquet"])
def test_files_of_all_kinds_give_the_same_documents(tmp_path, suffix):
    texts = ["first one", "naïve 你好\nsecond line", "third"]
    path = tmp_path / f"text{suffix}"
    if suffix == ".txt":
        path.write_text("\n\n".join(texts), encoding="utf-8")
    elif suffix == ".json":
        path.write_text(json.dumps([{"text": text, "id": 1} for text in texts]))
    elif suffix == ".jsonl":
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts) + "\n\n")
    else:
        pd.DataFrame({"id": [1, 2, 3], "text": texts}).to_parquet(path)
    assert read_documents(str(path), "train") == (texts, None)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"body": "no such column"}\n'),
        ("a.jsonl", "not json\n"),
        ("a.jsonl", '"just a string"\n'),
        ("a.jsonl", '{"text": null}\n'),
        ("a.json", '{"text": "not a list"}'),
        ("a.json", "[1, 2]"),
        ("a.json", ""),
        ("a.parquet", "not parquet"),
        ("a.txt", b"\xff\xfe\xfa"),
    ],
)
def test_files_that_cannot_be_read_are_refused_by_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(PatchError, match=rf"text .*{name}: cannot be read .*text column named 'text'"):
        read_documents(str(tmp_path / name), "train")


def test_a_parquet_file_without_the_column_is_refused_by_name(tmp_path):
    pd.DataFrame({"body": ["x"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(PatchError, match=r"a\.parquet: cannot be read .*text column named 'text'"):
        read_documents(str(tmp_path / "a.parquet"), "train")


def test_an_unknown_source_is_told_with_the_known_ones():
    with pytest.raises(PatchError, match=r"text c5: not one of c4, wikitext2, slimpajama, embedded:c4, .* nor a \.txt"):
        read_documents("c5", "train")


def test_a_missing_file_is_told():
    with pytest.raises(PatchError, match=r"text /nowhere/a\.txt: no such file"):
        read_documents("/nowhere/a.txt", "train")


@pytest.mark.parametrize("source", ["embedded:c5", "embedded:"])
def test_an_unknown_embedded_text_is_told_with_the_known_ones(source):
    with pytest.raises(PatchError, match="not embedded; there is embedded:c4, embedded:wikipedia"):
        read_documents(source, "train")


def test_offline_a_data_set_of_the_hub_is_one_line_with_the_way_out(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(PatchError, match=r"data set allenai/c4: not in the local cache .*HF_HUB_OFFLINE=1"):
        read_documents("c4", "train")


# token sets


def test_token_sets_survive_a_round_trip(tmp_path, tokens):
    made = tokens()
    checksum = made.save(tmp_path / "tokens")
    read = TokenSet.load(tmp_path / "tokens")
    assert torch.equal(read.ids, made.ids)
    assert read.ids.dtype == torch.int32
    assert read.protocol == made.protocol
    assert read.checksum == made.checksum == checksum


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_loaded_ids_stay_in_the_file(tmp_path):
    """Large sets are mapped, so that several processes share the pages: loading takes no memory of its own."""
    ids = torch.zeros(2**21, 16, dtype=torch.int32)  # 128 MiB
    TokenSet(ids, {"source": "zeros"}).save(tmp_path / "tokens")
    code = """
import sys
from pathlib import Path
from patch.data import TokenSet

def own_kibibytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

before = own_kibibytes()
tokens = TokenSet.load(sys.argv[1])
print(int(tokens.ids.sum()), own_kibibytes() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "tokens")], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    total, kibibytes = map(int, done.stdout.split())
    assert total == 0
    assert kibibytes < 16 * 1024


def test_the_checksum_is_that_of_the_file_whatever_the_type_in_memory(tmp_path, tokens):
    made = tokens()
    wide = TokenSet(made.ids.long(), made.protocol)
    assert wide.save(tmp_path / "tokens") == wide.checksum == made.checksum


def test_an_altered_token_set_is_refused(tmp_path, tokens):
    tokens().save(tmp_path / "tokens")
    content = bytearray((tmp_path / "tokens").read_bytes())
    content[-2] ^= 1
    (tmp_path / "tokens").write_bytes(content)
    with pytest.raises(PatchError, match="tokens: its checksum does not match"):
        TokenSet.load(tmp_path / "tokens")


def test_a_truncated_token_set_is_refused(tmp_path, tokens):
    tokens().save(tmp_path / "tokens")
    (tmp_path / "tokens").write_bytes((tmp_path / "tokens").read_bytes()[:-10])
    with pytest.raises(PatchError, match="tokens: truncated"):
        TokenSet.load(tmp_path / "tokens")


def test_a_missing_token_set_is_told(tmp_path):
    with pytest.raises(PatchError, match="no such file"):
        TokenSet.load(tmp_path / "tokens")


def test_ids_beyond_the_vocabulary_are_refused(tokens):
    made = tokens()
    largest = int(made.ids.max())
    made.check_vocabulary(largest + 1)
    with pytest.raises(PatchError, match=f"tokens of random: id {largest} does not exist .* vocabulary of {largest}"):
        made.check_vocabulary(largest)
