"""HSA models under torchtitan 0.3.0, as an example of another engine:

    torchrun --nproc-per-node 8 -m torchtitan.train --module hsa_mini.integrations.torchtitan
        --config nano --hf_assets_path TOKENIZER --dataloader.dataset_path TEXTS

`--config` is the name of any preset, TOKENIZER a folder with tokenizer.json, TEXTS a folder with
.jsonl files that have a field `text`. FSDP2 shares the weights block by block. What torchtitan can
do only to its own layers is refused: other parallelism, activation checkpointing, compilation.
"""
# torchtitan is not among the packages of development.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from dataclasses import dataclass
from importlib.metadata import version

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from hsa_mini.config import PRESETS
from hsa_mini.hsa_model import HSAModel
from hsa_mini.model.cost_estimate import training_flops
from hsa_mini.model.moe import MoE

try:
    from torchtitan.components.loss import CrossEntropyLoss
    from torchtitan.components.optimizer import default_adamw
    from torchtitan.config import TORCH_DTYPE_MAP, TrainingConfig
    from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader
    from torchtitan.protocols.model import BaseModel
    from torchtitan.protocols.model_spec import ModelSpec
    from torchtitan.trainer import Trainer
except ImportError as error:
    raise ImportError(
        f"torchtitan: {error}; accepted is an environment with `pip install torchtitan==0.3.0`"
    ) from None
if version("torchtitan") != "0.3.0":  # every version has another interface
    raise ValueError(f"torchtitan: got {version('torchtitan')}, accepted is 0.3.0")

if not hasattr(dist, "set_timeout"):  # torchtitan calls it, PyTorch 2.13 does not have it yet
    dist.set_timeout = dist.distributed_c10d._set_pg_timeout


class TitanModel(BaseModel):
    """ids int64 [B, T] -> logits [B, T, vocabulary]. A row is one text: no `positions` are used."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseModel.Config):
        preset: str

        def update_from_config(self, **_) -> None:
            """No setting of torchtitan changes the model."""

        def get_nparams_and_flops(self, model, seq_len: int) -> tuple[int, int]:
            flops_per_token = training_flops(model.hsa, seq_len) / seq_len
            return sum(p.numel() for p in model.parameters()), round(flops_per_token)

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.hsa = HSAModel(PRESETS[config.preset], device="meta")

    def verify_module_protocol(self) -> None:
        """Layers may be others than torchtitan's."""

    def init_states(self, **_) -> None:
        self.hsa.reset_parameters()

    def forward(self, ids: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        return self.hsa(ids).logits


def parallelize(model, *, parallel_dims, training, compile_config, ac_config, **_) -> TitanModel:
    d = parallel_dims
    if max(d.tp, d.cp, d.ep, d.dp_replicate) > 1 or compile_config.enable or ac_config is not None:
        raise ValueError("torchtitan: accepted for HSA models is data_parallel_shard_degree alone")
    dtypes = (training.mixed_precision_param, training.mixed_precision_reduce)
    policy = MixedPrecisionPolicy(*(TORCH_DTYPE_MAP[name] for name in dtypes))
    for part in (*model.hsa.lower, model.hsa.encoder, *model.hsa.upper, model):
        fully_shard(part, mesh=d.get_mesh("dp_shard"), mp_policy=policy)
        part.set_gradient_divide_factor(1.0)  # torchtitan divides the loss
        part.set_force_sum_reduction_for_comms(True)  # gloo knows no other reduction
    return model


def balance_experts(optimizers, model_parts, parallel_dims) -> None:
    """Before every step, move the routers' biases by the token counts of all processes."""
    layers = [layer for layer in model_parts[0].modules() if isinstance(layer, MoE)]

    def update(*_) -> None:
        for layer in layers:
            dist.all_reduce(layer.tokens_per_expert)
            layer.update_bias(1e-3)

    for layer in layers:
        layer.count_tokens()
    optimizers.register_step_pre_hook(update)


def configure(preset: str) -> Trainer.Config:
    """What `--config PRESET` stands for; the command line can change every value."""
    return Trainer.Config(
        model_spec=ModelSpec(
            name="hsa", flavor=preset, model=TitanModel.Config(preset=preset),
            parallelize_fn=parallelize, post_optimizer_build_fn=balance_experts,
            pipelining_fn=None, state_dict_adapter=None,
        ),
        loss=CrossEntropyLoss.Config(global_vocab_size=PRESETS[preset].vocab_size),
        optimizer=default_adamw(lr=1e-3),
        dataloader=HuggingFaceTextDataLoader.Config(dataset="c4_test"),  # its name for a folder
        # A CUDA graph would repeat the Gumbel noise of one step for ever.
        training=TrainingConfig(seq_len=1024, disable_cuda_graphs=True),
        activation_checkpoint=None,
    )  # fmt: skip


def __getattr__(name: str):
    if name in PRESETS:
        return lambda: configure(name)
    raise AttributeError(name)
