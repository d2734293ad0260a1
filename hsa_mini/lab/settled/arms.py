"""The arms of the second round: other mechanisms, other chunks and landmarks, and full attention by
two accounts of its parameters.

Sizes are given for the scales "lab" and "settled", where the baseline has chunks of 32 tokens and
keeps 8 of them.

NOTE: no arm of the first round but `text_crowd` sees chunks of other sequences, so `hsa` is the arm
without them, and `cross_batch` the one with. Both upper blocks of `hsa` have an HSA layer, so `hsa`
is also the arm with HSA in every upper block, and `half_hsa` the one without.
"""

from hsa_mini.lab import changes, variants
from hsa_mini.lab.arms import Arm
from hsa_mini.lab.changes import ConfigChange
from hsa_mini.lab.mechanisms import dash, hils, landmarks
from hsa_mini.lab.scales import Scale
from hsa_mini.training.recipes import Stage

# The paper's 0.5 B model has 537.7 M parameters, and the one without HSA 519.6 M.
PAPERS_SHARE = 519.6 / 537.7


def chunks(numerator: int, denominator: int) -> ConfigChange:
    """Chunks this many times as long as the baseline's, at equal tokens read."""
    return lambda scale: {
        "chunk_size": scale.config.chunk_size * numerator // denominator,
        "top_k": scale.config.top_k * denominator // numerator,
    }


def few_chunks(scale: Scale) -> dict:
    return {"top_k": scale.config.top_k // 4 or 1}


def overlapping(scale: Scale) -> dict:
    """Chunks of the same length, twice as many, at equal tokens read."""
    return {"chunk_size": scale.config.chunk_size // 2}


def landmarks_of(count: int) -> ConfigChange:
    """Room for this many landmarks of the baseline's size in each chunk."""
    return lambda scale: {"retrieval_dim": count * scale.config.retrieval_dim}


def half_hsa(scale: Scale) -> dict:
    return {
        "groups": scale.config.groups // 2,
        "layers_per_group": 2 * scale.config.layers_per_group,
    }


def more_heads(scale: Scale) -> dict:
    return {"hsa_kv_heads": 2 * scale.config.hsa_kv_heads, "retrieval_heads": 1}


def more_retrieval_heads(scale: Scale) -> dict:
    return more_heads(scale) | {"retrieval_heads": 2 * scale.config.hsa_kv_heads}


def behind_queue(scale: Scale, stage: Stage) -> dict:
    """Stages at the full training length have a queue of chunks of other sequences."""
    queue = changes.text_behind_queue(scale, stage)
    return {key: queue[key] for key in ("queue_chunks", "gumbel_noise") if key in queue}


_ARMS = (
    Arm(
        "hils",
        "HiLS: no encoder, landmarks estimate the attention mass of their chunks, one softmax with"
        " the window",
        hils.HiLS, changes=hils.sizes,
    ),
    Arm(
        "dash_attention",
        "DashAttention: no encoder, entmax chooses as many chunks as it needs, its weights are the"
        " prior of one softmax over the tokens of window and chunks",
        dash.DashAttention, changes=dash.sizes,
    ),
    Arm("half_chunks", "chunks of 16 tokens, 16 of them kept", changes=chunks(1, 2)),
    Arm("double_chunks", "chunks of 64 tokens, 4 of them kept", changes=chunks(2, 1)),
    Arm(
        "two_landmarks", "two landmarks for each chunk; the better one counts",
        landmarks.TwoLandmarks, changes=landmarks_of(2),
    ),
    Arm(
        "four_landmarks", "four landmarks for each chunk; the best one counts",
        landmarks.FourLandmarks, changes=landmarks_of(4),
    ),
    Arm(
        "overlapping", "a chunk of 32 tokens begins every 16 tokens",
        landmarks.Overlapping, changes=overlapping,
    ),
    Arm("half_hsa", "an HSA layer in every second upper block only", changes=half_hsa),
    Arm(
        "more_heads", "twice as many key/value heads in HSA, which choose chunks together",
        changes=more_heads,
    ),
    Arm(
        "more_retrieval_heads", "as more_heads, and each of them chooses chunks by itself",
        changes=more_retrieval_heads,
    ),
    Arm(
        "landmark_temperature",
        "queries and landmarks of one length, a learned temperature instead of their gains",
        landmarks.Tempered,
    ),
    Arm(
        "cross_batch",
        "in the last stage also chunks of other sequences, as many as a long text has",
        training=behind_queue,
    ),
    Arm("few_k", "2 chunks are kept, in training and evaluation", changes=few_chunks),
    Arm(
        "few_k_full", "training keeps every chunk, evaluation keeps 2",
        changes=few_chunks, training=changes.every_chunk,
    ),
    Arm(
        "text_window_16x", "as text, with a window as long as a sequence",
        changes=changes.window(16), training=changes.text_only,
    ),
    Arm(
        "text_window", "as window, trained on plain text only", variants.WithoutHSA,
        changes=changes.without_hsa, training=changes.text_only,
    ),
    Arm(
        "text_full_rope_same_mlp",
        "as text_full_rope, with MLPs as wide as those of HSA, so with fewer parameters",
        variants.WithoutHSA,
        changes=changes.full_attention, training=changes.text_in_full_attention,
        counted="mlp_width",
    ),
    Arm(
        "text_full_rope_paper",
        "as text_full_rope; HSA has 3.5% more parameters, as in the paper",
        variants.WithoutHSA,
        changes=changes.full_attention, training=changes.text_in_full_attention,
        share=PAPERS_SHARE,
    ),
    Arm(
        "text_hils", "as hils, trained on plain text only",
        hils.HiLS, changes=hils.sizes, training=changes.text_only,
    ),
    Arm(
        "text_dash_attention", "as dash_attention, trained on plain text only",
        dash.DashAttention, changes=dash.sizes, training=changes.text_only,
    ),
)  # fmt: skip
SETTLED_ARMS = {arm.name: arm for arm in _ARMS}
