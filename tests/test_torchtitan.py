"""torchtitan trains what plain PyTorch trains. It is not among the packages of development: install
the version that the README names in an environment of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from material import words

pytest.importorskip("torchtitan", reason="torchtitan is not installed")
SCRIPT = Path(__file__).with_name("torchtitan_on_cpu.py")


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """A folder with a tokenizer and texts."""
    from hsa_mini.integrations.huggingface import fast_tokenizer

    folder = tmp_path_factory.mktemp("titan")
    fast_tokenizer().save_pretrained(folder)
    lines = [json.dumps({"text": words(100, str(i))}) for i in range(20)]
    (folder / "texts").mkdir()
    (folder / "texts" / "some.jsonl").write_text("\n".join(lines))
    return folder


def test_two_processes_train_as_plain_pytorch_does(texts):
    words = ["-m", "torch.distributed.run", "--nproc-per-node", "2", str(SCRIPT)]
    words += ["--module", "hsa_mini.integrations.torchtitan", "--config", "debug"]
    words += ["--hf_assets_path", str(texts), "--dataloader.dataset_path", str(texts / "texts")]
    words += ["--training.seq_len", "48", "--training.steps", "3", "--metrics.log_freq", "1"]
    words += ["--training.local_batch_size", "2", "--lr_scheduler.warmup_steps", "1"]
    words += ["--training.mixed_precision_param", "float32", "--debug.seed", "0"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(texts / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    run = subprocess.run(
        [sys.executable, *words],
        cwd=texts,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert len(result["losses"]) == 3
    assert result["losses"] == pytest.approx(result["plain_losses"], rel=1e-6)
    assert result["difference"] < 1e-5 < 2e-5 < result["moved"]


@pytest.mark.parametrize(
    "sizes, recompute", [({"tp": 2}, None), ({"dp_replicate": 2}, None), ({}, 1)]
)
def test_what_only_torchtitans_layers_can_do_is_refused(sizes, recompute):
    from hsa_mini.integrations.torchtitan import parallelize

    with pytest.raises(ValueError, match="accepted for HSA models is data_parallel_shard_degree"):
        parallelize(
            None,
            parallel_dims=SimpleNamespace(**{"tp": 1, "cp": 1, "ep": 1, "dp_replicate": 1} | sizes),
            training=None,
            compile_config=SimpleNamespace(enable=False),
            ac_config=recompute,
        )
