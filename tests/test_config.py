"""HSAConfig: refused values, JSON written and read back, derived sizes."""

import dataclasses
import json

import pytest

from hsa_mini import PRESETS, HSAConfig

DEBUG = PRESETS["debug"]
AT_LEAST_ONE = (
    "vocab_size width lower_layers groups layers_per_group mlp_width window heads kv_heads "
    "head_dim chunk_size top_k hsa_heads hsa_kv_heads hsa_head_dim retrieval_dim "
    "retrieval_heads query_block"
).split()


@pytest.mark.parametrize(
    "name, value, accepted",
    [
        *((name, 0, "at least 1") for name in AT_LEAST_ONE),
        ("encoder_layers", -1, "at least 1"),
        ("encoder_mlp_width", -1, "at least 0"),
        ("experts", -1, "at least 0"),
        ("width", 32.0, "integer"),
        ("window", True, "integer"),
        ("top_k", "2", "integer"),
        ("heads", 3, "multiples of kv_heads"),
        ("hsa_heads", 5, "multiples of hsa_kv_heads"),
        ("head_dim", 15, "even"),
        ("retrieval_heads", 3, "1 and hsa_kv_heads (2)"),
        ("weighting", "sigmoid", "softmax and stick_breaking and newest_match"),
        ("residual", "skip", "add and bypass"),
        ("query_block", 3, "divisors of chunk_size"),
        ("experts", 4, "1 to experts (4)"),
    ],
)
def test_errors_name_the_field_what_was_given_and_what_is_accepted(name, value, accepted):
    kv_heads = {"kv_heads": 2} if name == "heads" else {}
    with pytest.raises(ValueError) as caught:
        dataclasses.replace(DEBUG, **{name: value}, **kv_heads)
    message = str(caught.value)
    # With experts=4 the error names the field that is missing.
    named = "experts_active" if (name, value) == ("experts", 4) else name
    assert message.startswith(f"{named}: got ") and accepted in message.partition("accepted ")[2]
    assert named != name or repr(value) in message


@pytest.mark.parametrize(
    "changes",
    [
        dict(query_block=4, exclude_window=True, window=6),
        dict(experts=4, experts_active=5, expert_width=8),
        dict(experts=4, experts_active=2, expert_width=0),
    ],
)
def test_fields_that_do_not_fit_together_are_refused(changes):
    with pytest.raises(
        ValueError,
        match="^query_block: got 4" if "query_block" in changes else "^experts_active: got",
    ):
        dataclasses.replace(DEBUG, **changes)


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name):
    config = PRESETS[name]
    assert HSAConfig.from_json(config.to_json()) == config
    assert json.loads(config.to_json()) == dataclasses.asdict(config)


def test_json_without_a_default_s_key_takes_the_default():
    values = {
        key: value
        for key, value in dataclasses.asdict(DEBUG).items()
        if key not in ("tied", "weighting")
    }
    assert HSAConfig.from_json(json.dumps(values)) == DEBUG


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda values: values | {"chunk": 3}, "'chunk'"),
        (lambda values: {key: value for key, value in values.items() if key != "width"}, "'width'"),
        (lambda values: [values], "list"),
        (lambda values: values | {"width": "wide"}, "width: got 'wide'"),
    ],
    ids=["unknown key", "missing key", "no object", "wrong value"],
)
def test_wrong_json_is_refused_by_name(change, named):
    with pytest.raises(ValueError, match=named):
        HSAConfig.from_json(json.dumps(change(dataclasses.asdict(DEBUG))))


def test_a_config_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DEBUG.width = 64


def test_every_preset_has_the_paper_s_ratios_where_it_prints_them():
    large = PRESETS["ul_8b_a1b"]
    assert (large.experts, large.experts_active, large.hsa_heads // large.hsa_kv_heads) == (
        64,
        4,
        16,
    )
    for config in (large, PRESETS["ul_0_5b"]):
        assert (config.window, config.chunk_size) == (4096, 64)
        assert config.lower_layers == config.upper_layers  # the lower decoder is half of the blocks
    assert large.upper_tail == 57_331
