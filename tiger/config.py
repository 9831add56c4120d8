"""The flags of each training stage: one flat frozen dataclass a stage, read from YAML files and the command line.

Later `--config` files override earlier ones, and flags override files. No heavy import here: bad flags fail in 0.1 s.
"""

import dataclasses
import functools
import importlib.util
import itertools
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from tiger.errors import InputError

ConfigT = TypeVar("ConfigT")

# Fields that may change between two runs of one training without changing what each step computes.
FREE_ON_RESUME = {
    "output_dir", "cache_dir", "checkpointing_steps", "checkpoints_total_limit",
    "train_batch_size", "gradient_accumulation_steps",  # their product, the global batch, is compared by launch
    "validation_steps", "validation_images", "validation_inference_steps", "validation_split", "log_steps",
    "max_loss", "skip_bad_steps", "report_to", "push_to_hub", "hub_model_id",
    "text_cache_size", "dataloader_num_workers", "gradient_checkpointing", "dry_run",
}  # fmt: skip
PATHS = {"pretrained_model", "data_dir"}


@dataclass(frozen=True)
class TrainConfig:
    """What all stages share.

    Args:
        pretrained_model: base to start from: a local diffusers folder, or a hub id (downloaded only if no such folder)
        data_dir: folder with a metadata.jsonl, or that file
        output_dir: checkpoints, logs, validation grids, caches and the finished model go here; the same command resumes
        split: rows of this split are trained on; rows without any split count as "train"
        validation_split: rows of this split make the validation grid; training rows do where there are none
        knowledge: vocabulary of the organ: a name in configs/knowledge or a YAML file
        resolution: image side in pixels; default: what the base was made for
        random_flip: also train on mirrored images; pole and side words in the prompts are swapped with them
        train_batch_size: images per process and forward pass
        gradient_accumulation_steps: forward passes per optimizer step
        max_train_steps: optimizer steps
        num_train_epochs: passes over the training images, mirrored ones too, in place of max_train_steps
        learning_rate: peak learning rate, not scaled by batch or processes
        lr_scheduler: course of the learning rate after warm-up, down to 0 at max_train_steps unless constant
        lr_warmup_steps: optimizer steps of linear warm-up, with every scheduler
        adam_weight_decay: AdamW's weight decay
        max_grad_norm: gradients are scaled down to this global norm
        max_loss: a step with a higher loss, or with numbers that are not finite, changes nothing and ends the training
            (predicting zeros would give a loss of about 1)
        skip_bad_steps: such steps are left out, up to this many in a row, before the training ends
        class_balance: rows are drawn in proportion to (their class's count)^-class_balance: 0 as they come, 1 every
            class equally often
        use_ema: keep a moving average of the weights; it is validated and saved as the model
        ema_decay: upper limit of the average's decay, which rises as (1 + n) / (10 + n) with step n
        seed: data order, noise and dropout are functions of (seed, step, place in the global batch)
        checkpointing_steps: optimizer steps between checkpoints; one is always saved at the end
        checkpoints_total_limit: newest checkpoints kept
        validation_steps: optimizer steps between validation grids; 0: never
        validation_images: images in the grid
        validation_inference_steps: sampler steps for the grid
        log_steps: optimizer steps averaged in each log line
        report_to: where figures and grids are shown besides metrics.jsonl; wandb must be installed, and writes to
            output_dir/wandb unless WANDB_MODE=online
        push_to_hub: upload the finished model to a private repository on huggingface.co
        hub_model_id: that repository, as user/name; default: the output folder's name
        cache_dir: where encoded images and prompts are kept, shareable between runs; default: output_dir/cache
        text_cache_size: distinct prompts whose embeddings are kept on disk while the text encoder is frozen (0.3 MB
            each at the width of SD-2.1); of further ones as many again are kept in memory
        dataloader_num_workers: processes that read ahead; 0: none
        gradient_checkpointing: keep fewer activations and compute them again: less memory, about a third more time
        use_8bit_adam: keep AdamW's moments in 8 bits, a quarter of their memory; needs bitsandbytes
        compile: compile the blocks that the networks repeat (torch.compile): minutes at the start, faster on a GPU
        dry_run: check everything, print sizes and counts, train nothing
    """

    pretrained_model: str
    data_dir: str
    output_dir: str
    split: str = "train"
    validation_split: str = "valid"
    knowledge: str = "thyroid"
    resolution: int | None = None
    random_flip: bool = False
    train_batch_size: int = 4
    gradient_accumulation_steps: int = 1
    max_train_steps: int = 10000
    num_train_epochs: float | None = None
    learning_rate: float = 1e-5
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    lr_warmup_steps: int = 500
    adam_weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    max_loss: float = 100.0
    skip_bad_steps: int = 0
    class_balance: float = 0.0
    use_ema: bool = False
    ema_decay: float = 0.9999
    seed: int = 0
    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 2
    validation_steps: int = 500
    validation_images: int = 4
    validation_inference_steps: int = 20
    log_steps: int = 10
    report_to: Literal["tensorboard", "wandb", "none"] = "tensorboard"
    push_to_hub: bool = False
    hub_model_id: str | None = None
    cache_dir: str | None = None
    text_cache_size: int = 20000
    dataloader_num_workers: int = 0
    gradient_checkpointing: bool = False
    use_8bit_adam: bool = False
    compile: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        for name in (
            "train_batch_size", "gradient_accumulation_steps", "max_train_steps", "checkpointing_steps",
            "checkpoints_total_limit", "validation_images", "validation_inference_steps", "log_steps",
        ):  # fmt: skip
            require(getattr(self, name) >= 1, name, self, "must be at least 1")
        for name in (
            "lr_warmup_steps", "validation_steps", "text_cache_size", "dataloader_num_workers", "seed",
            "skip_bad_steps",
        ):  # fmt: skip
            require(getattr(self, name) >= 0, name, self, "must not be negative")
        for name in ("learning_rate", "max_grad_norm", "max_loss"):
            require(getattr(self, name) > 0, name, self, "must be positive")
        require(self.adam_weight_decay >= 0, "adam_weight_decay", self, "must not be negative")
        require(
            self.num_train_epochs is None or self.num_train_epochs > 0, "num_train_epochs", self, "must be positive"
        )
        require(self.resolution is None or self.resolution >= 8, "resolution", self, "must be at least 8 pixels")
        require(0 <= self.class_balance <= 1, "class_balance", self, "must lie in 0..1")
        require(0 <= self.ema_decay < 1, "ema_decay", self, "must lie in 0..1, below 1")
        if self.use_8bit_adam and importlib.util.find_spec("bitsandbytes") is None:
            raise InputError("--use_8bit_adam needs bitsandbytes: pip install 'bitsandbytes>=0.50,<1'")
        if Path(self.output_dir).resolve() == Path(self.pretrained_model).resolve():
            raise InputError(
                f"--output_dir and --pretrained_model are the same folder, {self.output_dir}: the base would be "
                "overwritten; give another --output_dir"
            )


