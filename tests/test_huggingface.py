"""HSA models in transformers compute what the native ones do, on every path of transformers.

Dimensions: B batch, T tokens, S=4 chunk size, W=8 window: the `debug` preset and options of it.
"""

import copy
import dataclasses
import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_close
from material import build, text, tiny

pytest.importorskip("transformers")

import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    TrainingArguments,
    pipeline,
)

from hsa_mini import ChunkMemory, HSAModel
from hsa_mini.data.tokenizer import SPECIAL_TOKENS, load_tokenizer
from hsa_mini.inference.sampling import probabilities
from hsa_mini.integrations.huggingface import (
    BalanceExperts,
    HSACache,
    HSAForCausalLM,
    HSAPretrainedConfig,
    fast_tokenizer,
)
from hsa_mini.model.moe import MoE

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = ("default", "query block", "no QK norm", "untied")
LENGTHS = (45, 31, 5)  # of the texts of a padded batch


def twins(option="default", dtype=torch.float64, **changes) -> tuple[HSAModel, HSAForCausalLM]:
    """A native model and the same one for transformers."""
    native = build(option, dtype, **changes)
    config = HSAPretrainedConfig(**dataclasses.asdict(native.config))
    model = HSAForCausalLM(config).to(dtype).eval()
    model.model.load_state_dict(native.state_dict())
    return native, model


