"""An HSA model from a pretrained checkpoint of a Llama-like model in the format of Hugging Face.

Embedding, window attention, MLPs and norms are those of the checkpoint. The chunk encoder and the
HSA layers are new, and the output projections of the HSA layers are 0. So at first the model
computes what the checkpoint computes with a sliding window in every layer. For texts within one
window, this is what the checkpoint itself computes. `rope` translates its rotary positions.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from hsa_mini.checkpoint.tensors import is_finite
from hsa_mini.checkpoint.weights import CONFIG, INDEX, WEIGHTS
from hsa_mini.checks import check_integer, quoted
from hsa_mini.config import HSAConfig
from hsa_mini.files.reading import read_json
from hsa_mini.hsa_model import HSAModel
from hsa_mini.integrations.companions import read_companions
from hsa_mini.integrations.rope import read_rope

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen3ForCausalLM")
WITH_QK_NORM = ["Qwen3ForCausalLM"]
# Options of a checkpoint that an HSA model does not have must have these values.
REQUIRED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "quantization_config": None,
}
DTYPES = ("F64", "F32", "F16", "BF16")  # as safetensors calls them
# Weights of the HSA model, and those of the checkpoint that make them up. Where there are two, the
# rows of the second one stand below those of the first.
OF_MODEL = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
OF_BLOCK = {
    "swa_norm": ("input_layernorm",),
    "swa.qkv.q": ("self_attn.q_proj",),
    "swa.qkv.k": ("self_attn.k_proj",),
    "swa.qkv.v": ("self_attn.v_proj",),
    "swa.qkv.q_norm": ("self_attn.q_norm",),
    "swa.qkv.k_norm": ("self_attn.k_norm",),
    "swa.out": ("self_attn.o_proj",),
    "mlp_norm": ("post_attention_layernorm",),
    "mlp.up_and_gate": ("mlp.up_proj", "mlp.gate_proj"),
    "mlp.down": ("mlp.down_proj",),
}


@dataclass(frozen=True)
class Source:
    """A checkpoint that can be converted: the configuration of the HSA model, and the file of each
    weight of the checkpoint by its name. companions: see `read_companions`. query_scale: see
    `Rope`.
    """

    config: HSAConfig
    files: dict[str, Path]
    companions: dict[str, str]
    query_scale: float


def read_source(
    folder: Path,
    *,
    window: int,
    chunk_size: int,
    top_k: int,
    groups: int = 1,
    lower_layers: int | None = None,
) -> Source:
    """Check everything about a checkpoint but the values of its weights.

    window, chunk_size, top_k and groups: as in `HSAConfig`. lower_layers: how many layers become
    the lower decoder (None: half of them, and what the groups leave over).

    Raises ValueError for an unknown architecture, for an option of the checkpoint that an HSA model
    does not have, for weights that are no safetensors, unless the weights fit the checkpoint's
    configuration, and for a tokenizer that does not fit the weights.
    """
    if not (folder / CONFIG).is_file():
        raise ValueError(
            f"folder: got {folder} without {CONFIG}, accepted is a checkpoint's folder"
        )
    values = read_json(folder / CONFIG)
    options: dict[str, Any] = dict(window=window, chunk_size=chunk_size, top_k=top_k, groups=groups)
    sizes = _sizes(values)
    check_integer("head_dim", sizes["head_dim"], 1)
    rope = read_rope(values, sizes["head_dim"])
    sizes |= dict(rope_base=rope.base, rope_factors=rope.factors)
    config = HSAConfig(**options, **sizes, **_layers(values, groups, lower_layers))
    companions = read_companions(folder, values)
    source = Source(config, _files(folder), companions, rope.query_scale)
    _check_weights(folder, source)
    return source


def convert(source: Source, *, seed: int = 0) -> HSAModel:
    """The HSA model, in the dtype of the checkpoint's embedding. seed: of the new weights.

    Raises ValueError for weights that are NaN or infinite.
    """
    dtype = _read(source, "model.embed_tokens.weight").dtype
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HSAModel(source.config, dtype=dtype)
    for name, weight in tqdm(model.state_dict().items(), unit=" weights", delay=1):
        if names := _made_of(name, source.config):
            weight.copy_(torch.cat([_read(source, part) for part in names]))
            if name.endswith(
                ".swa.qkv.q_norm.weight" if source.config.qk_norm else ".swa.qkv.q.weight"
            ):
                weight *= source.query_scale
        elif name.endswith(".hsa.out.weight"):
            weight.zero_()
    return model.eval().requires_grad_(False)


def _sizes(values: dict[str, Any]) -> dict[str, Any]:
    """The fields of `HSAConfig` that a checkpoint decides, without those of `_layers`."""
    architectures = values.get("architectures")
    if architectures not in [[name] for name in ARCHITECTURES]:
        accepted = ", ".join(ARCHITECTURES)
        raise ValueError(
            f"architectures: got {quoted(architectures)}, accepted is one of {accepted}"
        )
    for name, required in REQUIRED.items():
        if (got := values.get(name, required)) != required:
            raise ValueError(f"{name}: got {quoted(got)}, accepted is {required}")
    width, heads = _integers(values, "hidden_size", "num_attention_heads")
    vocab_size, mlp_width = _integers(values, "vocab_size", "intermediate_size")
    head_dim = values.get("head_dim") or width // heads
    return dict(
        vocab_size=vocab_size,
        width=width,
        mlp_width=mlp_width,
        heads=heads,
        kv_heads=values.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        hsa_heads=heads,
        hsa_kv_heads=1,
        hsa_head_dim=head_dim,
        retrieval_dim=min(width, 256),
        retrieval_norm=True,
        qk_norm=architectures == WITH_QK_NORM,
        tied=values.get("tie_word_embeddings", False),
        norm_eps=values.get("rms_norm_eps", 1e-6),
    )


def _layers(values: dict[str, Any], groups: int, lower_layers: int | None) -> dict[str, Any]:
    """The layers of the lower decoder and of each group of the upper one."""
    (layers,) = _integers(values, "num_hidden_layers")
    lower = layers // 2 if lower_layers is None else lower_layers
    if lower_layers is None:
        lower += (layers - lower) % groups
    if not 0 < lower < layers or (layers - lower) % groups:
        raise ValueError(
            f"lower_layers: got {lower} with {groups} groups above, accepted are numbers that "
            f"divide {layers} layers: at least one below, and equally many in each group"
        )
    return dict(lower_layers=lower, layers_per_group=(layers - lower) // groups)


def _integers(values: dict[str, Any], *names: str) -> list[int]:
    """Sizes of a checkpoint. `HSAConfig` checks the upper bounds."""
    for name in names:
        check_integer(name, values.get(name), 1)
    return [values[name] for name in names]


def _files(folder: Path) -> dict[str, Path]:
    """The file of each weight, from the safetensors files that the folder's index names."""
    files = {WEIGHTS}
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX).get("weight_map")
        files = set(map(str, index.values())) if isinstance(index, dict) else set()
    if not files or not all(
        Path(file).name == file and (folder / file).is_file() for file in files
    ):
        raise ValueError(f"folder: {folder} lacks weights, accepted are {WEIGHTS} or {INDEX}")
    found: dict[str, Path] = {}
    for file in sorted(files):
        try:
            with safe_open(folder / file, framework="pt") as weights:
                found |= dict.fromkeys(weights.keys(), folder / file)
        except SafetensorError as error:
            raise ValueError(f"{folder / file}: cannot be read ({quoted(str(error))})") from None
    return found


