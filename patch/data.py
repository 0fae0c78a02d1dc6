"""Token sets: calibration, training and perplexity text as token ids, made once and read by every method.

Documented sampling, one per purpose (sources: WANDA `lib/data.py`, SLIM `slim/data.py`, PATCH `patch/data.py`):

* "windows" (calibration of the papers): draw documents at random, with replacement, until one has more
  than `length` tokens; take a random window of it. `random.Random(seed)`, calls in the papers' order.
* "packed": concatenate documents and cut into blocks of `length`. With a seed the blocks are shuffled and
  the first `samples` kept (calibration from little text); without, they stay in order (training: packed
  within batches of 1000 documents, the tail of each batch dropped).
* "documents" (ProxSparse): one per sequence, cut after `length` tokens and padded up to there, in the order in which
  amazon-science/ProxSparse draws them (with seed 42, the same ones).
* "joined" (perplexity): join all documents with a blank line, tokenise once, cut into blocks in order and
  drop the remainder, so only the first block holds a BOS token.
* "generated" (training where there is no other text): what the dense model itself writes, `generate_tokens`.

Large sources stay on disk: documents are read in batches, and packing needs no more memory than its result.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from patch import embedded
from patch.artefacts import PatchError, checksum_tensors, read_tensors, write_tensors
from patch.hub import first_line, hub_access
from patch.models import content_checksum, tokenizer_checksum, vocabulary_size
from patch.progress import track

SCHEMA = "patch.tokens/1"
SELF = "self"
"""The source of text that the dense model writes."""
PACKING_BATCH = 1000
PADDING = -1
"""In the place of a token id after the end of a document."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubText:
    """A text data set on the hub, pinned to the files that the papers read."""

    repository: str
    split: str
    column: str = "text"
    name: str | None = None
    files: str | None = None


# name: the data sets for calibration or training ("train") and for perplexity ("test")
HUB_TEXTS = {
    "c4": {
        "train": HubText("allenai/c4", "train", files="en/c4-train.00000-of-01024.json.gz"),
        "test": HubText("allenai/c4", "train", files="en/c4-validation.00000-of-00008.json.gz"),
    },
    "wikitext2": {
        "train": HubText("Salesforce/wikitext", "train", name="wikitext-2-raw-v1"),
        "test": HubText("Salesforce/wikitext", "test", name="wikitext-2-raw-v1"),
    },
    "slimpajama": {
        "train": HubText("DKYoon/SlimPajama-6B", "train"),
        "test": HubText("DKYoon/SlimPajama-6B", "test"),
    },
}


@dataclass(frozen=True)
class TokenSet:
    """Token ids with the story of how they came about."""

    ids: Tensor
    """int32 [sequences, length]; PADDING after the end of documents that are shorter."""
    protocol: dict[str, Any]
    """source, revision, split, sampling, length, samples, complete (all that the text holds), seed, tokenizer
    (checksum), bos; of generated text source, sampling, length, samples, seed, batch_size, model (checksum), dtype,
    device, bos."""

    def save(self, path: Path | str) -> str:
        """Write atomically; returns the checksum of the ids."""
        return write_tensors(path, {"ids": self.ids.to(torch.int32)}, SCHEMA, self.protocol)

    @classmethod
    def load(cls, path: Path | str) -> TokenSet:
        """The ids stay in the file and are read from there when they are used, so processes share them.

        Raises PatchError for a missing, truncated, altered or foreign file.
        """
        tensors, protocol, _ = read_tensors(path, SCHEMA)
        return cls(tensors["ids"], protocol)

    @property
    def checksum(self) -> str:
        return checksum_tensors({"ids": self.ids.to(torch.int32)})

    def check_vocabulary(self, size: int) -> None:
        """Raise PatchError when an id does not exist in a vocabulary of `size`."""
        if int(self.ids.max()) >= size:
            raise PatchError(
                f"tokens of {self.protocol['source']}: id {int(self.ids.max())} does not exist in the model's "
                f"vocabulary of {size}; they were made with another model's tokenizer, prepare them again."
            )


