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
        *((name, 0, "from 1 to") for name in AT_LEAST_ONE),
        ("encoder_layers", -1, "from 1 to"),
        ("encoder_mlp_width", -1, "from 0 to"),
        ("experts", -1, "from 0 to"),
        ("width", 32.0, "integer"),
        ("window", True, "integer"),
        ("top_k", "2", "integer"),
        ("heads", 3, "multiples of kv_heads"),
        ("hsa_heads", 5, "multiples of hsa_kv_heads"),
        ("head_dim", 15, "even"),
        ("retrieval_heads", 3, "1 and hsa_kv_heads (2)"),
        ("weighting", "sigmoid", "softmax and stick_breaking"),
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


WRONG = (None, "x", "1", "false", [1], {"a": 1}, float("nan"), float("inf"), -1, 10**30, 10**5000)
WRONG_TYPES = {int: (True, 2.0), float: (True,), bool: (0, 1, 1.0), str: (True, 1)}
WRONG_TYPES[tuple[float, ...]] = ((1.0,) * 7, ("x",) * 8, (float("nan"),) * 8, (2.0,) * 8, 1, True)


@pytest.mark.parametrize("field", dataclasses.fields(HSAConfig), ids=lambda field: field.name)
def test_every_field_has_a_type_and_bounds(field):
    for value in (*WRONG, *WRONG_TYPES[field.type], [[[["x" * 99] * 99] * 99] * 99] * 99):
        with pytest.raises(ValueError, match=f"^{field.name}: got .*, accepted ") as caught:
            dataclasses.replace(DEBUG, **{field.name: value})
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


@pytest.mark.parametrize(
    "sizes",
    [
        dict(lower_layers=10**6),
        dict(encoder_layers=10**6),
        dict(groups=1000, layers_per_group=1000),
        dict(vocab_size=1 << 24, width=1 << 24),
        dict(mlp_width=1 << 24, width=1 << 20),
        dict(heads=1 << 20, head_dim=1 << 20),
        dict(hsa_heads=1 << 20, hsa_head_dim=1 << 20),
        dict(retrieval_dim=1 << 24, width=1 << 16),
        dict(experts=1 << 20, experts_active=1, expert_width=1 << 20),
        dict(window=1 << 24, kv_heads=64, heads=64),
        dict(chunk_size=1 << 24, width=1 << 10),
        dict(top_k=10**6),
    ],
    ids=str,
)
def test_sizes_with_an_absurd_product_are_refused(sizes):
    """A hostile configuration would otherwise take hours to count, or all memory."""
    with pytest.raises(ValueError, match=r"^\w+: got \d+(, \w+=\d+)*, accepted is an? ") as caught:
        dataclasses.replace(DEBUG, **sizes)
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name):
    config = PRESETS[name]
    assert HSAConfig.from_dict(json.loads(config.to_json())) == config
    assert json.loads(config.to_json(), object_hook=with_tuples) == dataclasses.asdict(config)


def with_tuples(values: dict) -> dict:
    return {name: tuple(x) if isinstance(x, list) else x for name, x in values.items()}


def test_json_without_a_default_s_key_takes_the_default():
    values = {
        key: value
        for key, value in dataclasses.asdict(DEBUG).items()
        if key not in ("tied", "weighting")
    }
    assert HSAConfig.from_dict(values) == DEBUG


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
        HSAConfig.from_dict(change(dataclasses.asdict(DEBUG)))


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
