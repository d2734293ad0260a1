"""The model `hsa` of lm-eval. The part that several texts begin with is read only once.

Importing this module registers it: `lm_eval.simple_evaluate(model="hsa", model_args={"pretrained":
"mini"}, ...)`. It needs the extra `eval`.

Dimensions: T tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from hsa_mini.checks import quoted
from hsa_mini.data.encoder import checkpoint_encoder
from hsa_mini.data.tokenizer import SPECIAL_TOKENS, end_of_text, load_tokenizer
from hsa_mini.hsa_model import HSAModel
from hsa_mini.inference.generate import stream
from hsa_mini.inference.prefill import SEGMENT, prefill
from hsa_mini.memory.chunk_memory import ChunkMemory

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import (
        handle_stop_sequences,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
except ImportError as error:
    raise ImportError(
        f"lm-eval: {error}; accepted is an environment with `pip install 'hsa-mini[eval]'`"
    ) from None

MAX_SCORED = 1024  # tokens whose logits [T, V] are held at once
SAMPLING = ("temperature", "top_k", "top_p")  # as `Decoding` names them
OTHER_OPTIONS = {"do_sample", "until", "max_gen_toks"}


class HSALM(TemplateLM):
    """A model for lm-eval that answers each question from a fork of the memory of its text.

    It reads one text at a time, of any length, and truncates none. A request is an `Instance` of
    lm-eval. longest: tokens of the longest text of the last call.
    """

    def __init__(
        self,
        pretrained: HSAModel | str | Path,
        *,
        device: torch.device | str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        """pretrained: a model, or what `HSAModel.from_pretrained` takes. device: of a model that is
        loaded (default: a GPU if there is one). lm-eval passes the batch sizes; they are not used.

        Raises ValueError for a folder with a tokenizer of its own.
        """
        super().__init__()
        if not isinstance(pretrained, HSAModel):
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
            if not checkpoint_encoder(pretrained).is_default:
                raise ValueError(
                    f"pretrained: {pretrained} has a tokenizer of its own, accepted is a model for "
                    "the tokenizer of this project (lm-eval's own model `hf` accepts the others)"
                )
            pretrained = HSAModel.from_pretrained(pretrained, device=device)
        self.model = pretrained
        self._device = next(pretrained.parameters()).device
        self.tokenizer = load_tokenizer()
        self.longest = 0

    @property
    def eot_token_id(self) -> int:
        """The id of the token that ends every document. An empty text is continued after it."""
        return end_of_text(self.tokenizer)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs
    ) -> list[int]:
        """The tokens of a text. Special tokens are never added or recognised."""
        return self.tokenizer.encode_ordinary(string)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs,
    ) -> list[tuple[float, bool]]:
        """For each (texts, context, continuation): the log-likelihood of the continuation in nats,
        and whether it is the greedy one. That of no tokens is 0.
        """
        results = [(0.0, True)] * len(requests)
        scored = [i for i, request in enumerate(requests) if request[2]]
        texts = [np.array([*requests[i][1], *requests[i][2]][:-1]) for i in scored]
        targets = [torch.tensor(requests[i][2], device=self._device) for i in scored]
        forks = self._forks(texts, [len(target) for target in targets], disable_tqdm)
        for place, memory, ids in forks:
            results[scored[place]] = self._score(memory, ids, targets[place])
        return results

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """The log-likelihood of each whole text in nats, its first token after the end of another
        document.
        """
        whole = [
            ((request.args[0], ""), [self.eot_token_id], self.tok_encode(request.args[0]))
            for request in requests
        ]
        return [likelihood for likelihood, _ in self._loglikelihood_tokens(whole, disable_tqdm)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each text up to its first stop string, the end of the document, or
        `max_gen_toks` tokens. Raises ValueError for an option that this model does not know.
        """
        options = [dict(normalize_gen_kwargs(request.args[1])) for request in requests]
        for known in options:
            if unknown := known.keys() - OTHER_OPTIONS - set(SAMPLING):
                accepted = ", ".join(sorted(OTHER_OPTIONS | set(SAMPLING)))
                raise ValueError(
                    f"generation_kwargs: got {quoted(min(unknown))}, accepted are {accepted}"
                )
        texts = [
            np.array(self.tok_encode(request.args[0]) or [self.eot_token_id])
            for request in requests
        ]
        answers = [""] * len(requests)
        for i, memory, ids in self._forks(texts, [1] * len(texts), disable_tqdm):
            answers[i] = self._continue(memory, ids, options[i], seed=i)
        return answers

    def _forks(
        self, texts: list[np.ndarray], own: list[int], disable_tqdm: bool
    ) -> Iterator[tuple[int, ChunkMemory, torch.Tensor]]:
        """For each text, in an order of this function's: its index, a memory that has read its
        first tokens, and ids [1, T] of the others, which include the last own[i] ones.

        Use a memory before the next one is made: all of them write into the same buffers.
        """
        self.longest = max(map(len, texts), default=0)
        total = sum(map(len, texts))
        empty = ChunkMemory(self.model.config)
        dtype = self.model.memory_dtype(self._device)
        # What `prefill` will ask for: then no fork has to copy the chunks.
        empty.reserve(self.longest + SEGMENT, batch=1, dtype=dtype, device=self._device)
        bases = [empty]  # each has read more of the current text than the one before it
        with tqdm(
            total=total, unit=" tokens", unit_scale=True, delay=1, disable=disable_tqdm
        ) as bar:
            for i, shared in shared_beginnings(texts, own):
                before = bar.n
                ids = torch.from_numpy(texts[i].astype(np.int64))[None].to(self._device)
                if shared - bases[-1].position >= self.model.config.chunk_size:
                    longer = bases[-1].fork()
                    part = ids[:, longer.position : shared]
                    prefill(self.model, part, longer, progress=bar.update)
                    bases.append(longer)
                yield i, bases[-1].fork(), ids[:, bases[-1].position :]
                bar.update(before + len(texts[i]) - bar.n)
                while bases[-1].position > shared:
                    bases.pop()

    def _score(
        self, memory: ChunkMemory, ids: torch.Tensor, targets: torch.Tensor
    ) -> tuple[float, bool]:
        """The log-likelihood of targets [n], which the last n tokens of ids [1, T] predict, and
        whether each of them is the likeliest token.
        """
        parts = targets.split(MAX_SCORED)
        sizes = [len(part) for part in parts]
        sizes[0] += ids.shape[1] - len(targets)
        loss = 0.0
        greedy = True
        for part, wanted in zip(ids.split(sizes, dim=1), parts):
            logits = prefill(self.model, part, memory, last=len(wanted)).logits[0]
            loss += cross_entropy(logits.double(), wanted, reduction="sum").item()
            greedy = greedy and bool((logits.argmax(dim=-1) == wanted).all())
        return -loss, greedy

    def _continue(self, memory: ChunkMemory, ids: torch.Tensor, options: dict, seed: int) -> str:
        """What follows ids [1, T] after what the memory has read, before the first stop string."""
        until = handle_stop_sequences(options["until"], eos=SPECIAL_TOKENS[0])
        sampling = {name: options[name] for name in SAMPLING if name in options}
        tokens: list[int] = []
        text = ""
        for token in stream(
            self.model,
            ids,
            memory=memory,
            max_new_tokens=options["max_gen_toks"],
            seed=seed,
            **sampling,
        ):
            tokens.append(int(token))
            text = self.tokenizer.decode(tokens)
            if any(stop and stop in text for stop in until):
                break
        return postprocess_generated_text(text, until, think_end_token=None)


register_model("hsa")(HSALM)  # as a decorator it would hide the type


def shared_beginnings(texts: list[np.ndarray], own: list[int]) -> Iterator[tuple[int, int]]:
    """Every text's index, in the order of their tokens, and how many of its first tokens the text
    after it begins with, the last own[i] tokens of each text not counted.
    """
    # Of big-endian numbers, the order of the bytes is that of the numbers.
    order = sorted(range(len(texts)), key=lambda i: texts[i].astype(">u4").tobytes())
    for i, following in zip(order, [*order[1:], None]):
        if following is None:
            yield i, 0
            return
        one, other = (texts[j][: len(texts[j]) - own[j]] for j in (i, following))
        most = min(len(one), len(other))
        different = np.flatnonzero(one[:most] != other[:most])
        yield i, int(different[0]) if len(different) else most
