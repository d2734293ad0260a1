"""Training: the loop, and a run that goes on exactly where it was cut off.

A batch is a function of (seed, step) and the exploration noise of (seed, step) too, so parameters, optimizer state, chunks of
the past and step are all that a resumed run needs to equal an uninterrupted one to the last bit (on the same hardware).
"""

import csv
import dataclasses
import io
import json
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from tqdm import tqdm

from hsa_mini import provenance
from hsa_mini.checkpoint.training_state import load_progress, save_progress
from hsa_mini.config import PRESETS, HSAConfig
from hsa_mini.hsa_model import HSAModel
from hsa_mini.inference.cuda_graph import CUDAGraphRunner
from hsa_mini.model.core import Output
from hsa_mini.model.moe import MoE
from hsa_mini.paths import write_whole
from hsa_mini.training.cross_batch import ChunkQueue, CrossBatchChunks
from hsa_mini.training.mixture import ANSWER, COPY, TEXT, TrainingBatches
from hsa_mini.training.recipes import RECIPES, Recipe, Stage

LOG = "log.csv"
AHEAD = 8  # batches that are drawn before they are needed
COUNTED = 16  # batches for the load of experts: a single one is not like the others
SHIPPED_BYTES = 15 << 20  # of a file of weights: a repository's files are at most 16 MiB
COLUMNS = (
    "step",
    "loss",
    "text",
    "copy",
    "answer",
    "answer_accuracy",
    "gradient_norm",
    "imbalance",
    "learning_rate",
    "seconds",
)


def train(
    name: str,
    *,
    run: Path,
    device: torch.device,
    steps: int | None = None,
    seed: int = 0,
    checkpoint_seconds: float = 120.0,
    log_every: int = 50,
    stop_after: int | None = None,
) -> HSAModel:
    """Train preset `name` in folder `run`, going on from the newest state there; returns the model.

    steps: instead of the recipe's. stop_after: leave, with a state written, after this step. The log is `run/log.csv`; the
    finished model is `run/final`, in bfloat16. Raises ValueError for an unknown preset or a run folder of other settings.
    """
    if name not in RECIPES:
        raise ValueError(f"preset: got {name!r}, accepted are {', '.join(RECIPES)}")
    recipe = RECIPES[name] if steps is None else RECIPES[name].scaled(steps)
    torch.manual_seed(seed)
    model = HSAModel(PRESETS[name]).to(device).train()
    optimizer = make_optimizer(model, recipe)
    past = ChunkQueue(recipe.crowd)
    settings = {"preset": name, "seed": seed, "recipe": dataclasses.asdict(recipe)}

    start = 0
    seconds_before = 0.0
    if (state := load_progress(run)) is not None:
        tensors, progress = state
        if progress["settings"] != json.loads(json.dumps(settings)):
            raise ValueError(
                f"run: {run} holds a run of other settings; accepted is an empty folder or one of the same"
            )
        start = progress["step"]
        seconds_before = progress["seconds"]
        restore(tensors, model, optimizer, past)
    log = Log(run / LOG, start)

    steps_of = recorded_steps(model, optimizer, recipe, past)
    batches = StagedBatches(recipe, seed)
    began = saved = time.monotonic()
    step = start

    def save() -> None:
        seconds = seconds_before + time.monotonic() - began
        save_progress(
            run,
            step,
            snapshot(model, optimizer, past),
            {"step": step, "seconds": seconds, "settings": settings},
        )

    with tqdm(
        total=recipe.steps, initial=start, desc=f"training {name}", unit="step", mininterval=0.5
    ) as bar:
        for batch in drawn_ahead(batches, range(start, recipe.steps), device=device):
            figures = take_step(steps_of, recipe, seed, step, batch, device)
            step += 1
            bar.update()
            if step % log_every == 0 or step == recipe.steps:
                values = [
                    step,
                    *(float(x) for x in figures),
                    recipe.rate(step - 1),
                    seconds_before + time.monotonic() - began,
                ]
                log.write(values)
                bar.set_postfix(loss=f"{values[1]:.3f}", answers=f"{values[5]:.1%}")
            if step == stop_after or (
                time.monotonic() - saved > checkpoint_seconds and step < recipe.steps
            ):
                save()
                saved = time.monotonic()
            if step == stop_after:
                return model
    seconds = seconds_before + time.monotonic() - began
    how = {
        **provenance.record(device),
        "seed": seed,
        "seconds": round(seconds, 1),
        "recipe": dataclasses.asdict(recipe),
    }
    if PRESETS[name].experts:
        last = min(COUNTED, recipe.stages[-1].steps)
        counted = drawn_ahead(batches, range(recipe.steps - last, recipe.steps), device=device)
        how["imbalance"] = imbalances(
            model, recipe.stages[-1], past, (ids.to(device) for ids, _ in counted)
        )
    texts = {LOG: (run / LOG).read_text(), "training.json": json.dumps(how, indent=1) + "\n"}
    model.save_pretrained(
        run / "final", dtype=torch.bfloat16, texts=texts, shard_bytes=SHIPPED_BYTES
    )
    return model


