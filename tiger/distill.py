r"""Step distillation: adapters of a fine-tuned model's U-Net learn to draw in one to eight steps, without guidance.

    bash distill.sh --config configs/distill-tiny.yaml --data_dir runs/phantom --pretrained_model runs/finetune \
        --output_dir runs/distilled                        # minutes on a CPU; the same command resumes
    bash distill.sh --data_dir data/thyroid --pretrained_model runs/finetune --output_dir runs/distilled    # on a GPU
    bash distill.sh --help                                 # every flag; --dry_run true checks all and trains nothing
    python generation.py --model runs/distilled --scheduler lcm --steps 4 --guidance_scale 1 …    # then
"""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiger.components import Components, check_base, load_components
from tiger.config import DistillConfig, parse
from tiger.errors import InputError, run
from tiger.launch import launch

if TYPE_CHECKING:
    from accelerate import Accelerator

    from tiger.consistency import ConsistencyStage
    from tiger.knowledge import Knowledge


def load_teacher(name: str) -> Components:
    """Load a fine-tuned model. Raises InputError if it is none."""
    from tiger.model import DualControlNet

    check_base(name)
    folder = Path(name).expanduser() / "controlnet"
    if not folder.is_dir():
        raise InputError(f"--pretrained_model {name}: no controlnet in it; give the folder that finetune.sh wrote")
    control = DualControlNet.from_pretrained(folder).requires_grad_(False)
    return dataclasses.replace(load_components(name), controlnet=control)


def make_stage(
    config: DistillConfig,
    components: Components,
    shown: list[dict[str, Any]],
    knowledge: "Knowledge",
    accelerator: "Accelerator",
) -> "ConsistencyStage":
    """Build the stage that the config describes."""
    from tiger.consistency import ConsistencyStage

    return ConsistencyStage(
        components,
        shown,
        accelerator,
        lora_rank=config.lora_rank,
        guidance_scale=config.guidance_scale,
        solver_steps=config.solver_steps,
        learning_rate=config.learning_rate,
        weight_decay=config.adam_weight_decay,
        text_cache_size=config.text_cache_size,
        validation_inference_steps=config.validation_inference_steps,
        use_8bit_adam=config.use_8bit_adam,
        gradient_checkpointing=config.gradient_checkpointing,
        compile=config.compile,
    )


def main(argv: list[str] | None = None) -> None:
    """Train until done or stopped."""
    launch(parse(DistillConfig, argv), make_stage, kind="distilled", with_conditions=True, load=load_teacher)


if __name__ == "__main__":
    sys.exit(run(main))