@dataclass(frozen=True)
class DenoisingConfig(TrainConfig):
    """What the two stages share that learn to predict the noise of noised images.

    Args:
        snr_gamma: min-SNR-gamma weighting of the loss (5 is usual); default: off
        noise_offset: standard deviation of an offset that the noise of a whole channel gets, for very dark and very
            bright images (0.1 is usual)
        text_dropout: probability that a prompt is dropped (trained for classifier-free guidance)
    """

    snr_gamma: float | None = None
    noise_offset: float = 0.0
    text_dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.snr_gamma is None or self.snr_gamma > 0, "snr_gamma", self, "must be positive")
        require(self.noise_offset >= 0, "noise_offset", self, "must not be negative")
        require(0 <= self.text_dropout <= 1, "text_dropout", self, "must lie in 0..1")


@dataclass(frozen=True)
class PretrainConfig(DenoisingConfig):
    """Coarse-Training: the base's U-Net learns to draw images from full prompts.

    Args:
        train_text_encoder: also train the text encoder
        lora_rank: train low-rank adapters of the U-Net's attention instead of its weights; they are merged into the
            finished model, and saved beside it; default: off
        lesion_weight: weight of the error in the nodule and a rim about it, against 1 elsewhere; any but 1 needs masks
            and maps
    """

    train_text_encoder: bool = False
    lora_rank: int | None = None
    lesion_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.lora_rank is None or self.lora_rank >= 1, "lora_rank", self, "must be at least 1")
        require(self.lesion_weight > 0, "lesion_weight", self, "must be positive")


