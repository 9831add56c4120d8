"""What both training stages do around the loop: check the input, load the base, encode the images, train."""

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiger import checkpoint, manifest
from tiger.components import Components, check_base
from tiger.config import TrainConfig, check_resume, config_text
from tiger.errors import InputError
from tiger.files import atomic_path
from tiger.knowledge import Knowledge
from tiger.manifest import Manifest, Row, row_weights

if TYPE_CHECKING:
    from accelerate import Accelerator

    from tiger.stage import Stage

MAX_TOKENS = 77  # of CLIP's text encoder, begin and end included
MakeStage = Callable[[Any, Components, list[dict[str, Any]], Knowledge, "Accelerator"], "Stage"]


def launch(
    config: TrainConfig,
    make_stage: MakeStage,
    *,
    with_conditions: bool = False,
    blank_nodule: bool = True,
    find_unused_parameters: bool = False,
) -> None:
    """Run one stage from its config to the finished model; nothing to do if that exists.

    make_stage(config, components, validation items, knowledge, accelerator) builds the stage. with_conditions: the rows
    need masks and Sobel maps; blank_nodule: the maps are zeroed inside the masks. find_unused_parameters: some steps
    leave part of the model without gradients, which several processes must know. All that can be wrong with the input
    is checked before a model is loaded.
    """
    output_dir = Path(config.output_dir)
    check_output(config, output_dir)
    finished_step = checkpoint.finished_step(output_dir)
    if finished_step >= config.max_train_steps and not config.dry_run:
        print(f"{output_dir} holds the finished model of step {finished_step}: nothing to do")
        return
    check_base(config.pretrained_model)
    knowledge = Knowledge.load(config.knowledge)
    train_rows, validation_rows = read_rows(config, knowledge, with_conditions)

    import torch
    from accelerate import Accelerator, DistributedDataParallelKwargs

    from tiger.components import load_components
    from tiger.dataset import TigerDataset, cache_latents
    from tiger.trainer import train

    accelerator = Accelerator(
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=find_unused_parameters)]
    )
    components = load_components(config.pretrained_model)
    resolution = components.resolution(config.resolution)
    options = {"with_conditions": with_conditions, "blank_nodule": blank_nodule}
    dataset = TigerDataset(train_rows, resolution, random_flip=config.random_flip, **options)
    shown = TigerDataset(validation_rows, resolution, **options)
    torch.manual_seed(config.seed)  # for what the stage adds to the base
    stage = make_stage(config, components, list(shown), knowledge, accelerator)  # type: ignore[arg-type]
    if accelerator.is_main_process:
        print(summary(config, train_rows, stage, components, resolution, accelerator.num_processes), flush=True)
    if config.dry_run:
        return
    output_dir.mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process:
        with atomic_path(output_dir / "config.yaml") as path:
            path.write_text(config_text(config), encoding="utf-8")
    dataset.latents = cache_latents(
        components.vae, dataset, Path(config.cache_dir) if config.cache_dir else output_dir / "cache",
        rank=accelerator.process_index, world=accelerator.num_processes, wait=accelerator.wait_for_everyone,
    )  # fmt: skip
    finished = train(
        accelerator,
        stage,
        dataset,
        dataset.weights(config.class_balance),
        output_dir=output_dir,
        config_text=config_text(config),
        max_train_steps=config.max_train_steps,
        train_batch_size=config.train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        lr_scheduler=config.lr_scheduler,
        lr_warmup_steps=config.lr_warmup_steps,
        max_grad_norm=config.max_grad_norm,
        ema_decay=config.ema_decay if config.use_ema else None,
        seed=config.seed,
        checkpointing_steps=config.checkpointing_steps,
        checkpoints_total_limit=config.checkpoints_total_limit,
        validation_steps=config.validation_steps,
        log_steps=config.log_steps,
        dataloader_num_workers=config.dataloader_num_workers,
    )
    if not finished:
        print("stopped by a signal; a checkpoint was saved: the same command goes on from there", file=sys.stderr)
        sys.exit(143)  # 128 + SIGTERM, as the shell would report
    if accelerator.is_main_process:
        print(f"saved the finished model of step {config.max_train_steps} to {output_dir}")


