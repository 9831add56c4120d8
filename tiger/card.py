"""The model card of a finished model, and its upload to huggingface.co."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tiger.files import read_json

WHAT = {
    "coarse": "Draws images of an organ from a report's words: a plain Stable Diffusion pipeline.",
    "fine": "Draws images of an organ from a report's words, a lesion mask and a Sobel map of the surroundings: a "
    "frozen Stable Diffusion with two ControlNets and their attentional fusion.",
    "distilled": "Draws images of an organ from a report's words, a lesion mask and a Sobel map of the surroundings in "
    "1 to 8 steps, guidance built in: a latent consistency model with two ControlNets and their attentional fusion.",
}
USE = {
    "coarse": """from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("FOLDER")
image = pipe("PROMPT", num_inference_steps=25).images[0]""",
    "fine": """from tiger.pipeline import TigerPipeline

pipe = TigerPipeline.from_pretrained("FOLDER")
image = pipe(["PROMPT OF THE LESION"], ["PROMPT OF THE REST"], masks=[mask], maps=[sobel_map]).images[0]""",
    "distilled": """from tiger.pipeline import TigerPipeline

pipe = TigerPipeline.from_pretrained("FOLDER")
options = {"num_inference_steps": 4, "guidance_scale": 1}
image = pipe(["PROMPT OF THE LESION"], ["PROMPT OF THE REST"], masks=[mask], maps=[sobel_map], **options).images[0]""",
}


def model_card(
    stage: str, base: str, *, counts: Mapping[str, int], resolution: int, steps: int, images_per_step: int, config: str
) -> str:
    """Markdown with the header that huggingface.co reads.

    stage: a key of WHAT. counts: training images of each class. config: the settings as YAML, the commit included.
    """
    header: dict[str, Any] = {"library_name": "diffusers", "license": "other", "pipeline_tag": "text-to-image"}
    header["tags"] = ["medical", "ultrasound", "stable-diffusion", *([] if stage == "coarse" else ["controlnet"])]
    if not Path(base).expanduser().exists():  # a hub id
        header["base_model"] = base
    classes = ", ".join(f"{label} {count}" for label, count in counts.items())
    return f"""---
{yaml.safe_dump(header, sort_keys=False).strip()}
---

# Tiger, {stage} stage

{WHAT[stage]} Trained from `{base}` for {steps} steps of {images_per_step} images, on {sum(counts.values())} images at
{resolution} px: {classes}.

```python
{USE[stage]}
```

## Limits

- For research. Not a medical device, and not for diagnosis or treatment.
- A diffusion model can reproduce its training images: treat it, and what it draws, as you treat those images.
- Its licence follows from that of `{base}` and from the terms of the training images.

## Settings

```yaml
{config.strip()}
```
"""


def push(output_dir: Path, repository: str) -> str:
    """Upload the finished model in `output_dir`, and nothing else from there; returns its address.

    A new repository is private. Checkpoints, caches, logs and the validation grids, which show real images, stay here.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    repository = api.create_repo(repository, private=True, exist_ok=True).repo_id
    return str(api.upload_folder(repo_id=repository, folder_path=output_dir, allow_patterns=published(output_dir)))


def published(output_dir: Path) -> list[str]:
    """Patterns of the files that make up the finished model."""
    parts = [name for name in read_json(output_dir / "model_index.json") if not name.startswith("_")]
    return ["README.md", "config.yaml", "model_index.json", "*_lora_weights.safetensors", *(f"{p}/**" for p in parts)]