def recorded_steps(
    model: HSAModel, optimizer: torch.optim.Optimizer, recipe: Recipe, past: ChunkQueue
) -> dict[Stage, CUDAGraphRunner]:
    """`train_step` of every stage of the recipe, for the window and K of that stage."""
    return {
        stage: CUDAGraphRunner(
            partial(
                train_step,
                shared(model, stage.config(model.config)),
                optimizer,
                recipe,
                stage,
                past,
            )
        )
        for stage in set(recipe.stages)
    }


def drawn_ahead(
    batches: Dataset, steps: range, *, device: torch.device
) -> Iterator[tuple[torch.Tensor, ...]]:
    """The batches of `steps`, in order, drawn while the device is at work.

    By a thread: it takes milliseconds to draw a batch, and seconds to fork a process that has used a GPU.
    """

    def draw(step: int) -> tuple[torch.Tensor, ...]:
        return tuple(part.pin_memory() if device.type == "cuda" else part for part in batches[step])

    pool = ThreadPoolExecutor(1)
    waiting = deque()
    try:
        for step in steps:
            waiting.append(pool.submit(draw, step))
            if len(waiting) > AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def take_step(
    steps_of: dict[Stage, CUDAGraphRunner],
    recipe: Recipe,
    seed: int,
    step: int,
    batch,
    device: torch.device,
):
    """Train on the `batch` of `step`, counted from 0; the figures of `train_step`, to be read before the next one."""
    # not blocking: a copy that waited would leave the GPU without work at every step
    ids, parts = (part.to(device, non_blocking=True) for part in batch)
    rate = torch.full((), recipe.rate(step), device=device)
    noise = torch.full((), noise_seed(seed, step), device=device)
    return steps_of[recipe.stage(step)](ids, parts, rate, noise)


class StagedBatches(Dataset):
    """Item `step` is that of the `TrainingBatches` of its stage."""

    def __init__(self, recipe: Recipe, seed: int) -> None:
        self.recipe = recipe
        self.batches = {
            stage: TrainingBatches(
                stage.mixture, batch=stage.batch, tokens=stage.tokens, steps=recipe.steps, seed=seed
            )
            for stage in set(recipe.stages)
        }

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.batches[self.recipe.stage(step)][step]


def noise_seed(seed: int, step: int) -> int:
    """Of the exploration noise, as a signed 64-bit integer."""
    return (seed << 32 | step) - (seed >> 31 << 64)


def shared(model: HSAModel, config: HSAConfig) -> HSAModel:
    """A model of another window or K that has the same parameters: training one trains both."""
    twin = type(model)(config, device="meta").train(model.training)
    twin.load_state_dict(model.state_dict(keep_vars=True), assign=True)
    for layer in twin.modules():
        if isinstance(layer, MoE):
            layer.count_tokens()
    return twin