def padded(side: str) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Texts [1, n], and the same as a batch: input_ids and attention_mask [3, 45].

    side: where the padding is. "both": half of it in front.
    """
    texts = [text(n, seed=n)[:1] for n in LENGTHS]
    ids = torch.full((len(texts), max(LENGTHS)), 7)
    mask = torch.zeros_like(ids)
    for row, part in enumerate(texts):
        free = ids.shape[1] - part.shape[1]
        first = {"left": free, "right": 0, "both": free // 2}[side]
        ids[row, first : first + part.shape[1]] = part
        mask[row, first : first + part.shape[1]] = 1
    return texts, dict(input_ids=ids, attention_mask=mask)


every_side = pytest.mark.parametrize("side", ["left", "right", "both"])


def test_without_transformers_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "hsa_mini.integrations.huggingface")
    with pytest.raises(ImportError, match=r"^transformers: not installed, .* 'hsa-mini\[hf\]'`$"):
        importlib.import_module("hsa_mini.integrations.huggingface")


@pytest.mark.parametrize("option", [*OPTIONS, "experts"])
def test_greedy_generation_is_the_native_one_token_for_token(option):
    native, model = twins(option, torch.float32)
    ids = text(50)
    got = model.generate(ids, max_new_tokens=90, do_sample=False)
    assert torch.equal(got[:, :50], ids)
    assert torch.equal(got[:, 50:], native.generate(ids, max_new_tokens=90).ids)


@every_side
def test_a_text_in_a_padded_batch_is_continued_as_if_it_stood_alone(side):
    native, model = twins()
    texts, batch = padded(side)
    got = model.generate(**batch, max_new_tokens=20, do_sample=False)
    want = [native.generate(part, max_new_tokens=20).ids for part in texts]
    assert torch.equal(got[:, max(LENGTHS) :], torch.cat(want))


@every_side
def test_logits_and_gradients_of_a_padded_batch_are_those_of_its_texts(side):
    native, model = twins()
    texts, batch = padded(side)
    logits = model(**batch).logits[batch["attention_mask"].bool()]
    want = torch.cat([native(part).logits[0] for part in texts])
    assert_close(logits.detach(), want.detach(), 1e-12)
    logits.square().sum().backward()
    want.square().sum().backward()
    gradients = {name: p.grad for name, p in native.named_parameters() if p.grad is not None}
    assert_close(
        {n: p.grad for n, p in model.model.named_parameters() if n in gradients}, gradients, 1e-10
    )


@pytest.mark.parametrize("mask", [[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1], [[1, 1, 1, 1]]], ids=str)
def test_a_mask_with_gaps_or_of_another_shape_is_refused(mask):
    _, model = twins()
    with pytest.raises(ValueError, match="attention_mask: got .* without gaps, padded in front or"):
        model(text(4)[:1], attention_mask=torch.tensor([mask]))


@pytest.mark.parametrize("name", ["position_ids", "inputs_embeds", "output_hidden_states"])
def test_an_argument_that_would_be_ignored_is_refused(name):
    _, model = twins()
    with pytest.raises(ValueError, match=f"{name}: got a bool, accepted is None"):
        model(text(4), **{name: True})


def test_beam_search_with_a_memory_chooses_what_it_chooses_without():
    _, model = twins()
    _, batch = padded("left")
    options = dict(max_new_tokens=12, num_beams=4, do_sample=False, return_dict_in_generate=True)
    got, want = (
        model.generate(**batch, **options, output_scores=True, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert torch.equal(got.sequences, want.sequences)
    assert_close(got.sequences_scores, want.sequences_scores, 1e-10)


def test_sampling_draws_from_the_native_probabilities():
    native, model = twins()
    ids = text(30)
    options = dict(temperature=0.7, top_k=20, top_p=0.9)
    torch.manual_seed(3)
    out = model.generate(
        ids,
        **options,
        max_new_tokens=15,
        do_sample=True,
        output_scores=True,
        return_dict_in_generate=True,
    )
    torch.manual_seed(3)
    again = model.generate(ids, **options, max_new_tokens=15, do_sample=True, use_cache=False)
    assert torch.equal(out.sequences, again)
    logits = native(out.sequences[:, :-1]).logits[:, 29:]
    for i, scores in enumerate(out.scores):
        assert_close(scores.softmax(-1).double(), probabilities(logits[:, i], **options), 1e-5)


def test_generation_goes_on_after_a_memory_and_after_a_copy_of_its_cache():
    native, model = twins()
    ids = text(60)
    want = native.generate(ids, max_new_tokens=10).ids
    memory = native(ids[:, :40]).memory
    cache = HSACache(memory)
    branch = copy.deepcopy(cache)
    model.generate(text(60, seed=5)[:, :45], cache=branch, max_new_tokens=4)
    for given in (cache, HSACache(ChunkMemory(native.config))):
        got = model.generate(
            ids, cache=given, max_new_tokens=5, do_sample=False, return_dict_in_generate=True
        )
        assert got.cache is given and given.get_seq_length() == 64
        rest = model.generate(got.sequences, cache=given, max_new_tokens=5, do_sample=False)
        assert torch.equal(rest[:, 60:], want)
    with pytest.raises(NotImplementedError, match="crop: a chunk memory cannot forget"):
        cache.crop(1)
    cache.reset()
    assert torch.equal(
        model.generate(ids, cache=cache, max_new_tokens=10, do_sample=False)[:, 60:], want
    )


def test_a_prompt_in_segments_is_the_whole_prompt():
    _, model = twins()
    options = dict(max_new_tokens=5, do_sample=False)
    cache = HSACache(ChunkMemory(model.config.native()))
    got = model.generate(text(60), cache=cache, prefill_chunk_size=17, **options)
    assert torch.equal(got, model.generate(text(60), **options))


@pytest.mark.parametrize("option", ["default", "query block", "experts"])
@pytest.mark.parametrize("every", [1, 3])
def test_gradient_checkpointing_changes_no_gradient(option, every):
    _, model = twins(option, torch.float32)
    model.train()

    def gradients() -> dict[str, torch.Tensor]:
        torch.manual_seed(1)  # of the exploration noise
        model.zero_grad()
        model(text(40), labels=text(40)).loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    want = gradients()
    calls = []
    model.model.upper[0].swa.register_forward_pre_hook(lambda *_: calls.append(1))
    model.activation_checkpointing_enable(every_n_layers=every)
    got = gradients()
    assert model.is_activation_checkpointing and len(calls) == (2 if every == 1 else 1)
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)
    model.activation_checkpointing_disable()
    gradients()
    assert not model.is_activation_checkpointing and len(calls) == (3 if every == 1 else 2)


TEXTS = [text(24, seed=i)[0] for i in range(16)]


def trained(
    folder: Path, option="default", callbacks=(), resume=False, **options
) -> HSAForCausalLM:
    """A model after `Trainer` has trained it on TEXTS."""
    pytest.importorskip("accelerate")
    arguments = TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, seed=1, logging_steps=1,
        learning_rate=1e-2, num_train_epochs=1, **options,
    )  # fmt: skip
    data = [dict(input_ids=row, labels=row) for row in TEXTS]
    exploration = options.get("save_strategy") == "steps"  # its noise depends on the batches
    _, model = twins(option, torch.float32, exploration=exploration)
    trainer = transformers.Trainer(model, arguments, train_dataset=data, callbacks=[*callbacks])
    trainer.train(resume_from_checkpoint=resume)
    return model


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def test_trainer_accumulates_gradients(tmp_path):
    options = dict(save_strategy="no", max_steps=3)
    got = trained(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4, **options)
    want = trained(tmp_path, per_device_train_batch_size=4, **options)
    assert_close(weights(got), weights(want), 1e-4)


def test_trainer_balances_experts_as_the_native_training_does(tmp_path):
    options = dict(save_strategy="no", max_steps=1, gradient_accumulation_steps=2)
    callbacks = [BalanceExperts(0.25)]
    got = trained(tmp_path, "experts", callbacks, per_device_train_batch_size=8, **options)
    want = build("experts", torch.float32, exploration=False).train()
    layers = [layer for layer in want.modules() if isinstance(layer, MoE)]
    for layer in layers:
        layer.count_tokens()
    want(torch.stack(TEXTS))
    for layer in layers:
        layer.update_bias(0.25)
    biases = dict(want.named_buffers())
    assert_close(dict(got.model.named_buffers()), biases, 0.0)
    assert all(bias.any() for bias in biases.values())


def test_trainer_resumes_where_it_was_stopped(tmp_path):
    options = dict(per_device_train_batch_size=4, save_strategy="steps", save_steps=2)
    want = weights(trained(tmp_path, **options))
    shutil.rmtree(tmp_path / "checkpoint-4")
    assert HSAModel.from_pretrained(tmp_path / "checkpoint-2").config.exploration
    got = weights(trained(tmp_path, resume=True, **options))
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_the_fast_tokenizer_gives_the_native_ids():
    native, fast = load_tokenizer(), fast_tokenizer()
    files = [*(ROOT / "hsa_mini").rglob("*.py"), *ROOT.glob("*.md"), *ROOT.glob("notebooks/*.py")]
    texts = [file.read_text(encoding="utf-8") for file in files]
    letters = [chr(code) for code in range(0, 0x110000, 61) if not 0xD800 <= code < 0xE000]
    texts += [f"a{x}b {x}A{x}{x}1" for x in letters]
    texts += ["", " " * 3000, "\r\n\r\n \t\n", "x".join(SPECIAL_TOKENS), f"{SPECIAL_TOKENS[0]} "]
    got = fast(texts)["input_ids"]
    assert got == native.encode_ordinary_batch(texts, num_threads=1)
    assert fast.batch_decode(got) == texts
    assert [fast.eos_token_id, fast.pad_token_id, len(fast)] == [4094, 4095, native.n_vocab]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What transformers saves of a tiny model and the tokenizer."""
    path = tmp_path_factory.mktemp("saved")
    native = tiny()
    native.save_pretrained(path / "native")
    model = HSAForCausalLM.from_pretrained(path / "native")
    model.generation_config.eos_token_id = fast_tokenizer().eos_token_id
    model.save_pretrained(path / "hf")
    fast_tokenizer().save_pretrained(path / "hf")
    return path / "hf"