@dataclass(frozen=True)
class FinetuneConfig(DenoisingConfig):
    """Fine-Training: two control encoders and their fusion, on a frozen coarse U-Net.

    Args:
        term_weighting: how the foreground encoder's cross-attention weighs terms: scaled logits, logits plus the
            weight's logarithm, or not at all
        fusion: attentional, iterated attentional, or plain sum
        fusion_gain: factor on the fused residuals
        update: gradients from one pass, each encoder its own loss (separate); one encoder a step (alternate); the sum
            of both losses to everything (joint)
        bg_region: where the background loss is taken: outside the nodule, or everywhere
        timestep_sampling: how often each noise level is trained: all alike, or mostly the high ones, where control
            decides what an image shows: t = (1 - u^3) T
        blank_nodule: the Sobel map is zeroed in the nodule and a rim about it, which the foreground loss then covers
        fg_dropout: probability that an image is trained without its foreground branch
        bg_dropout: probability that an image is trained without its background branch
    """

    term_weighting: Literal["mult", "logbias", "off"] = "mult"
    fusion: Literal["aff", "iaff", "sum"] = "aff"
    fusion_gain: float = 1.0
    update: Literal["separate", "alternate", "joint"] = "separate"
    bg_region: Literal["outside", "full"] = "outside"
    timestep_sampling: Literal["uniform", "cubic"] = "uniform"
    blank_nodule: bool = True
    fg_dropout: float = 0.1
    bg_dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("fg_dropout", "bg_dropout"):
            require(
                0 <= getattr(self, name) < 1, name, self, "must lie in 0..1, below 1: the branch would never be trained"
            )
        require(self.fusion_gain > 0, "fusion_gain", self, "must be positive")


@dataclass(frozen=True)
class DistillConfig(TrainConfig):
    """Step distillation: low-rank adapters of a fine-tuned model's U-Net learn to draw in a few steps.

    Args:
        lora_rank: rank of the adapters; they are merged into the finished model, and saved beside it
        guidance_scale: weight of the prompt that the student learns to draw with (1: off). It is one value, as nothing
            tells the student which: it would learn the average of several
        solver_steps: the teacher walks the noise schedule in this many DDIM steps, the student jumps along them; must
            divide the schedule's number of timesteps
    """

    lora_rank: int = 64
    guidance_scale: float = 7.5
    solver_steps: int = 50
    validation_inference_steps: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lora_rank", "guidance_scale", "solver_steps"):
            require(getattr(self, name) >= 1, name, self, "must be at least 1")


