"""A causal LM as lm-evaluation-harness sees it, with the scoring of answers done by the batch.

The harness takes every answer's log-probabilities off the device by itself, some ten small kernels and three waits per
answer, and tokenises one text after the other, which cost a small model more than its forward passes. Here a batch is
scored in a few kernels and read back once, equal inputs are computed once, whatever the length of the answers after
them, and texts are tokenised together. The numbers are the harness's, computed and rounded in the same precision.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from torch.nn.utils.rnn import pad_sequence

from patch.artefacts import PatchError


class CausalScorer(HFLM):
    """`HFLM` for the log-likelihoods of answers; without progress bars, which fill log files."""

    _known: Mapping[str, list[int]] = {}
    """Tokens of texts that are tokenised already."""

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self._known = self._tokenised([request.args for request in requests])
        try:
            return super().loglikelihood(requests, disable_tqdm=True)
        finally:
            self._known = {}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        if add_special_tokens is None and not options and string in self._known:
            return self._known[string]
        return super().tok_encode(string, add_special_tokens, **options)

    def _tokenised(self, pairs: list[tuple[str, str]]) -> dict[str, list[int]]:
        """What the harness will ask for of contexts and answers; texts that begin with BOS it treats by itself."""
        wanted = dict.fromkeys(
            text for context, answer in pairs if context for text in (context.rstrip(), context + answer)
        )
        bos = self.tokenizer.decode(self.prefix_token_id)
        texts = [text for text in wanted if text and not text.startswith(bos)]
        if not texts:
            return {}
        special = {} if self.add_bos_token is None else {"add_special_tokens": self.add_bos_token}
        return dict(zip(texts, self.tokenizer(texts, return_attention_mask=False, **special)["input_ids"], strict=True))

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """An answer's log-probability, and whether greedy decoding gives it.

        requests: both texts, the context's tokens and the answer's. A context loses its first tokens where the whole is
        too long for the model. Raises PatchError for an answer that alone is.
        """
        answers_of: dict[tuple[int, ...], list[tuple[int, list[int]]]] = defaultdict(list)
        for number, (_, context, answer) in enumerate(requests):
            if len(answer) > self.max_length:
                raise PatchError(
                    f"question {number}: its answer of {len(answer)} tokens is longer than the model's "
                    f"{self.max_length}, so it cannot be scored."
                )
            tokens = (context + answer)[-(self.max_length + 1) :]
            answers_of[tuple(tokens[:-1])].append((number, answer))
        inputs = sorted(answers_of, key=lambda tokens: (-len(tokens), tokens))  # the most memory first
        scores: dict[int, tuple[float, bool]] = {}
        size = override_bs or int(self.batch_size)
        for first in range(0, len(inputs), size):
            batch = inputs[first : first + size]
            scores |= self._score(batch, [answers_of[tokens] for tokens in batch])
        return [scores[number] for number in range(len(requests))]

    def _score(
        self, inputs: list[tuple[int, ...]], answers: list[list[tuple[int, list[int]]]]
    ) -> dict[int, tuple[float, bool]]:
        """inputs: one row of the batch each. answers: those that end each input, with the numbers of their requests."""
        logits = self._model_call(
            pad_sequence([torch.tensor(tokens) for tokens in inputs], batch_first=True).to(self.device)
        )
        places = [
            (row, len(tokens) - len(answer) + i, token)
            for row, (tokens, ended) in enumerate(zip(inputs, answers, strict=True))
            for _, answer in ended
            for i, token in enumerate(answer)
        ]
        rows, positions, targets = torch.tensor(places).to(self.device).unbind(1)
        log_probabilities = torch.log_softmax(logits[rows, positions], -1, dtype=self.softmax_dtype)
        greedy = log_probabilities.argmax(-1) == targets
        chosen = log_probabilities.gather(1, targets[:, None]).squeeze(1)
        numbered = [answer for ended in answers for answer in ended]
        lengths = [len(answer) for _, answer in numbered]
        return {
            number: (float(values.sum()), bool(hits.all()))
            for (number, _), values, hits in zip(
                numbered, chosen.cpu().split(lengths), greedy.cpu().split(lengths), strict=True
            )
        }