@pytest.mark.parametrize("option", ["default", "untied", "experts"])
@pytest.mark.parametrize("shards", [False, True])
def test_each_loader_reads_what_the_other_wrote(tmp_path, option, shards):
    native = build(option, torch.float32)
    with torch.no_grad():
        for buffer in native.buffers():
            buffer += 0.1
    native.save_pretrained(tmp_path / "a", shard_bytes=20_000 if shards else 1 << 30)
    model = HSAForCausalLM.from_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b", max_shard_size=20_000 if shards else "1GB")
    again = HSAModel.from_pretrained(tmp_path / "b")
    assert again.config == native.config == model.config.native()
    assert len([*(tmp_path / "b").glob("*.safetensors")]) > shards * 2
    for other in (model.model, again, HSAForCausalLM.from_pretrained(tmp_path / "b").model):
        assert_close(other.state_dict(), native.state_dict(), 0.0)
    half = HSAForCausalLM.from_pretrained(tmp_path / "b", dtype=torch.bfloat16).model
    assert {b.dtype for b in half.buffers()} <= {torch.float32}
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_no_weight_of_an_earlier_save_is_read(tmp_path):
    for seed, size in enumerate(("1GB", 20_000, "1GB", 30_000)):
        torch.manual_seed(seed)
        model = HSAForCausalLM(HSAPretrainedConfig(**dataclasses.asdict(build().config)))
        model.save_pretrained(tmp_path, max_shard_size=size)
        want = model.model.state_dict()
        assert_close(HSAModel.from_pretrained(tmp_path).state_dict(), want, 0.0)
        assert_close(HSAForCausalLM.from_pretrained(tmp_path).model.state_dict(), want, 0.0)


