"""Golden losses: unchanged maths means unchanged losses.

tests/golden.json holds loss and gradient norm of five steps of each stage, on random weights from fixed seeds, float32
on a CPU. After a change of the maths that is meant, write it anew and say in the commit why:

    python -m pytest tests/test_golden.py --golden-write
"""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import awaken
from training_samples import flags, save_base, save_data

from tiger import finetune, pretrain
from tiger.model import DualControlNet

GOLDEN = Path(__file__).with_name("golden.json")
TOLERANCE = 1e-4  # relative; two threads instead of one change 6e-7, a second-moment decay of .99 changes 4e-4
SETTINGS = {
    "max_train_steps": 5, "train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3,
    "lr_scheduler": "cosine", "lr_warmup_steps": 2, "snr_gamma": 5, "noise_offset": 0.1, "class_balance": 0.5,
    "text_dropout": 0.3, "random_flip": "true", "report_to": "none",
    "adam_weight_decay": 1,  # or five steps would not show it
}  # fmt: skip
FINE = {"fg_dropout": 0.3, "bg_dropout": 0.3, "timestep_sampling": "cubic"}
LOUDER = 10  # factor on the FG-Encoder's cross-attention: at random it is faint and even, and term weights do not show


def run(stage: str, folder: Path) -> dict[str, list[float]]:
    """Every logged loss and gradient norm of a stage's five steps."""
    base, data = save_base(folder / "base"), save_data(folder / "data")
    more = FINE if stage == "fine" else {}
    argv = flags(pretrained_model=base, data_dir=data, output_dir=folder / "out", **SETTINGS, **more)
    {"coarse": pretrain, "fine": finetune}[stage].main(argv)
    lines = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    return {name: [line[name] for line in lines] for name in lines[0] if name.startswith(("loss", "grad_norm"))}


@pytest.mark.parametrize("stage", ["coarse", "fine"])
def test_losses_are_what_they_were(stage, tmp_path, monkeypatch, request):
    from_unet = DualControlNet.from_unet

    def trained(*args: Any, **options: Any) -> DualControlNet:
        """As after training: a new one adds nothing, and hides what it does."""
        model = awaken(from_unet(*args, **options))
        for name, layer in model.fg.named_modules():
            if name.endswith("attn2"):
                for linear in (layer.to_k, layer.to_v, layer.to_out[0]):
                    linear.weight.data.mul_(LOUDER)
        return model

    monkeypatch.setattr(DualControlNet, "from_unet", trained)
    found = run(stage, tmp_path)
    known = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if request.config.getoption("--golden-write"):
        GOLDEN.write_text(json.dumps(known | {stage: found}, indent=1) + "\n")
    else:
        assert found.keys() == known[stage].keys()
        for name, values in known[stage].items():
            assert found[name] == pytest.approx(values, rel=TOLERANCE), name