def check_output(config: TrainConfig, output_dir: Path) -> None:
    """Refuse an output folder that is a file or holds a training of the other stage or with other settings."""
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"--output_dir {output_dir} is a file; give a folder")
    if (output_dir / "config.yaml").exists():
        check_resume(config, output_dir / "config.yaml")


def read_rows(config: TrainConfig, knowledge: Knowledge, with_conditions: bool) -> tuple[Manifest, Manifest]:
    """Checked rows to train on, and the few that the validation grid shows."""
    rows = manifest.read(config.data_dir, knowledge)
    train_rows = select_split(rows, config.split)
    has_validation = any(row.split == config.validation_split for row in rows.rows)
    shown = select_split(rows, config.validation_split) if has_validation else train_rows
    shown = Manifest(rows.path, spread(shown.rows, config.validation_images))
    names = {row.file_name for row in train_rows.rows}
    used = (*train_rows.rows, *(row for row in shown.rows if row.file_name not in names))
    manifest.check(Manifest(rows.path, used), conditions=with_conditions, knowledge=knowledge)
    if straddling := manifest.straddling_patients(rows.rows):
        raise InputError(f"{rows.path}: {'; '.join(straddling)}")
    row_weights(train_rows, config.class_balance)  # raises where labels are missing
    return train_rows, shown


def select_split(rows: Manifest, split: str) -> Manifest:
    """Rows of one split. A manifest that names no split at all is all "train"."""
    splits = sorted({row.split for row in rows.rows if row.split})
    if not splits and split == "train":
        return rows
    selected = rows.select(split=split)
    if not selected.rows:
        raise InputError(f"{rows.path}: no row has split {split!r}; there are {', '.join(splits) or 'no splits'}")
    return selected


def spread(rows: tuple[Row, ...], count: int) -> tuple[Row, ...]:
    """`count` rows, one of each class in turn."""
    seen: Counter[str | None] = Counter()
    rounds = []
    for row in rows:
        rounds.append((seen[row.label], len(rounds)))  # how many of its class came before it
        seen[row.label] += 1
    order = sorted(range(len(rows)), key=lambda index: rounds[index])
    return tuple(rows[index] for index in order[:count])


def summary(
    config: TrainConfig, rows: Manifest, stage: "Stage", components: Components, resolution: int, processes: int
) -> str:
    """What is about to be trained on what, a line each."""
    trained = sum(p.numel() for p in stage.trainable.parameters() if p.requires_grad)
    frozen = sum(p.numel() for network in components.networks for p in network.parameters() if not p.requires_grad)
    batch = config.train_batch_size * config.gradient_accumulation_steps * processes
    counts = Counter(row.label or "no label" for row in rows.rows).most_common()
    patients = len({row.patient_id for row in rows.rows if row.patient_id})
    texts = list(dict.fromkeys(row.text for row in rows.rows))
    lengths = [len(ids) for ids in components.tokenizer(texts).input_ids]
    cut = sum(length > MAX_TOKENS for length in lengths)
    lines = [
        f"data: {len(rows.rows)} images of {patients or 'unnamed'} patients at {resolution} px: "
        + ", ".join(f"{label} {count}" for label, count in counts),
        f"model: {trained / 1e6:.2f} M parameters trained, {frozen / 1e6:.2f} M frozen",
        f"training: {config.max_train_steps} steps of {batch} images, "
        f"{config.max_train_steps * batch / len(rows.rows):.1f} epochs",
    ]
    if cut:
        longest = texts[lengths.index(max(lengths))]
        lines.append(f"warning: {cut} prompts are cut at {MAX_TOKENS} tokens; the longest: {longest}")
    return "\n".join(lines)
