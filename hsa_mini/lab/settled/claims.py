"""The claims of the second round: the first round's again, after longer training, and new ones.

The rule of a verdict is that of `lab.claims`. Where the values of two compared arms overlap, three
seeds may be too few: `touching` names these arms, which then get five.
"""

from collections.abc import Iterable

from hsa_mini.lab.claims import (
    CLAIMS,
    FAR,
    NEAR,
    ClaimFinding,
    Measure,
    Spread,
    make_claim,
)

MORE_SEEDS = 5  # where the values of two arms overlap
CROWDED = Measure("crowded", 16)
CROWDED_FAR = Measure("crowded", FAR)
_S = Measure("s_niah", FAR)
_MQ = Measure("mq_niah", FAR)
_MQ_NEAR = Measure("mq_niah", NEAR)
_PERPLEXITY = Measure("perplexity", NEAR)
_PERPLEXITY_4X = Measure("perplexity", 4)

NEW_CLAIMS = (
    make_claim(
        "HiLS",
        "chunks weighed by their estimated attention mass, in one softmax with the window, predict"
        " text better than HSA and retrieve further than DashAttention",
        ("text_hils", "text", _PERPLEXITY), ("hils", "dash_attention", _S),
        other_arms=("hsa", "text_dash_attention", "text_full_rope"),
        other_measures=(_MQ, CROWDED, _PERPLEXITY_4X),
    ),
    make_claim(
        "DashAttention",
        "chunks that entmax chooses, as many as a query needs, beat a fixed number of selected"
        " chunks",
        ("dash_attention", "concatenated", _MQ_NEAR), ("dash_attention", "mean_key", _MQ_NEAR),
        other_arms=("hsa", "hils"), other_measures=(_S, _MQ, CROWDED),
    ),
    make_claim(
        "chunk size", "smaller chunks find more, at equal tokens read",
        ("half_chunks", "hsa", CROWDED), ("hsa", "double_chunks", CROWDED),
        other_measures=(CROWDED_FAR, _MQ, _PERPLEXITY),
    ),
    make_claim(
        "landmarks", "several landmarks find more needles in a chunk than one",
        ("two_landmarks", "hsa", CROWDED), ("four_landmarks", "hsa", CROWDED),
        other_measures=(CROWDED_FAR, _MQ, _PERPLEXITY),
    ),
    make_claim(
        "overlap", "overlapping chunks find more than chunks whose borders cut needles",
        ("overlapping", "hsa", CROWDED),
        other_arms=("half_chunks",), other_measures=(CROWDED_FAR, _MQ, _PERPLEXITY),
    ),
    make_claim(
        "HSA layers", "an HSA layer in every upper block beats one in every second",
        ("hsa", "half_hsa", _MQ), other_measures=(CROWDED, _PERPLEXITY),
    ),
    make_claim(
        "retrieval heads", "key/value heads that choose by themselves beat those that share chunks",
        ("more_retrieval_heads", "more_heads", _MQ),
        other_arms=("hsa",), other_measures=(CROWDED, _PERPLEXITY),
    ),
    make_claim(
        "temperature", "a learned temperature on cosines finds more than gains on both sides",
        ("landmark_temperature", "hsa", CROWDED), other_measures=(CROWDED_FAR, _MQ, _PERPLEXITY),
    ),
    make_claim(
        "cross-batch chunks",
        "a model that chose among chunks of other sequences in training finds needles further away",
        ("cross_batch", "hsa", _MQ), other_measures=(_S, CROWDED, CROWDED_FAR, _PERPLEXITY),
    ),
    make_claim(
        "few chunks", "with 2 chunks kept, retrieval needs sparse training",
        ("few_k", "few_k_full", _S), other_arms=("hsa", "full_k"), other_measures=(_MQ, CROWDED),
    ),
    make_claim(
        "plain text",
        "at four times the training length HSA predicts plain text better than full attention, by"
        " any account of the parameters",
        ("text_window_4x", "text_full_rope", _PERPLEXITY_4X),
        ("text_window_4x", "text_full_rope_same_mlp", _PERPLEXITY_4X),
        ("text_window_4x", "text_full_rope_paper", _PERPLEXITY_4X),
        other_arms=("text", "text_window_16x", "text_hils", "text_dash_attention"),
        other_measures=(_PERPLEXITY,),
    ),
    make_claim(
        "retrieval in plain text", "HSA predicts plain text better than its window alone",
        ("text", "text_window", _PERPLEXITY),
        other_arms=("text_window_4x",), other_measures=(_PERPLEXITY_4X,),
    ),
)  # fmt: skip
SETTLED_CLAIMS = CLAIMS + NEW_CLAIMS


def touching(findings: Iterable[ClaimFinding]) -> list[str]:
    """The arms that need `MORE_SEEDS` seeds, because they overlap with an arm that they are
    compared with.
    """
    arms: dict[str, None] = {}
    for finding in findings:
        for comparison in finding.claim.comparisons:
            both = (comparison.better, comparison.worse)
            found = finding.numbers[comparison.by]
            if all(arm in found for arm in both) and _overlap(*(found[arm] for arm in both)):
                arms |= dict.fromkeys(arm for arm in both if len(found[arm].values) < MORE_SEEDS)
    return list(arms)


def _overlap(one: Spread, other: Spread) -> bool:
    return one.low <= other.high and other.low <= one.high
