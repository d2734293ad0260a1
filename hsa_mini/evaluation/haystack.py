"""A text that is encoded once and then answers many questions.

A question's sentences overwrite some tokens. Only the chunks whose K, V and landmarks change are
encoded again: those that hold such a token, and those that the lower decoder's windows carry the
change to. This is exact: tests compare it with encoding every sample from scratch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch

from hsa_mini.hsa_model import HSAModel
from hsa_mini.inference.generate import Generation, continue_from
from hsa_mini.inference.prefill import SEGMENT, segment_tokens
from hsa_mini.memory.chunk_memory import ChunkMemory
from hsa_mini.model.core import Aux, Output


class Placed(Protocol):
    """A problem placed in a text. patches: (first token, ids) of every sentence and, last, of the
    question. They overwrite the text.
    """

    @property
    def patches(self) -> tuple[tuple[int, np.ndarray], ...]:
        """All that overwrites the text."""
        ...


class Haystack:
    """A text that is encoded once and then answers many questions.

    text: int64 [T] on the model's device. progress: called with the number of tokens, as they are
    read. memory: one that has read this text already; it is then not read again.
    """

    def __init__(
        self,
        model: HSAModel,
        text: torch.Tensor,
        progress: Callable[[int], object] | None = None,
        *,
        memory: ChunkMemory | None = None,
    ) -> None:
        self.model = model
        self.text = text
        if memory is not None:
            self.memory = memory
            return
        self.memory = ChunkMemory(model.config, reserve_tokens=len(text) + SEGMENT)
        with torch.no_grad():
            for part in text[None].split(segment_tokens(text[None]), dim=1):
                model.append_chunks(model.lower_decoder(part, self.memory), self.memory)
                if progress:
                    progress(part.shape[1])

    @torch.no_grad()
    def ask(
        self, sample: Placed, *, answer_tokens: int, remembered: Placed | None = None
    ) -> Generation:
        """Put the sample's sentences and question into the text, answer greedily, and take them out
        again.

        remembered: a sample whose sentences the memory holds instead of those of `sample`. Of
        `sample`, the model then reads only what stands in the last tokens. Afterwards text and
        memory are as they were before, even if an exception or Ctrl-C ends the question.
        """
        with self.read(sample, remembered=remembered) as output:
            return continue_from(self.model, output, max_new_tokens=answer_tokens)

    @contextmanager
    def read(self, sample: Placed, *, remembered: Placed | None = None) -> Iterator[Output]:
        """Inside the `with` block, which must not record gradients, the model has read the text
        with the sample in it. Arguments and afterwards: as in `ask`.
        """
        with self._remembered(remembered or sample):
            with self._written(sample):
                output = self._read_tail()
            yield output

    @contextmanager
    def _written(self, sample: Placed) -> Iterator[None]:
        """Inside the `with` block, the sample's sentences and question stand in the text."""
        places = np.concatenate(
            [np.arange(first, first + len(patch)) for first, patch in sample.patches]
        )
        patches = np.concatenate([patch.astype(np.int64) for _, patch in sample.patches])
        places, patches = (torch.from_numpy(x).to(self.text.device) for x in (places, patches))
        before = self.text[places]
        try:
            self.text[places] = patches
            yield
        finally:
            self.text[places] = before

    @contextmanager
    def _remembered(self, sample: Placed) -> Iterator[None]:
        """Inside the `with` block, the memory holds the chunks of the text with this sample."""
        replaced: list[tuple[int, tuple[torch.Tensor, ...]]] = []
        try:
            with self._written(sample):
                for first, last in self._touched(sample):
                    encoded = self._encode(first, last)
                    # The copy is made before the memory changes. Otherwise an interruption in
                    # between could not be undone.
                    replaced.append((first, self.memory.chunks.copy(first, last)))
                    self.memory.chunks.replace(first, *encoded)
            yield
        finally:
            self._restore(replaced)

    def _restore(self, replaced: list[tuple[int, tuple[torch.Tensor, ...]]]) -> None:
        """Write the replaced chunks back into the memory, even if Ctrl-C interrupts this."""
        try:
            for first, chunks in replaced:
                self.memory.chunks.replace(first, *chunks)
        except KeyboardInterrupt:
            self._restore(replaced)
            raise

    def _touched(self, sample: Placed) -> list[tuple[int, int]]:
        """The ranges of complete chunks [first, last) that the patches change. Adjoining ranges are
        merged, and long ones are cut.
        """
        S = self.model.config.chunk_size
        reach = self.model.config.lower_reach
        ranges: list[list[int]] = []
        for start, patch in sorted(sample.patches, key=lambda patch: patch[0]):
            first = start // S
            last = min(-(-(start + len(patch) + reach) // S), len(self.memory.chunks))
            if ranges and first <= ranges[-1][1]:
                ranges[-1][1] = max(last, ranges[-1][1])
            elif first < last:
                ranges.append([first, last])
        most = max(SEGMENT // S, 1)
        return [
            (i, min(i + most, last)) for first, last in ranges for i in range(first, last, most)
        ]

    def _encode(self, first: int, last: int) -> tuple[torch.Tensor, ...]:
        """k, v and landmarks of the chunks [first, last)."""
        S = self.model.config.chunk_size
        hidden, _ = self._lower_decoder(first * S, last * S)
        encoded = self.model.encoder(hidden.unflatten(1, (last - first, S)))
        return encoded.k, encoded.v, encoded.landmarks

    def _read_tail(self) -> Output:
        """The upper decoder over the last tokens, with the caches that decoding needs."""
        model = self.model
        total = len(self.text)
        unfinished = total % model.config.chunk_size
        first = model.config.tail_start(total)
        hidden, draft = self._lower_decoder(min(first, total - unfinished), total)
        draft.resume(hidden[:, hidden.shape[1] - unfinished :], total)
        hidden, retrievals = model.upper_decoder(hidden[:, -(total - first) :], draft)
        return Output(model.logits(hidden[:, -1:]), draft, Aux(retrievals))

    def _lower_decoder(self, first: int, last: int) -> tuple[torch.Tensor, ChunkMemory]:
        """The lower decoder's output for the tokens [first, last), and a draft of the memory after
        them. Reading starts `lower_reach` tokens earlier, so the output is exact.
        """
        start = max(first - self.model.config.lower_reach, 0)
        draft = self.memory.draft(start)
        hidden = self.model.lower_decoder(self.text[None, start:last], draft)
        return hidden[:, first - start :], draft