def make_optimizer(model: HSAModel, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; weight decay on matrices alone."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    device = matrices[0].device
    groups = [
        {
            "params": parameters,
            "weight_decay": decay,
            "lr": torch.full((), recipe.learning_rate, device=device),
        }
        for parameters, decay in ((matrices, recipe.weight_decay), (vectors, 0.0))
    ]
    return torch.optim.AdamW(
        groups, betas=recipe.betas, fused=device.type == "cuda", capturable=device.type == "cuda"
    )


def train_step(
    model, optimizer, recipe: Recipe, stage: Stage, past: ChunkQueue, ids, parts, rate, noise
) -> tuple[torch.Tensor, ...]:
    """One step on ids and parts [B, T+1] with learning rate and noise seed as tensors []; returns loss, its three parts,
    answer accuracy, gradient norm and the largest imbalance of an MoE layer (1 without one), still on the device."""
    for group in optimizer.param_groups:
        group["lr"].copy_(rate)
    output = read(model, stage, past, ids[:, :-1], gumbel_noise=stage.explore, gumbel_seed=noise)
    loss, shares, accuracy = mixture_loss(
        output.logits, ids[:, 1:], parts[:, 1:], text_weight=stage.text_weight
    )
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    if past.size:
        # Sequences without a question: theirs are chunks of text, and no needle that contradicts one to come.
        past.push(
            output.aux.encoded,
            (parts == ANSWER).any(dim=1).int().argsort(stable=True)[: len(parts) // 3],
        )
    found = [
        layer.update_bias(recipe.balance_rate).max_over_mean_load
        for layer in model.modules()
        if isinstance(layer, MoE)
    ]
    imbalance = torch.stack(found).max() if found else torch.ones((), device=ids.device)
    return loss.detach(), *shares, accuracy, norm, imbalance


def read(model: HSAModel, stage: Stage, past: ChunkQueue, ids: torch.Tensor, **options) -> Output:
    """What the model says of ids [B, T], which stand in the crowd of the stage."""
    source = None
    if stage.crowd is not None:
        source = partial(CrossBatchChunks, encoder=model.encoder, queue=past, isolated=stage.alone)
    with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=ids.device.type == "cuda"):
        return model(ids, chunk_source=source, **options)


@torch.no_grad()
def imbalances(
    model: HSAModel, stage: Stage, past: ChunkQueue, batches: Iterable[torch.Tensor]
) -> list[float]:
    """Of every MoE layer the largest load of an expert over the mean, over all batches [B, T+1], which are not learnt from."""
    model = shared(model, stage.config(model.config))
    for ids in batches:
        read(model, stage, past, ids[:, :-1], gumbel_noise=False)
    return [
        round(layer.statistics().max_over_mean_load.item(), 3)
        for layer in model.modules()
        if isinstance(layer, MoE)
    ]


def mixture_loss(
    logits, targets, parts, *, text_weight: float = 1.0
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], torch.Tensor]:
    """Weighted sum of the mean losses of text, copy and answer tokens; the three; the share of answer tokens predicted right.

    Means by part: seven digits of an answer weigh as much as a thousand tokens of text.
    """
    losses = cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    parts = parts.flatten()
    masks = [(parts == part).float() for part in (TEXT, COPY, ANSWER)]
    means = [(losses * mask).sum() / mask.sum().clamp(min=1) for mask in masks]
    right = (logits.detach().argmax(dim=-1).flatten() == targets.flatten()).float()
    accuracy = (right * masks[2]).sum() / masks[2].sum().clamp(min=1)
    loss = text_weight * means[0] + means[1] + means[2]
    return loss, tuple(mean.detach() for mean in means), accuracy


def _state(model: HSAModel) -> dict[str, torch.Tensor]:
    """What the model's `state_dict` holds, a tied head once."""
    kept = model.state_dict()
    return {
        **dict(model.named_parameters()),
        **{name: x for name, x in model.named_buffers() if name in kept},
    }


def snapshot(
    model: HSAModel, optimizer: torch.optim.Optimizer, past: ChunkQueue
) -> dict[str, torch.Tensor]:
    """Parameters, buffers, optimizer state, chunks of the past and torch's generator as a flat dictionary of tensors."""
    tensors = {f"model.{name}": value for name, value in _state(model).items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {
            f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in state.items()
        }
    tensors |= {f"past.{i}": store for i, store in enumerate(past.stores or ())}
    return {**tensors, "rng": torch.get_rng_state()}


@torch.no_grad()
def restore(
    tensors: dict[str, torch.Tensor],
    model: HSAModel,
    optimizer: torch.optim.Optimizer,
    past: ChunkQueue,
) -> None:
    """The inverse of `snapshot`."""
    for name, value in _state(model).items():
        value.copy_(tensors[f"model.{name}"])
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, index, key = name.split(".")
            state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict(
        {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    )
    if past.size:
        device = next(model.parameters()).device
        past.stores = tuple(tensors[f"past.{i}"].to(device) for i in range(3))
    torch.set_rng_state(tensors["rng"])


class Log:
    """The CSV of a run: one row every few steps, flushed at once; rows behind a resumed step are dropped."""

    def __init__(self, path: Path, start: int) -> None:
        rows = list(csv.reader(io.StringIO(path.read_text()))) if path.exists() and start else []
        kept = [row for row in rows[1:] if len(row) == len(COLUMNS) and int(row[0]) <= start]
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows([COLUMNS, *kept])
        write_whole(path, text.getvalue().encode())
        self._file = path.open("a", newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")

    def write(self, values: list[float]) -> None:
        if not math.isfinite(values[1]):
            raise FloatingPointError(
                f"the loss is {values[1]} after step {int(values[0])}: the run is stopped"
            )
        self._writer.writerow([int(values[0]), *(f"{x:.6g}" for x in values[1:])])
        self._file.flush()