@dataclass(frozen=True)
class GenerationConfig:
    """Synthesis of labelled images from the prompts, masks and Sobel maps of a training set.

    Args:
        model: folder that finetune.sh or distill.sh wrote
        data_dir: the training set (folder with a metadata.jsonl, or that file); only its training rows are used
        output_dir: PNGs and metadata.jsonl go here; the same command makes what is missing
        count: images to make of each class, as FTC=30,MTC=30
        mode: new images from prompt, mask and map (diversify), or variations of real training images (refine)
        prompts: where diversify's prompts come from: the class's training prompts (train); terms drawn from the
            knowledge base (knowledge, Tiger-F); status and subtype names alone (names, Tiger-N); terms drawn one by one
            as often as the class's training rows have them (estimated); train for common and knowledge for rare
            classes (auto)
        emphasis: draw a rare class's terms on the lesion more often where the common classes have them seldom: each
            frequency p is multiplied by (p / its mean over the knowledge base's common classes)^emphasis, and a
            category's are brought back to their sum (0: as the knowledge base says; 0..10)
        knowledge: vocabulary of the organ: a name in configs/knowledge or a YAML file
        branches: both encoders in one pass, one of them alone, or the nodule first and then its surroundings
        steps: sampler steps; ddim wants about 50
        scheduler: sampler; the paper's is ddim; lcm is for models that distill.sh wrote, at 1 to 8 steps
        guidance_scale: weight of the prompt (classifier-free guidance; 1: off)
        guidance_rescale: 0..1, pulls guided predictions back to the spread of unguided ones (arXiv:2305.08891)
        guidance_interval: LOW,HIGH: guide only while the timestep is within these shares of the noise schedule, 0 at
            the image and 1 at pure noise (arXiv:2404.07724); steps outside cost half
        reuse_encoder: run the U-Net's and the control encoders at every k-th step only, and decode their features at
            the steps between as well (arXiv:2312.09608); 1: at every step
        control_uncond: what the unconditional branch gets: no control, as in the paper's eq. 13 (null), or control and
            an empty prompt (text)
        resolution_weighting: weigh each residual by 64 / its size (ControlNet, section 3.4)
        fg_scale: factor on the foreground encoder's residuals
        bg_scale: factor on the background encoder's residuals
        strength: refine: share of the noise schedule a real image goes through, 0..1; default: 0.6
        resolution: image side in pixels; default: what the model was trained at
        batch_size: images per forward pass, all of one class; images are byte-equal only for equal batch sizes, so a
            class's last batch is filled up and what is not asked for is dropped
        dtype: number format of the networks; bfloat16 is for GPUs
        channels_last: memory layout that GPUs like for convolutions
        compile: compile the networks' blocks (torch.compile): minutes at the start, faster from then on
        seed: image i of a class is a function of (model, data, seed, class, i)
        shard: k/n makes the k-th of n parts, k = 0 … n-1; each part may run on a machine of its own, and
            `accelerate launch` splits it over its processes
        device: cuda, cpu, …; auto takes a GPU where there is one
        dry_run: check everything, print what would be made, make nothing
    """

    model: str
    data_dir: str
    output_dir: str
    count: str
    mode: Literal["diversify", "refine"] = "diversify"
    prompts: Literal["auto", "train", "knowledge", "names", "estimated"] = "auto"
    emphasis: float = 0.0
    knowledge: str = "thyroid"
    branches: Literal["fused", "fg", "bg", "fg_then_bg"] = "fused"
    steps: int = 20
    scheduler: Literal["ddim", "dpmsolver++", "unipc", "lcm"] = "dpmsolver++"
    guidance_scale: float = 7.5
    guidance_rescale: float = 0.0
    guidance_interval: str = "0,1"
    reuse_encoder: int = 1
    control_uncond: Literal["null", "text"] = "null"
    resolution_weighting: bool = False
    fg_scale: float = 1.0
    bg_scale: float = 1.0
    strength: float | None = None
    resolution: int | None = None
    batch_size: int = 8
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    channels_last: bool = False
    compile: bool = False
    seed: int = 0
    shard: str = "0/1"
    device: str = "auto"
    dry_run: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "reuse_encoder"):
            require(getattr(self, name) >= 1, name, self, "must be at least 1")
        for name in ("seed", "fg_scale", "bg_scale"):
            require(getattr(self, name) >= 0, name, self, "must not be negative")
        require(self.guidance_scale >= 1, "guidance_scale", self, "must be at least 1")
        require(0 <= self.guidance_rescale <= 1, "guidance_rescale", self, "must lie in 0..1")
        require(self.resolution is None or self.resolution >= 8, "resolution", self, "must be at least 8 pixels")
        require(self.strength is None or 0 < self.strength <= 1, "strength", self, "must lie in 0..1, above 0")
        require(self.strength is None or self.mode == "refine", "strength", self, "is for --mode refine only")
        in_mode = self.mode == "diversify" or self.prompts in ("auto", "train")
        require(in_mode, "prompts", self, "is for --mode diversify: refine keeps each real image's own prompt")
        from_knowledge = self.mode == "diversify" and self.prompts in ("auto", "knowledge")
        needed = "is for --mode diversify with --prompts auto or knowledge"
        require(not self.emphasis or from_knowledge, "emphasis", self, needed)
        require(0 <= self.emphasis <= 10, "emphasis", self, "must lie in 0..10")