def _check_weights(folder: Path, source: Source) -> None:
    """Raise ValueError unless all weights of the HSA model that are not new are there, in their
    shapes, and no others.
    """
    config = source.config
    unused = {name for name in source.files if not name.endswith("rotary_emb.inv_freq")}
    unused -= {"lm_head.weight"} if config.tied else set()
    for name, weight in HSAModel(config, device="meta").state_dict().items():
        names = _made_of(name, config)
        if lacking := sorted(set(names) - source.files.keys()):
            raise ValueError(f"folder: {folder} lacks the weight {lacking[0]}")
        unused -= set(names)
        for part in names:  # equally many rows of each
            expected = [len(weight) // len(names), *weight.shape[1:]]
            with safe_open(source.files[part], framework="pt") as weights:
                stored = weights.get_slice(part)
                got = stored.get_shape()
                dtype = stored.get_dtype()
            if got != expected:
                raise ValueError(f"folder: {folder}: got {part} {got}, accepted is {expected}")
            if dtype not in DTYPES:
                raise ValueError(
                    f"folder: {folder}: got {part} in {dtype}, accepted are weights that are not "
                    f"quantised: {', '.join(DTYPES)}"
                )
    if unused:
        raise ValueError(
            f"folder: {folder} has the weight {quoted(min(unused))}, for which there is no place"
        )


def _read(source: Source, name: str) -> torch.Tensor:
    with safe_open(source.files[name], framework="pt") as weights:
        value = weights.get_tensor(name)
    if not is_finite(value):
        raise ValueError(f"{source.files[name]}: {name} is not a tensor of finite numbers")
    return value


def _made_of(name: str, config: HSAConfig) -> list[str]:
    """The weights of the checkpoint that make up a weight of the HSA model; none if it is new."""
    name = name.removesuffix(".weight")
    decoder, _, rest = name.partition(".")
    if decoder in ("lower", "upper"):
        i, _, rest = rest.partition(".")
        layer = int(i) + (config.lower_layers if decoder == "upper" else 0)
        return [f"model.layers.{layer}.{part}.weight" for part in OF_BLOCK.get(rest, ())]
    tied_head = name == "head" and config.tied
    return [f"{OF_MODEL[name]}.weight"] if name in OF_MODEL and not tied_head else []
