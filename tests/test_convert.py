"""A converted model computes what the pretrained one does with a sliding window in every layer.

Dimensions: T tokens, W=16 window, S=4 chunk size.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import assert_close, call
from safetensors.torch import load_file, save_file

from hsa_mini import HSAModel
from hsa_mini.integrations.convert import convert, read_source

transformers = pytest.importorskip("transformers")
from hsa_mini.integrations.huggingface import HSAForCausalLM, fast_tokenizer  # noqa: E402

W = 16
SIZES = dict(
    vocab_size=4096, hidden_size=48, num_hidden_layers=4, intermediate_size=80, head_dim=16,
    num_attention_heads=4, num_key_value_heads=2, rms_norm_eps=1e-5, rope_theta=5e3,
    bos_token_id=4094, eos_token_id=4094,
)  # fmt: skip
OPTIONS = dict(window=W, chunk_size=4, top_k=2)
ROPE = dict(rope_theta=5e3)
LLAMA3 = dict(
    ROPE, rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=64,
)  # fmt: skip
YARN = dict(ROPE, rope_type="yarn", factor=8.0, original_max_position_embeddings=256)
WORDS = ("--window", "16", "--chunk-size", "4", "--top-k", "2")


def pretrained(kind: str, folder: Path, dtype=torch.float32, **changes) -> torch.nn.Module:
    """Save a random model of transformers and a tokenizer, and return the model with a window of W
    tokens in every layer.
    """
    torch.manual_seed(0)
    if kind == "Qwen3":
        layers = dict(layer_types=["sliding_attention"] * 4, use_sliding_window=True)
        changes = dict(sliding_window=W, **layers) | changes
    config = getattr(transformers, f"{kind}Config")(**(SIZES | changes))
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:  # the gains of norms
                parameter.normal_(1.0, 0.2)
            elif "embed" not in name:
                parameter *= 4  # so that attention is far from uniform
    model.save_pretrained(folder)
    fast_tokenizer().save_pretrained(folder)
    if kind != "Llama":
        return model
    config = transformers.MistralConfig(**(SIZES | changes), sliding_window=W)
    windowed = transformers.MistralForCausalLM(config).to(dtype).eval()
    windowed.load_state_dict(model.state_dict())
    assert torch.equal(windowed(ids(W)).logits, model(ids(W)).logits)  # Llama itself, in one window
    return windowed


def ids(tokens: int) -> torch.Tensor:
    return torch.randint(4096, (2, tokens), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "kind, changes, options",
    [
        ("Llama", {}, {}),
        ("Llama", dict(tie_word_embeddings=True, num_hidden_layers=5), dict(groups=2)),
        ("Mistral", dict(sliding_window=W, num_key_value_heads=4), dict(lower_layers=1, groups=3)),
        ("Qwen3", {}, dict(groups=2)),
        ("Llama", dict(rope_parameters=dict(ROPE, rope_type="linear", factor=4.0)), {}),
        ("Llama", dict(rope_parameters=LLAMA3), {}),
        ("Mistral", dict(sliding_window=W, rope_parameters=YARN), dict(groups=2)),
        ("Qwen3", dict(rope_parameters=YARN | dict(truncate=False, beta_slow=2.0)), {}),
        ("Qwen3", dict(rope_parameters=YARN | dict(mscale=0.7, mscale_all_dim=1.2)), {}),
    ],
)
@torch.no_grad()
def test_outputs_are_those_of_the_window_attention_model(tmp_path, kind, changes, options):
    oracle = pretrained(kind, tmp_path, **changes)
    model = convert(read_source(tmp_path, **OPTIONS, **options))
    text = ids(90)
    assert_close(model(text).logits, oracle(text).logits, 1e-5)
    new = oracle.generate(text, max_new_tokens=30, do_sample=False, eos_token_id=None)[:, 90:]
    assert torch.equal(model.generate(text, max_new_tokens=30).ids, new)
    assert model.config.qk_norm == (kind == "Qwen3")


def test_shards_and_dtype_of_the_checkpoint(tmp_path):
    oracle = pretrained("Llama", tmp_path / "a", torch.bfloat16)
    oracle.save_pretrained(tmp_path / "b", max_shard_size=200_000)
    fast_tokenizer().save_pretrained(tmp_path / "b")
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    whole, shards = (convert(read_source(tmp_path / name, **OPTIONS), seed=1) for name in "ab")
    assert len([*(tmp_path / "b").glob("*.safetensors")]) > 2
    assert {p.dtype for p in shards.parameters()} == {torch.bfloat16}
    assert_close(shards.state_dict(), whole.state_dict(), 0.0)
    other = convert(read_source(tmp_path / "a", **OPTIONS), seed=2)
    same = {
        name
        for name, value in other.state_dict().items()
        if torch.equal(value, whole.state_dict()[name])
    }
    assert "upper.0.swa.qkv.q.weight" in same and "encoder.k.weight" not in same


def test_new_weights_learn_from_the_first_step_on(tmp_path):
    pretrained("Llama", tmp_path)
    model = convert(read_source(tmp_path, **OPTIONS)).requires_grad_(True).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    unmoved = set()
    for _ in range(2):
        optimizer.zero_grad()
        logits = model(ids(90)).logits
        torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), ids(90)[:, 1:].flatten()
        ).backward()
        optimizer.step()
        unmoved = {
            name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()
        }
    assert unmoved == set()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pretrained")
    pretrained("Llama", path, rope_parameters=LLAMA3)
    return path


def test_the_command_makes_a_folder_for_both_loaders(tmp_path, capfd, checkpoint):
    out = tmp_path / "out"
    status, said, _ = call(capfd, "convert", str(checkpoint), str(out), *WORDS)
    native, model = HSAModel.from_pretrained(out), HSAForCausalLM.from_pretrained(out)
    new = sum(
        p.numel() for n, p in native.named_parameters() if n.startswith("encoder") or ".hsa" in n
    )
    assert status == 0 and f"of which {new:,} are new; 2 layers below, 1 x 2 above" in said
    assert_close(model.model.state_dict(), native.state_dict(), 0.0)
    assert model.generation_config.eos_token_id == 4094
    text = "To be <|endoftext|>"
    assert transformers.AutoTokenizer.from_pretrained(out)(text) == fast_tokenizer()(text)
    capfd.readouterr()
    assert native.config.rope_factors and model.config.native() == native.config
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("To be")
    words = ("--prompt-file", str(prompt), "--max-new-tokens", "5", "--device", "cpu")
    made = native.generate(torch.tensor([fast_tokenizer().encode("To be")]), max_new_tokens=5).ids
    said = call(capfd, "generate", str(out), *words)
    assert said[:2] == (0, fast_tokenizer().decode(made[0]) + "\n")
    assert call(capfd, "convert", str(checkpoint), str(out), *WORDS)[0] == 0  # it replaces its own


def changed(folder: Path, to: Path, name: str, **changes) -> Path:
    """A copy of a checkpoint with another value in a JSON file; None removes a key."""
    shutil.copytree(folder, to)
    values = json.loads((to / name).read_text()) | changes
    (to / name).write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    return to


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(architectures=["GPT2LMHeadModel"]), "architectures: got ['GPT2LMHeadModel']"),
        (dict(architectures=None), "architectures: got None, accepted is one of LlamaForCausalLM"),
        (dict(architectures=7), "architectures: got 7, accepted is one of"),
        (dict(attention_bias=True), "attention_bias: got True, accepted is False"),
        (dict(hidden_act="gelu"), "hidden_act: got 'gelu', accepted is silu"),
        (dict(mlp_bias=True), "mlp_bias: got True, accepted is False"),
        (
            dict(rope_parameters={"rope_type": "longrope"}),
            "rope_type: got 'longrope', accepted are default, linear, llama3, yarn",
        ),
        (dict(rope_parameters=[1]), "rope_type: got [1], accepted are default, linear"),
        (dict(rope_parameters={"partial_rotary_factor": 0.5}), "partial_rotary_factor: got 0.5"),
        (dict(rope_parameters={"type": "linear"}), "factor: got None, accepted is a number from 1"),
        (dict(rope_parameters=LLAMA3 | {"low_freq_factor": 4.0}), "high_freq_factor: got 4.0, acc"),
        (dict(rope_parameters=LLAMA3 | {"factor": 0.5}), "factor: got 0.5, accepted is a number"),
        (dict(rope_parameters=YARN | {"beta_fast": "x"}), "beta_fast: got 'x', accepted is"),
        (dict(quantization_config={"bits": 4}), "quantization_config: got {'bits': 4}, accepted"),
        (dict(num_hidden_layers="4"), "num_hidden_layers: got '4', accepted is an integer"),
        (dict(num_hidden_layers=5), "lacks the weight model.layers.4."),
        (dict(num_hidden_layers=3), "has the weight 'model.layers.3."),
        (dict(hidden_size=64), "got model.embed_tokens.weight [4096, 48], accepted is [4096, 64]"),
        (dict(vocab_size=4095), "got 4096 tokens, accepted are 2048 to 4095 for the vocabulary"),
        (dict(vocab_size=9000), "got 4096 tokens, accepted are 4500 to 9000 for the vocabulary"),
        (dict(eos_token_id=2), "got eos_token '<|endoftext|>' with id 4094, accepted is"),
        (dict(rms_norm_eps="x"), "norm_eps: got 'x', accepted is a number"),
        (dict(head_dim=[16]), "head_dim: got [16], accepted is an integer"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(
    tmp_path, capfd, checkpoint, changes, said
):
    folder = changed(checkpoint, tmp_path / "in", "config.json", **changes)
    status, out, error = call(capfd, "convert", str(folder), str(tmp_path / "out"), *WORDS)
    assert (status, out, error.count("\n")) == (2, "", 1)
    assert said in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("config.json", None, "without config.json, accepted is a checkpoint's folder"),
        ("model.safetensors", None, "lacks weights, accepted are model.safetensors or"),
        ("model.safetensors", b"PK", "model.safetensors: cannot be read"),
        (
            "model.safetensors.index.json",
            b'{"weight_map": {"a": "../x"}}',
            "lacks weights, accepted",
        ),
        ("model.safetensors.index.json", b'{"weight_map": {"a": 1}}', "lacks weights, accepted"),
        ("tokenizer.json", None, "has no tokenizer.json, accepted is a fast tokenizer"),
        ("tokenizer.json", b"{}", "tokenizer.json: accepted is a file of `tokenizers`"),
    ],
)
def test_a_file_that_is_missing_or_damaged_is_refused_in_one_line(
    tmp_path, capfd, checkpoint, name, content, said
):
    folder = tmp_path / "in"
    shutil.copytree(checkpoint, folder)
    (folder / name).write_bytes(content) if content else (folder / name).unlink()
    (folder / "pytorch_model.bin").write_bytes(b"a pickle, which is never read")
    status, out, error = call(capfd, "convert", str(folder), str(tmp_path / "out"), *WORDS)
    assert (status, out, error.count("\n")) == (2, "", 1)
    assert said in error and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "words, said",
    [
        (
            ("--groups", "3", "--lower-layers", "2"),
            "lower_layers: got 2 with 3 groups above, accepted",
        ),
        (("--lower-layers", "4"), "lower_layers: got 4 with 1 groups above, accepted are"),
        (("--window", "0"), "--window: got 0, accepted is 1 to"),
    ],
)
def test_layers_that_do_not_fit_are_refused_in_one_line(tmp_path, capfd, checkpoint, words, said):
    status, _, error = call(capfd, "convert", str(checkpoint), str(tmp_path / "out"), *words)
    assert status == 2 and said in error and error.count("\n") == 1


def test_a_folder_that_holds_something_else_is_not_replaced(capfd, checkpoint):
    before = {path: path.read_bytes() for path in checkpoint.iterdir()}
    status, _, error = call(capfd, "convert", str(checkpoint), str(checkpoint), *WORDS)
    assert status == 2 and "accepted is a new or an empty folder" in error
    assert {path: path.read_bytes() for path in checkpoint.iterdir()} == before


@pytest.mark.parametrize("dtype, said", [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_quantised_weights_are_refused_in_one_line(tmp_path, capfd, checkpoint, dtype, said):
    shutil.copytree(checkpoint, tmp_path / "in")
    weights = load_file(tmp_path / "in" / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight"
    save_file(weights | {name: weights[name].to(dtype)}, tmp_path / "in" / "model.safetensors")
    status, _, error = call(capfd, "convert", str(tmp_path / "in"), str(tmp_path / "out"), *WORDS)
    assert status == 2 and f"got {name} in {said}, accepted are weights" in error
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_refused(tmp_path, capfd, checkpoint):
    shutil.copytree(checkpoint, tmp_path / "in")
    weights = load_file(tmp_path / "in" / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, tmp_path / "in" / "model.safetensors")
    status, _, error = call(capfd, "convert", str(tmp_path / "in"), str(tmp_path / "out"), *WORDS)
    assert status == 2 and "model.norm.weight is not a tensor of finite numbers" in error
    assert not (tmp_path / "out").exists()
