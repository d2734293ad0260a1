"""Which bytes a process receives from others in a training step.

    weights    all-gathers before each part of the model computes, in the forward and backward pass
    gradients  reduce-scatters of float32 after each part's backward pass
    experts    tokens travel to the experts that they chose, and back
    halo       the keys and values of the W-1 tokens in front of a part, in every block
    memory     the chunk memory that all HSA layers share, once a row, and its gradient

The sums of a few numbers (counts, norms) are left out.
"""

from dataclasses import dataclass
from itertools import chain

from hsa_mini.training.scale.shares import TrainingRun, gathered

COUNT_BYTES = 8  # of an integer in the table of how many tokens go to each expert
GRADIENT_BYTES = 4
KINDS = ("weights", "gradients", "experts", "halo", "memory")
OVERLAPPED = ("weights", "gradients")  # they travel while other parts of the model compute


@dataclass(frozen=True)
class Transfer:
    """What a process receives in a step.

    kind: one of `KINDS`. processes: of the group that exchanges. stride: the distance of two
    neighbours of the group, in ranks. messages: the number of collectives.
    """

    kind: str
    processes: int
    stride: int
    messages: int
    bytes: int


def traffic(run: TrainingRun) -> list[Transfer]:
    """All transfers of a step, as a process with neighbours on both sides sees them. Experts are
    assumed to receive equally many tokens. Nothing is left for a mesh of one process.
    """
    transfers = [*_weights(run), _experts(run), _halo(run), _memory(run)]
    return [found for found in transfers if found.processes > 1 and found.bytes]


def bytes_by_kind(transfers: list[Transfer]) -> dict[str, int]:
    """Kind -> bytes that a process receives in a step."""
    return {kind: sum(t.bytes for t in transfers if t.kind == kind) for kind in KINDS}


def _weights(run: TrainingRun) -> list[Transfer]:
    found = []
    for group in chain.from_iterable(gathered(run.config, run.sizes)):
        stride = run.sizes.ep if group.own else 1
        others = run.rows * (group.processes - 1) * group.numbers
        for kind, passes, size in (
            ("weights", group.gathers, run.item_bytes),
            ("gradients", 1, GRADIENT_BYTES),
        ):
            messages = passes * run.rows
            found.append(Transfer(kind, group.processes, stride, messages, passes * others * size))
    return found


def passes(run: TrainingRun) -> int:
    """How often a block's exchange happens in a row: forward, recomputed, backward."""
    return 3 if run.checkpoint_blocks else 2


def moe_layers(run: TrainingRun) -> int:
    """Blocks with experts: all but the first."""
    config = run.config
    return config.lower_layers - 1 + config.upper_layers if config.experts else 0


def _experts(run: TrainingRun) -> Transfer:
    config = run.config
    P = run.sizes.ep
    layers = run.rows * moe_layers(run)
    rows = 2 * passes(run) * run.part * config.experts_active * config.width * run.item_bytes
    counts = (passes(run) - 1) * config.experts * COUNT_BYTES
    messages = (3 * passes(run) - 1) * layers
    return Transfer("experts", P, 1, messages, layers * (rows + counts) * (P - 1) // P)


def _halo(run: TrainingRun) -> Transfer:
    """What crosses the border between two parts; a process inside has two, and a way through each:
    it receives keys and values from one side and gradients from the other.
    """
    config = run.config
    layers = config.lower_layers + config.upper_layers
    tokens = min(config.window - 1, run.tokens - run.part)
    size = 2 * config.kv_heads * config.head_dim * run.item_bytes
    messages = passes(run) * layers * run.rows
    return Transfer("halo", run.sizes.cp, run.sizes.ep, messages, messages * tokens * size)


def memory_numbers(run: TrainingRun, chunks: int) -> int:
    """Numbers of the keys, values and landmarks of `chunks` chunks."""
    config = run.config
    keys = 2 * config.chunk_size * config.hsa_kv_heads * config.hsa_head_dim
    return chunks * (keys + config.retrieval_heads * config.retrieval_dim)


def _memory(run: TrainingRun) -> Transfer:
    chunks = -(-(run.tokens // run.config.chunk_size) // run.sizes.cp)  # of the largest part
    others = run.rows * (run.sizes.cp - 1) * memory_numbers(run, chunks)
    size = others * (run.item_bytes + GRADIENT_BYTES)
    return Transfer("memory", run.sizes.cp, run.sizes.ep, 6 * run.rows, size)


def ring_bytes(run: TrainingRun) -> int:
    """What a process would receive if every block attended to all tokens: the keys and values of
    all other parts, in the forward pass, recomputed, and in the backward pass with their gradients.
    """
    config = run.config
    layers = config.lower_layers + config.upper_layers
    size = 2 * config.kv_heads * config.head_dim * run.item_bytes
    return (passes(run) + 1) * run.rows * layers * (run.tokens - run.part) * size
