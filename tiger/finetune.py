r"""Fine-Training: two control encoders, for the nodule and for the rest, and their fusion, on a frozen coarse model.

    bash finetune.sh --config configs/finetune-tiny.yaml --data_dir runs/phantom --pretrained_model runs/pretrain \
        --output_dir runs/finetune                         # minutes on a CPU; the same command resumes
    bash finetune.sh --data_dir data/thyroid --pretrained_model runs/pretrain --output_dir runs/finetune    # on a GPU
    bash finetune.sh --help                                # every flag; --dry_run true checks all and trains nothing
"""

import sys
from typing import TYPE_CHECKING, Any

from tiger.config import FinetuneConfig, parse
from tiger.errors import run
from tiger.launch import launch

if TYPE_CHECKING:
    from accelerate import Accelerator

    from tiger.components import Components
    from tiger.fine import FineStage
    from tiger.knowledge import Knowledge


def make_stage(
    config: FinetuneConfig,
    components: "Components",
    shown: list[dict[str, Any]],
    knowledge: "Knowledge",
    accelerator: "Accelerator",
) -> "FineStage":
    """Build the stage that the config describes."""
    from tiger.fine import FineStage

    return FineStage(
        components,
        shown,
        knowledge,
        accelerator,
        knowledge_name=config.knowledge,
        term_weighting=config.term_weighting,
        fusion=config.fusion,
        fusion_gain=config.fusion_gain,
        update=config.update,
        bg_region=config.bg_region,
        learning_rate=config.learning_rate,
        weight_decay=config.adam_weight_decay,
        snr_gamma=config.snr_gamma,
        timestep_sampling=config.timestep_sampling,
        noise_offset=config.noise_offset,
        text_dropout=config.text_dropout,
        fg_dropout=config.fg_dropout,
        bg_dropout=config.bg_dropout,
        text_cache_size=config.text_cache_size,
        validation_inference_steps=config.validation_inference_steps,
        use_8bit_adam=config.use_8bit_adam,
        gradient_checkpointing=config.gradient_checkpointing,
        compile=config.compile,
    )


def main(argv: list[str] | None = None) -> None:
    """Train until done or stopped."""
    config = parse(FinetuneConfig, argv)
    launch(
        config,
        make_stage,
        kind="fine",
        with_conditions=True,
        blank_nodule=config.blank_nodule,
        find_unused_parameters=config.update == "alternate",  # one encoder a step
    )


if __name__ == "__main__":
    sys.exit(run(main))