def test_top_k_of_retrieval_is_no_option_of_sampling(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["hsa_top_k"] == 2 and "top_k" not in config
    for path in (folder, folder.parent / "native"):
        assert HSAForCausalLM.from_pretrained(path).generation_config.top_k is None
        assert AutoConfig.from_pretrained(path).native() == tiny().config


def test_other_files_of_a_folder_stay_and_disturb_no_loader(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "x")
    (tmp_path / "x" / "README.md").write_text("mine")
    (tmp_path / "x" / ".git").mkdir()
    model = HSAForCausalLM.from_pretrained(tmp_path / "x")
    model.save_pretrained(tmp_path / "x")
    native = HSAModel.from_pretrained(tmp_path / "x")
    assert (tmp_path / "x" / "README.md").read_text() == "mine"
    # The native writer replaces a folder as a whole, so it refuses one that holds other files.
    with pytest.raises(ValueError, match="manifest.json does not name .git"):
        native.save_pretrained(tmp_path / "x")


def test_both_loaders_refuse_a_damaged_checkpoint(folder, tmp_path):
    path = tmp_path / "x"
    shutil.copytree(folder, path)
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (path / "model.safetensors").write_bytes(content)
    for loader in (HSAModel, HSAForCausalLM, AutoModelForCausalLM):
        with pytest.raises(ValueError, match="model.safetensors does not match its manifest.json"):
            loader.from_pretrained(path)
    (path / "manifest.json").unlink()
    HSAForCausalLM.from_pretrained(path)  # as any folder from the hub
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tied": False}))
    with pytest.raises(ValueError, match="lacks the weight 'model.head.weight'"):
        HSAForCausalLM.from_pretrained(path)
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(b"a pickle, which is never read")
    with pytest.raises(OSError, match="no file named model.safetensors"):
        HSAForCausalLM.from_pretrained(path, use_safetensors=False)


def test_the_auto_classes_and_pipeline_take_the_folder(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert type(model) is HSAForCausalLM and type(model.config) is HSAPretrainedConfig
    prompts = ["To be, or not to be", "x = <|endoftext|> * 3"]
    ids = [load_tokenizer().encode_ordinary(prompt) for prompt in prompts]
    assert tokenizer(prompts)["input_ids"] == ids
    speak = pipeline("text-generation", str(folder), device="cpu")
    options = GenerationConfig(
        max_new_tokens=8, do_sample=False, eos_token_id=4094, pad_token_id=4095
    )
    said = speak(prompts, generation_config=options, batch_size=2, return_full_text=False)
    for one, own in zip(said, ids):
        want = tiny().generate(torch.tensor([own]), max_new_tokens=8).ids[0]
        assert one[0]["generated_text"] == tokenizer.decode(want)


def test_a_shipped_model_is_read_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    got = HSAForCausalLM.from_pretrained("mini", dtype=torch.float32).model.state_dict()
    assert_close(got, HSAModel.from_pretrained("mini").state_dict(), 0.0)


def test_the_folder_brings_its_own_code_for_trust_remote_code(folder, tmp_path):
    program = (
        "import sys, torch; from transformers import pipeline; "
        "p = pipeline('text-generation', sys.argv[1], trust_remote_code=True, device='cpu'); "
        "print(p.model(torch.arange(40)[None]).logits.argmax(-1).tolist()); "
        "p.model.save_pretrained(sys.argv[2])"
    )
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", program, folder, tmp_path / "x"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    want = tiny()(torch.arange(40)[None]).logits.argmax(-1).tolist()
    assert json.loads(done.stdout.splitlines()[-1]) == want
    assert {p.name for p in (tmp_path / "x").iterdir()} <= {p.name for p in folder.iterdir()}


def test_push_to_hub_uploads_the_verified_folder(folder, tmp_path, monkeypatch):
    class Hub:  # a hub in a local folder
        def create_repo(self, repo_id, **_):
            return type("Repo", (), {"repo_id": repo_id})

        def create_commit(self, repo_id, operations, **_):
            for operation in operations:
                target = tmp_path / repo_id / operation.path_in_repo
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(operation.path_or_fileobj, target)

    card = transformers.utils.hub.ModelCard("---\n---\n")
    monkeypatch.setattr(transformers.utils.hub, "hf_api", Hub)
    monkeypatch.setattr(transformers.utils.hub, "create_and_tag_model_card", lambda *_, **__: card)
    model = HSAForCausalLM.from_pretrained(folder)
    model.push_to_hub("me/tiny")
    model.save_pretrained(tmp_path / "here", push_to_hub=True, repo_id="me/again")
    for name in ("me/tiny", "me/again"):
        assert (tmp_path / name / "README.md").is_file()
        got = HSAModel.from_pretrained(tmp_path / name)
        assert_close(got.state_dict(), model.model.state_dict(), 0.0)
