"""What all training stages do around the loop: check the input, load the base, encode the images, train."""

import contextlib
import errno
import hashlib
import importlib.util
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiger import checkpoint, manifest
from tiger.card import model_card, push
from tiger.components import Components, check_base, load_components
from tiger.config import TrainConfig, check_resume, config_text
from tiger.errors import InputError, WorkFailed
from tiger.files import atomic_path, changed_settings, read_json, write_json
from tiger.knowledge import Knowledge
from tiger.manifest import Manifest, Row, row_weights
from tiger.output import model_fingerprint

if TYPE_CHECKING:
    from accelerate import Accelerator

    from tiger.dataset import TigerDataset
    from tiger.stage import Stage

GOOD_MFU = 0.3  # of the device's peak, reached by MLPerf's record for Stable Diffusion
CPU_SHARE = 0.8  # of what matrix products reach, where the peak is unknown: the embedded base on one core of a CPU
MAX_TOKENS = 77  # of CLIP's text encoder, begin and end included
PATIENCE = timedelta(hours=2)  # of processes while one encodes, draws or writes longer than the others
MakeStage = Callable[[Any, Components, list[dict[str, Any]], Knowledge, "Accelerator"], "Stage"]


def launch(
    config: TrainConfig,
    make_stage: MakeStage,
    *,
    kind: str = "coarse",
    with_conditions: bool = False,
    load: Callable[[str], Components] = load_components,
    blank_nodule: bool = True,
    find_unused_parameters: bool = False,
) -> None:
    """Run one stage from its config to the finished model; nothing to do if that exists.

    make_stage(config, components, validation items, knowledge, accelerator) builds the stage. kind: of the
    finished model, one of card.WHAT. with_conditions: the rows need masks and Sobel maps. load: reads what
    --pretrained_model names. blank_nodule: the maps are zeroed inside the masks. find_unused_parameters: some steps
    leave part of the model without gradients, which several processes must know. All that can be wrong with the input
    is checked before a model is loaded.
    """
    output_dir = Path(config.output_dir)
    check_output(config, output_dir)
    check_services(config)
    if config.num_train_epochs is None and is_finished(config, output_dir, config.max_train_steps):
        upload(config, output_dir)
        return
    check_base(config.pretrained_model)
    knowledge = Knowledge.load(config.knowledge)
    train_rows, validation_rows = read_rows(config, knowledge, with_conditions)
    steps = count_steps(config, len(train_rows.rows))
    if is_finished(config, output_dir, steps):
        upload(config, output_dir)
        return

    import torch
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs

    from tiger import flops
    from tiger.cache import TextCache, model_key
    from tiger.dataset import TigerDataset, cache_latents
    from tiger.trainer import train

    accelerator = Accelerator(
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=output_dir / "logs",
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=find_unused_parameters),
            InitProcessGroupKwargs(timeout=PATIENCE),
        ],
    )
    components = load(config.pretrained_model)
    resolution = components.resolution(config.resolution)
    options: dict[str, Any] = {"with_conditions": with_conditions, "blank_nodule": blank_nodule}
    dataset = TigerDataset(
        train_rows, resolution, random_flip=config.random_flip, placement=knowledge.placement, **options
    )
    shown = TigerDataset(validation_rows, resolution, **options)
    inputs = fingerprint(components, dataset, knowledge) | {
        "images a step": images_per_step(config), "precision": accelerator.mixed_precision
    }  # fmt: skip
    check_inputs(output_dir, inputs)
    # What is saved says what it was trained at: generation.py and diffusers draw at that unless told otherwise.
    components.unet.register_to_config(sample_size=resolution // components.vae_scale_factor)
    torch.manual_seed(config.seed)  # for what the stage adds to the base
    stage = make_stage(config, components, list(shown), knowledge, accelerator)  # type: ignore[arg-type]
    work = stage.flops(resolution) if accelerator.is_main_process else None
    if work:
        if peak := flops.peak(accelerator.device, accelerator.mixed_precision != "no"):
            speed, basis = GOOD_MFU * peak, f"{GOOD_MFU:.0%} of the devices' peak"
        else:
            speed = CPU_SHARE * flops.product_rate(accelerator.device)
            basis = f"{CPU_SHARE:.0%} of the speed of matrix products here"
        print(summary(config, train_rows, stage, components, resolution, steps, work, speed, basis), flush=True)
    if config.dry_run:
        return
    card = model_card(
        kind, config.pretrained_model,
        counts=Counter(row.label or "no label" for row in train_rows.rows), resolution=resolution,
        steps=steps, images_per_step=images_per_step(config), config=config_text(config),
    )  # fmt: skip
    with known_failures(accelerator, output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        if accelerator.is_main_process:
            with atomic_path(output_dir / "config.yaml") as path:
                path.write_text(config_text(config), encoding="utf-8")
            files = dict(zip((row.file_name for row in dataset.rows), dataset.contents, strict=True))
            provenance = {"base": model_fingerprint(config.pretrained_model), "files": files}  # for eval/leakage.py
            write_json(output_dir / "inputs.json", inputs | provenance)
        cache_dir = Path(config.cache_dir) if config.cache_dir else output_dir / "cache"
        share: dict[str, Any] = {
            "rank": accelerator.process_index,
            "world": accelerator.num_processes,
            "wait": accelerator.wait_for_everyone,
        }
        dataset.latents = cache_latents(components.vae, dataset, cache_dir, **share)
        if isinstance(stage.read_text, TextCache):  # the text encoder is frozen
            texts = {text for index in range(len(dataset)) for text in prompts_of(kind, dataset.texts(index))}
            encoder = f"{model_key(components.text_encoder)}-{inputs['tokenizer']}"
            stage.read_text.store(["", *texts], cache_dir / f"texts-{encoder}", **share)
        finished = train(
            accelerator,
            stage,
            dataset,
            dataset.weights(config.class_balance),
            output_dir=output_dir,
            config_text=config_text(config),
            card=card,
            max_train_steps=steps,
            train_batch_size=config.train_batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            lr_scheduler=config.lr_scheduler,
            lr_warmup_steps=config.lr_warmup_steps,
            max_grad_norm=config.max_grad_norm,
            max_loss=config.max_loss,
            skip_bad_steps=config.skip_bad_steps,
            ema_decay=config.ema_decay if config.use_ema else None,
            seed=config.seed,
            checkpointing_steps=config.checkpointing_steps,
            checkpoints_total_limit=config.checkpoints_total_limit,
            validation_steps=config.validation_steps,
            log_steps=config.log_steps,
            flops_per_image=work,
            dataloader_num_workers=config.dataloader_num_workers,
        )
    if not finished:
        print("stopped by a signal; a checkpoint was saved: the same command goes on from there", file=sys.stderr)
        sys.exit(143)  # 128 + SIGTERM, as the shell would report
    if accelerator.is_main_process:
        print(f"saved the finished model of step {steps} to {output_dir}")
    upload(config, output_dir)


def prompts_of(kind: str, texts: Mapping[str, str]) -> list[str]:
    """The prompts of an image that a stage reads: the U-Net alone has no use for the halves."""
    return [texts["text"]] if kind == "coarse" else list(texts.values())


def upload(config: TrainConfig, output_dir: Path) -> None:
    """Upload the finished model from the first process, where --push_to_hub asks for it. Raises WorkFailed."""
    if not config.push_to_hub or os.environ.get("RANK", "0") != "0":
        return
    try:
        address = push(output_dir, repository(config))
    except Exception as error:  # of the network, the token, the service
        raise WorkFailed(
            f"the upload failed ({' '.join(str(error).split())}); the finished model is in {output_dir}, and the same "
            "command uploads it"
        ) from error
    print(f"uploaded {output_dir} to {address}")


def repository(config: TrainConfig) -> str:
    """Where --push_to_hub uploads to."""
    return config.hub_model_id or Path(config.output_dir).resolve().name


def check_output(config: TrainConfig, output_dir: Path) -> None:
    """Refuse an output folder that is a file or holds a training of the other stage or with other settings.

    A run that came to no checkpoint leaves nothing to protect.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise InputError(f"--output_dir {output_dir} is a file; give a folder")
    if (output_dir / "config.yaml").exists() and holds_training(output_dir):
        check_resume(config, output_dir / "config.yaml")


def check_inputs(output_dir: Path, inputs: dict[str, Any]) -> None:
    """Refuse an output folder whose training took in something else under the same names.

    What an older version of this code did not note down is not compared.
    """
    saved = output_dir / "inputs.json"
    if not holds_training(output_dir) or not saved.exists():
        return
    noted = read_json(saved)
    changed = changed_settings(saved, {name: value for name, value in inputs.items() if name in noted})
    if changed:
        raise InputError(
            f"{output_dir} holds a training on other inputs: {'; '.join(changed)}. Give the old ones to resume, or "
            "another --output_dir to start anew"
        )


def holds_training(output_dir: Path) -> bool:
    """Whether there is a checkpoint or a finished model to go on from."""
    return bool(checkpoint.checkpoints(output_dir)) or checkpoint.finished_step(output_dir) > 0


def check_services(config: TrainConfig) -> None:
    """Refuse a way of sharing out the model, a tracker or an upload that would not work."""
    if configured("ACCELERATE_USE_DEEPSPEED"):
        raise InputError(
            "accelerate is configured for DeepSpeed, which it has step inside the backward pass, before a bad step can "
            "be left out, and whose checkpoints are pickles: give configs/accelerate/zero2.yaml, which shares out the "
            "same by FSDP2"
        )
    if configured("ACCELERATE_USE_FSDP"):
        check_sharding(config)
    if config.report_to == "wandb" and importlib.util.find_spec("wandb") is None:
        raise InputError("--report_to wandb needs wandb: pip install wandb; or --report_to tensorboard")
    if config.push_to_hub:
        from huggingface_hub import get_token
        from huggingface_hub.utils import HFValidationError, validate_repo_id

        if get_token() is None:
            raise InputError("--push_to_hub needs a token of huggingface.co: run `hf auth login`, or set HF_TOKEN")
        try:
            validate_repo_id(repository(config))
        except HFValidationError as error:
            raise InputError(f"--push_to_hub: {' '.join(str(error).split())} Give another --hub_model_id") from None


def check_sharding(config: TrainConfig) -> None:
    """Refuse what does not go with FSDP, or with the way we use it."""
    refused = {
        "fsdp_version: 1; give 2": os.environ.get("FSDP_VERSION", "1") != "2",
        "fsdp_cpu_ram_efficient_loading; give false": configured("FSDP_CPU_RAM_EFFICIENT_LOADING"),
        "fsdp_activation_checkpointing; give --gradient_checkpointing": configured("FSDP_ACTIVATION_CHECKPOINTING"),
        "fsdp_offload_params; give false": configured("FSDP_OFFLOAD_PARAMS"),
        "mixed_precision: fp16; give bf16": os.environ.get("ACCELERATE_MIXED_PRECISION") == "fp16",
        "--use_8bit_adam; leave it out": config.use_8bit_adam,
        "--compile; leave it out": config.compile,
    }
    for what, found in refused.items():
        if found:
            raise InputError(f"sharding by FSDP does not go with {what}. See configs/accelerate/fsdp2.yaml")


def configured(variable: str) -> bool:
    """Whether `accelerate launch` switched something on."""
    return os.environ.get(variable, "false").lower() == "true"


def is_finished(config: TrainConfig, output_dir: Path, steps: int) -> bool:
    """Say so where nothing is to do; a dry run checks all the same."""
    finished_step = checkpoint.finished_step(output_dir)
    if config.dry_run or finished_step < steps:
        return False
    print(f"{output_dir} holds the finished model of step {finished_step}: nothing to do")
    return True


def images_per_step(config: TrainConfig) -> int:
    """The global batch."""
    return config.train_batch_size * config.gradient_accumulation_steps * processes()


def processes() -> int:
    """How many train together; the environment tells before accelerate is loaded."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def items(config: TrainConfig, images: int) -> int:
    """How many images an epoch has."""
    return images * (2 if config.random_flip else 1)


def count_steps(config: TrainConfig, images: int) -> int:
    """Optimizer steps in all, on `images` images."""
    if config.num_train_epochs is None:
        return config.max_train_steps
    return math.ceil(config.num_train_epochs * items(config, images) / images_per_step(config))


def fingerprint(components: Components, dataset: "TigerDataset", knowledge: Knowledge) -> dict[str, str]:
    """Short hashes of what a training takes in by name: the base, the rows, their files, how the vocabulary reads them.

    Files count by their content, of which the latent cache has need as well.
    """
    from tiger.cache import model_key

    base = [model_key(network) for network in components.networks]
    base.append(str(sorted(components.scheduler.config.items(), key=str)))
    rows = [
        (row.file_name, row.condition_fg, row.condition_bg, row.text, row.text_fg, row.text_bg, row.label, row.plane)
        for row in dataset.rows
    ]
    named: dict[str, Any] = {"pretrained_model": base, "training rows": rows, "images": dataset.contents}
    tokenizer = json.loads(components.tokenizer.backend_tokenizer.to_str())  # its padding is of the last call: left out
    named["tokenizer"] = [tokenizer[part] for part in ("normalizer", "pre_tokenizer", "model")]
    named["tokenizer"].append(components.tokenizer.pad_token)
    if dataset.with_conditions:  # terms are weighted
        named["masks"], named["edge maps"] = (dataset.hashes(column) for column in ("condition_fg", "condition_bg"))
        texts = dict.fromkeys(row.text_fg for row in dataset.rows)
        named["terms in the prompts"] = [
            [(span.term, span.kind) for span in knowledge.term_classes(text)] for text in texts
        ]
    return {name: hashlib.sha256(repr(value).encode()).hexdigest()[:16] for name, value in named.items()}


@contextlib.contextmanager
def known_failures(accelerator: "Accelerator", output_dir: Path) -> Iterator[None]:
    """Turn a full disk, and the end of another process, into WorkFailed."""
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            what = f"the disk of {output_dir} is full ({' '.join(str(error).split())})"
        elif accelerator.num_processes > 1 and is_lost_process(error):
            what = f"process {accelerator.process_index} lost another one, whose own message says why"
        else:
            raise
        steps = [checkpoint.step_of(folder) for folder in checkpoint.checkpoints(output_dir)]
        safe = f"checkpoint-{max(steps)} is intact" if steps else "there was no checkpoint yet"
        raise WorkFailed(f"{what}; {safe}: mend this, and the same command goes on from there") from error


def is_disk_full(error: Exception) -> bool:
    """Whether the disk, a quota or the largest file allowed is exceeded; safetensors says so in words only."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return getattr(error, "errno", None) in codes or any(f"(os error {code})" in str(error) for code in codes)


def is_lost_process(error: Exception) -> bool:
    """Whether a collective operation failed because another process is gone."""
    import torch

    said = str(error).lower()
    return isinstance(error, torch.distributed.DistError) or "connection closed" in said or "connection reset" in said


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
    leaks = [f"{row.file_name} {problem.message}" for row, problem in manifest.synthetic_leaks(rows.rows)]
    if problems := [*manifest.straddling_patients(rows.rows), *leaks]:
        raise InputError(f"{rows.path}: {'; '.join(problems)}")
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
    config: TrainConfig, rows: Manifest, stage: "Stage", components: Components, resolution: int, steps: int,
    flops: float, speed: float, basis: str,
) -> str:  # fmt: skip
    """What is about to be trained on what, a line each. flops: an image; speed: FLOP/s to expect of one device."""
    trained = sum(p.numel() for p in stage.trainable.parameters() if p.requires_grad)
    known = {p for network in (*components.networks, stage.trainable) for p in network.parameters()}
    frozen = sum(p.numel() for p in known) - trained
    batch = images_per_step(config)
    work = flops * steps * batch
    counts = Counter(row.label or "no label" for row in rows.rows).most_common()
    patients = len({row.patient_id for row in rows.rows if row.patient_id})
    texts = list(dict.fromkeys(row.text for row in rows.rows))
    lengths = [len(ids) for ids in components.tokenizer(texts).input_ids]
    cut = sum(length > MAX_TOKENS for length in lengths)
    moments = 2 if config.use_8bit_adam else 8  # bytes of optimizer state a parameter
    weights = sum(p.numel() * p.element_size() for p in known)
    gibibytes = (weights + trained * (4 + moments + 4 * config.use_ema)) / 2**30  # and gradients, moments, average
    lines = [
        f"data: {len(rows.rows)} images of {patients or 'unnamed'} patients at {resolution} px: "
        + ", ".join(f"{label} {count}" for label, count in counts),
        f"model: {trained / 1e6:.2f} M parameters trained, {frozen / 1e6:.2f} M frozen; {gibibytes:.2f} GiB a process, "
        "and what a batch's activations take",
        f"training: {steps} steps of {batch} images, {steps * batch / items(config, len(rows.rows)):.1f} epochs",
        f"work: {flops / 1e9:.3g} GFLOP an image, {work / 1e15:.3g} PFLOP in all: "
        f"{work / (speed * processes()) / 3600:.3g} hours at {basis}",
    ]
    if cut:
        longest = texts[lengths.index(max(lengths))]
        lines.append(f"warning: {cut} prompts are cut at {MAX_TOKENS} tokens; the longest: {longest}")
    return "\n".join(lines)
