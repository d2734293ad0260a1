"""A text that is encoded once and then answers many questions.

For each question only those chunks are encoded again that its sentences change, directly or through
the reach of the lower decoder. This is exact: tests compare it with encoding every sample from
scratch.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from hsa_mini.hsa_model import HSAModel
from hsa_mini.inference.generate import Generation, continue_from
from hsa_mini.inference.prefill import SEGMENT
from hsa_mini.memory.chunk_memory import ChunkMemory
from hsa_mini.model.core import Aux, Output
from hsa_mini.tasks.placement import Sample


class Haystack:
    """A text whose chunks are encoded once, and then asked many questions: text int64 [T] on the
    model's device.
    """

    def __init__(
        self, model: HSAModel, text: torch.Tensor, progress: Callable[[int], None] | None = None
    ) -> None:
        self.model = model
        self.text = text
        self.memory = ChunkMemory(model.config, reserve_tokens=len(text) + SEGMENT)
        with torch.no_grad():
            for part in text[None].split(SEGMENT, dim=1):
                model.read(part, self.memory)
                if progress:
                    progress(part.shape[1])

    @torch.no_grad()
    def ask(
        self, sample: Sample, *, answer_tokens: int, remembered: Sample | None = None
    ) -> Generation:
        """Put the sample's sentences and question into the text, answer greedily, and take them out
        again.

        remembered: the memory holds this sample's sentences instead; the sample's own are read only
        in the last tokens.
        """
        remembered = remembered or sample
        with self._written(remembered):
            undo = [self._encode_again(first, last) for first, last in self._touched(remembered)]
        with self._written(sample):
            output = self._read_tail()
        generation = continue_from(self.model, output, max_new_tokens=answer_tokens)
        for first, chunks in undo:
            self.memory.replace(first, *chunks)
        return generation

    @contextmanager
    def _written(self, sample: Sample) -> Iterator[None]:
        """As long as this lasts the text is the sample's."""
        places = np.concatenate(
            [np.arange(first, first + len(patch)) for first, patch in sample.patches]
        )
        fresh = np.concatenate([patch.astype(np.int64) for _, patch in sample.patches])
        places, fresh = (torch.from_numpy(x).to(self.text.device) for x in (places, fresh))
        before = self.text[places]
        self.text[places] = fresh
        yield
        self.text[places] = before

    def _touched(self, sample: Sample) -> Iterable[tuple[int, int]]:
        """Ranges of complete chunks [first, last) that the patches reach, merged where they meet,
        cut where they are long.
        """
        S = self.model.config.chunk_size
        reach = self.model.config.lower_reach
        ranges: list[list[int]] = []
        for start, patch in sorted(sample.patches, key=lambda patch: patch[0]):
            first = start // S
            last = min(-(-(start + len(patch) + reach) // S), self.memory.chunks)
            if ranges and first <= ranges[-1][1]:
                ranges[-1][1] = max(last, ranges[-1][1])
            elif first < last:
                ranges.append([first, last])
        most = max(SEGMENT // S, 1)
        return [
            (i, min(i + most, last)) for first, last in ranges for i in range(first, last, most)
        ]

    def _encode_again(self, first: int, last: int) -> tuple[int, tuple[torch.Tensor, ...]]:
        S = self.model.config.chunk_size
        hidden, _ = self._lower(first * S, last * S)
        return first, self.memory.replace(
            first, *self.model.encoder(hidden.unflatten(1, (last - first, S)))
        )

    def _read_tail(self) -> Output:
        """The upper decoder over the last tokens, with the caches that decoding needs."""
        model = self.model
        total = len(self.text)
        unfinished = total % model.config.chunk_size
        first = model.config.tail_start(total)
        hidden, branch = self._lower(min(first, total - unfinished), total)
        branch.partial = hidden[:, hidden.shape[1] - unfinished :]
        branch.position = total
        hidden, retrievals = model.look_up(hidden[:, -(total - first) :], first, branch)
        return Output(model.predict(hidden[:, -1:]), branch, Aux(retrievals))

    def _lower(self, first: int, last: int) -> tuple[torch.Tensor, ChunkMemory]:
        """The lower decoder's output for tokens [first, last), from as far back as it depends on."""
        branch = self.memory.branch()
        branch.position = max(first - self.model.config.lower_reach, 0)
        branch.lower, branch.upper = [None] * len(branch.lower), [None] * len(branch.upper)
        branch.block_queries = [None] * len(branch.block_queries)
        hidden = self.model.lower_decoder(self.text[None, branch.position : last], branch)
        return hidden[:, first - branch.position :], branch