def make_tokens(
    tokenizer: PreTrainedTokenizerBase,
    source: str,
    *,
    sampling: str,
    length: int,
    samples: int | None = None,
    seed: int | None = None,
    split: str | None = None,
) -> TokenSet:
    """Tokenise `samples` sequences of `length` from `source` (see the module's docstring for `sampling`).

    source: a name of HUB_TEXTS, "embedded:c4", "embedded:wikipedia", or a .txt, .json(l) or .parquet file.
    samples: None for all that the text holds (not for "windows"). split: "train", or "test" for perplexity.
    Raises PatchError when the source cannot be read or holds too little text.
    """
    samplers = {"windows": _windows, "packed": _packed, "documents": _documents, "joined": _joined}
    if sampling not in samplers:
        raise PatchError(f"sampling {sampling!r}: choose one of {', '.join(samplers)}.")
    split = split or ("test" if sampling == "joined" else "train")
    documents, revision = read_documents(source, split)
    ids = samplers[sampling](tokenizer, documents, length, samples, seed)
    if len(ids) < (samples or 1):
        raise PatchError(
            f"text {source}: holds {len(ids)} sequences of {length} tokens ({sampling}), "
            f"{samples or 'at least 1'} wanted; ask for fewer or shorter ones, or use more text."
        )
    log.info("%s: %d sequences of %d tokens", source, *ids.shape)
    protocol = {
        "source": source,
        "revision": revision,
        "split": split,
        "sampling": sampling,
        "length": length,
        "samples": len(ids),
        "complete": samples is None,
        "seed": seed,
        "tokenizer": tokenizer_checksum(tokenizer),
        "bos": bool(tokenizer.bos_token_id is not None and ids[0, 0] == tokenizer.bos_token_id),
    }
    return TokenSet(ids, protocol)