def require(condition: bool, name: str, config: Any, message: str) -> None:
    """Raise InputError about the flag `name` unless `condition` holds."""
    if not condition:
        raise InputError(f"--{name} {getattr(config, name)}: {message}")


def parse(config_class: type[ConfigT], argv: list[str] | None = None) -> ConfigT:
    """Read a config dataclass from `argv` (default: the command line) and the `--config` files named there.

    Raises InputError in one line on an unknown flag, a wrong type, a missing file or a contradiction.
    """
    from jsonargparse import ArgumentError, auto_cli

    args = spell_out_booleans(config_class, sys.argv[1:] if argv is None else argv)
    try:
        config: Any = auto_cli(config_class, args=args, as_positional=False, allow_abbrev=False, exit_on_error=False)
    except ArgumentError as error:
        message = re.sub(r"\s+", " ", str(error)).replace("typing.", "")
        message = re.sub(r'Parser key "([^"]+)":', r"--\1:", message)
        raise InputError(f"{message} (--help lists the flags)") from None
    return config


def spell_out_booleans(config_class: type, argv: Sequence[str]) -> list[str]:
    """`--dry_run` alone means `--dry_run=true`."""
    switches = {f"--{field.name}" for field in dataclasses.fields(config_class) if field.type in (bool, "bool")}
    following = itertools.chain(argv[1:], ["--"])
    return [f"{a}=true" if a in switches and b.startswith("--") else a for a, b in zip(argv, following, strict=False)]


def config_text(config: Any) -> str:
    """The config as YAML that `--config` accepts, headed by the code's git commit where there is one."""
    import yaml

    values = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
    return f"# {type(config).__name__}, code at git commit {git_commit() or 'unknown'}\n{values}"


@functools.cache
def git_commit() -> str | None:
    """Hash of the commit of this code that was checked out when first asked, None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def check_resume(config: Any, saved: Path) -> None:
    """Refuse to continue a training under a config that would change its steps, or that is of another stage.

    `saved` is the config file that the training wrote. Raises InputError that names each difference.
    """
    import yaml

    text = saved.read_text(encoding="utf-8")
    stage, header = type(config).__name__, text.partition("\n")[0]
    if not header.startswith(f"# {stage},"):  # as config_text writes it
        raise InputError(
            f"{saved}: was not written by this stage, which starts it with '# {stage}', found {header!r}: give another "
            "--output_dir"
        )
    old = yaml.safe_load(text)
    new = dataclasses.asdict(config)
    free = FREE_ON_RESUME | free_length(config)
    changed = [name for name in new if name in old and name not in free and differs(name, old[name], new[name])]
    if changed:
        differences = "; ".join(f"--{name} was {old[name]}, is {new[name]}" for name in changed)
        raise InputError(
            f"{saved.parent} holds a training with other settings: {differences}. Give the old values to resume, or "
            "another --output_dir to start anew"
        )


def free_length(config: Any) -> set[str]:
    """Which of the two lengths of a training may change: both where the learning rate does not fall towards the end."""
    if config.lr_scheduler == "constant":
        return {"max_train_steps", "num_train_epochs"}
    return set() if config.num_train_epochs is None else {"max_train_steps"}


def differs(name: str, old: Any, new: Any) -> bool:
    """Whether a setting changed; two spellings of one path are the same."""
    if name in PATHS and old and new:
        return old != new and Path(old).resolve() != Path(new).resolve()
    return old != new