@torch.no_grad()
def generate_tokens(
    model: PreTrainedModel, *, samples: int, length: int, seed: int, batch_size: int, bos: int | None
) -> TokenSet:
    """Let the model write `samples` sequences of `length` tokens, on the device where it is.

    Every token is drawn from the model's own distribution (temperature 1, nothing cut off). A sequence starts with
    the token `bos`, or where that is None with one that is drawn evenly from the vocabulary. The end-of-text token
    ends nothing: what the model writes after it is another document, as in packed text.
    batch_size: sequences written at a time; other sizes give other text. The same on the same kind of device.
    """
    generator = torch.Generator(model.device).manual_seed(seed)
    ids = torch.empty(samples, length, dtype=torch.int32)
    for batch in track(ids.split(batch_size), "writing text, batch", log):
        low, high = (0, vocabulary_size(model)) if bos is None else (bos, bos + 1)
        first = torch.randint(low, high, (len(batch), 1), generator=generator, device=model.device)
        batch.copy_(_continued(model, first, length, generator))
    protocol = {
        "source": SELF,
        "sampling": "generated",
        "length": length,
        "samples": samples,
        "seed": seed,
        "batch_size": batch_size,
        "model": content_checksum(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "bos": bos is not None,
    }
    return TokenSet(ids, protocol)


def _continued(model: PreTrainedModel, first: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """int64 [batch, length] that starts with the tokens `first`, [batch, 1]."""
    tokens, cache = [first], None
    while len(tokens) < length:
        output = model(input_ids=tokens[-1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        shares = output.logits[:, -1].float().softmax(dim=-1)
        tokens.append(torch.multinomial(shares, 1, generator=generator))
    return torch.cat(tokens, dim=1)


def read_documents(source: str, split: str) -> tuple[Sequence[str], str | None]:
    """The documents of a source in their order, and the revision of its data set on the hub, if it is there.

    Those of the hub stay on disk and are read when they are asked for.
    """
    check_source(source)
    if source.startswith(embedded.PREFIX):
        return embedded.documents(source, split), None
    if source in HUB_TEXTS:
        return _hub_documents(HUB_TEXTS[source][split])
    path = Path(source).expanduser()
    try:
        documents = _file_documents(path)
        if any(not isinstance(text, str) for text in documents):
            raise TypeError("a document's text is not a string")
        return documents, None
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise PatchError(
            f"text {source}: cannot be read ({first_line(error)}); JSON and Parquet need a text column named 'text'."
        ) from None


def check_source(source: str) -> None:
    """Raise PatchError unless `source` names a text of the hub, an embedded one, or a file that is there."""
    if source in HUB_TEXTS or source.startswith(embedded.PREFIX):
        return
    path = Path(source).expanduser()
    if source == "ptb":
        raise PatchError(
            "text ptb: its data set on the hub is a script, which `datasets` no longer runs, and its licence is the "
            "LDC's; use wikitext2, or give your copy as a .txt file."
        )
    if path.suffix not in (".txt", ".json", ".jsonl", ".parquet"):
        known = [*HUB_TEXTS, *(embedded.PREFIX + name for name in embedded.TEXTS)]
        raise PatchError(f"text {source}: not one of {', '.join(known)}, nor a .txt, .json, .jsonl or .parquet file.")
    if not path.is_file():
        raise PatchError(f"text {source}: no such file.")


def _hub_documents(text: HubText) -> tuple[Sequence[str], str | None]:
    import datasets
    from huggingface_hub import HfApi

    with hub_access(f"data set {text.repository}"):
        # datasets' own check of split sizes fails when only some of the files are asked for
        loaded = datasets.load_dataset(
            text.repository,
            text.name,
            split=text.split,
            data_files={text.split: text.files} if text.files else None,
            verification_mode="no_checks" if text.files else None,
        )
        try:
            revision = HfApi().dataset_info(text.repository).sha
        except Exception:  # offline, from the cache: the data are what they are, their revision is not known
            revision = None
    return loaded[text.column], revision


def _file_documents(path: Path) -> list[str]:
    if path.suffix == ".txt":
        return [part for part in path.read_text().split("\n\n") if part.strip()]
    if path.suffix == ".parquet":
        import pandas as pd

        return list(pd.read_parquet(path, columns=["text"])["text"])
    if path.suffix == ".jsonl":
        return [json.loads(line)["text"] for line in path.read_text().splitlines() if line.strip()]
    return [document["text"] for document in json.loads(path.read_text())]


def _windows(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], length: int, samples: int | None, seed: int | None
) -> Tensor:
    if samples is None:
        raise PatchError("sampling 'windows' draws with replacement and needs the number of samples.")
    # An unlucky source must not loop for ever. Bytes, with what the tokenizer adds, bound tokens from above.
    added = tokenizer.num_special_tokens_to_add()
    if not any(len(tokenizer(text).input_ids) > length for text in documents if len(text.encode()) + added > length):
        raise PatchError(
            f"no document has more than {length} tokens, as sampling 'windows' needs; use 'packed' or a shorter length."
        )
    generator = random.Random(seed)
    windows: list[list[int]] = []
    while len(windows) < samples:
        ids = tokenizer(documents[generator.randint(0, len(documents) - 1)]).input_ids
        if len(ids) > length:
            start = generator.randint(0, len(ids) - length - 1)
            windows.append(ids[start : start + length])
    return torch.tensor(windows, dtype=torch.int32)


def _packed(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], length: int, samples: int | None, seed: int | None
) -> Tensor:
    blocks: Iterable[Tensor] = _blocks(tokenizer, documents, length)
    if seed is not None or samples is None:
        blocks = every = list(blocks)
        samples = samples or len(every)
        if seed is not None:
            random.Random(seed).shuffle(every)
    ids = torch.empty(samples, length, dtype=torch.int32)
    count = 0
    for block in track(itertools.islice(blocks, samples), "packing, sequence", log, total=samples):
        ids[count] = block
        count += 1
    return ids[:count]


def _documents(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], length: int, samples: int | None, seed: int | None
) -> Tensor:
    # The reference: datasets' `train_test_split(test_size=0.95, seed=42)`, of whose training part it takes the first.
    order = np.arange(len(documents))
    if seed is not None:
        order = np.roll(np.random.default_rng(seed).permutation(order), -math.ceil(0.95 * len(order)))
    rows: list[Tensor] = []
    for index in order:
        ids = tokenizer(documents[int(index)]).input_ids[:length]
        if len(ids) > 1:  # of one token there is nothing to predict
            rows.append(torch.tensor(ids + [PADDING] * (length - len(ids)), dtype=torch.int32))
        if len(rows) == samples:
            break
    return torch.stack(rows) if rows else torch.empty(0, length, dtype=torch.int32)


def _blocks(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], length: int) -> Iterator[Tensor]:
    """Blocks of packed documents in order, int32 [length] each, without the tail of every batch of documents."""
    for batch in _batches(documents, PACKING_BATCH):
        ids = torch.tensor([token for text in tokenizer(batch).input_ids for token in text], dtype=torch.int32)
        yield from ids[: len(ids) // length * length].view(-1, length)


def _joined(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], length: int, samples: int | None, seed: int | None
) -> Tensor:
    ids = torch.tensor(tokenizer("\n\n".join(documents)).input_ids, dtype=torch.int32)
    return ids[: len(ids) // length * length].view(-1, length)[:samples]


def _batches(items: Sequence[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
