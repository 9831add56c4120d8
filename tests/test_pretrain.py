"""Coarse-Training from its command line, on tiny random models of every layout."""

import errno
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import LAYOUTS
from diffusers import DiffusionPipeline
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from training_samples import SIDE, differing, flags, save_base, save_data

from tiger import finetune, pretrain
from tiger.components import load_components
from tiger.errors import InputError, WorkFailed, run
from tiger.generate import model_resolution

ROOT = Path(__file__).resolve().parents[1]
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return save_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    return {layout: save_base(tmp_path_factory.mktemp(layout), layout) for layout in LAYOUTS}


def train(base: Path, data: Path, output_dir: Path, **values: object) -> None:
    pretrain.main(flags(pretrained_model=base, data_dir=data, output_dir=output_dir, **values))


def test_every_layout_trains_and_loads_in_plain_diffusers(layout, bases, data, tmp_path):
    train(bases[layout], data, tmp_path, snr_gamma=5, use_ema="true", class_balance=0.5, validation_steps=2)
    assert len(differing(tmp_path / UNET, bases[layout] / UNET)) > 100
    for frozen in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert not differing(tmp_path / frozen, bases[layout] / frozen)
    pipe = DiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("benign", num_inference_steps=2, output_type="np").images.shape[0] == 1
    before, after = (json.loads((d / "scheduler/scheduler_config.json").read_text()) for d in (bases[layout], tmp_path))
    assert before == after
    assert (tmp_path / "validation" / "step-2.png").stat().st_size > 1000
    assert list((tmp_path / "logs").iterdir())
    loss = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(loss) == 2 and all(0 < value < 10 for value in loss)


def test_resume_is_bit_equal_and_the_same_command_is_then_done(bases, data, tmp_path, capsys):
    options = {"use_ema": "true", "train_text_encoder": "true", "gradient_accumulation_steps": 2}
    train(bases["tiny"], data, tmp_path / "whole", max_train_steps=3, checkpointing_steps=1, **options)
    train(bases["tiny"], data, tmp_path / "cut", max_train_steps=1, checkpointing_steps=1, **options)
    train(bases["tiny"], data, tmp_path / "cut", max_train_steps=3, checkpointing_steps=1, **options)
    for name in (UNET, "text_encoder/model.safetensors"):
        assert not differing(tmp_path / "whole" / name, tmp_path / "cut" / name)
        assert differing(tmp_path / "whole" / name, bases["tiny"] / name)
    for name in ("ema.safetensors", "optimizer-0.safetensors"):
        a, b = (tmp_path / run / "checkpoint-3" / name for run in ("whole", "cut"))
        assert not differing(a, b)
    assert "seed: 0" in (tmp_path / "cut" / "checkpoint-3" / "config.yaml").read_text()
    capsys.readouterr()
    train(bases["tiny"], data, tmp_path / "cut", max_train_steps=3, checkpointing_steps=1, **options)
    assert "nothing to do" in capsys.readouterr().out
    train(bases["tiny"], data, tmp_path / "cut", max_train_steps=2, checkpointing_steps=1, **options)
    assert "finished model of step 3: nothing to do" in capsys.readouterr().out
    with pytest.raises(InputError, match="--learning_rate was 0.001, is 0.1"):
        train(bases["tiny"], data, tmp_path / "cut", max_train_steps=9, learning_rate=0.1, **options)


def test_a_finished_folder_takes_no_other_command(bases, data, tmp_path):
    train(bases["tiny"], data, tmp_path, max_train_steps=1)
    for checkpoint in tmp_path.glob("checkpoint-*"):  # deleted to save space
        shutil.rmtree(checkpoint)
    for changed in ({"learning_rate": 0.1}, {"max_train_steps": 9, "seed": 5}):
        with pytest.raises(InputError, match="training with other settings"):
            train(bases["tiny"], data, tmp_path, **({"max_train_steps": 1} | changed))
    with pytest.raises(InputError, match="not written by this stage"):
        finetune.main(flags(pretrained_model=bases["tiny"], data_dir=data, output_dir=tmp_path, max_train_steps=1))


def refusal(main, **values: object) -> str:
    with pytest.raises(InputError) as error:
        main(flags(**values))
    return str(error.value)


def test_what_a_name_stands_for_must_not_change(bases, data, tmp_path, monkeypatch):
    """The base's weights, the rows, their files and the global batch count, not only how they are called."""
    base = shutil.copytree(bases["tiny"], tmp_path / "base")
    rows = shutil.copytree(data, tmp_path / "data")
    given = {"pretrained_model": base, "data_dir": rows, "output_dir": tmp_path / "out", "max_train_steps": 1}
    pretrain.main(flags(**given))
    longer = given | {"max_train_steps": 2, "dry_run": "true"}
    pretrain.main(flags(**longer))
    pretrain.main(flags(**longer | {"train_batch_size": 1, "gradient_accumulation_steps": 2}))  # the same images a step
    assert "images a step was 2, is 4" in refusal(pretrain.main, **longer | {"gradient_accumulation_steps": 2})
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert "precision was no, is bf16" in refusal(pretrain.main, **longer)
    monkeypatch.undo()
    AcceleratorState._reset_state(reset_partial_state=True)
    text = (rows / "metadata.jsonl").read_text()
    (rows / "metadata.jsonl").write_text(text.replace("uneven thick halo", "no halo"))
    assert "training rows was " in refusal(pretrain.main, **longer)
    (rows / "metadata.jsonl").write_text(text)
    image = (rows / "file_name" / "0.png").read_bytes()
    (rows / "file_name" / "0.png").write_bytes((rows / "file_name" / "1.png").read_bytes())
    assert "images was " in refusal(pretrain.main, **longer)
    (rows / "file_name" / "0.png").write_bytes(image)
    tokenizer = json.loads((base / "tokenizer" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["solid</w>"], vocabulary["halo</w>"] = vocabulary["halo</w>"], vocabulary["solid</w>"]
    (base / "tokenizer" / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "on other inputs: tokenizer was " in refusal(pretrain.main, **longer)
    weights = load_file(base / UNET)
    weights["conv_in.bias"] = weights["conv_in.bias"] + 1e-3
    save_file(weights, base / UNET, metadata={"format": "pt"})
    assert "pretrained_model was " in refusal(pretrain.main, **longer)


@pytest.mark.parametrize("scheduler", ["linear", "cosine"])
def test_a_falling_rate_fixes_the_length(scheduler, bases, data, tmp_path):
    """The rate would jump."""
    given = {"pretrained_model": bases["tiny"], "data_dir": data, "output_dir": tmp_path, "lr_scheduler": scheduler}
    pretrain.main(flags(**given, max_train_steps=1))
    assert "--max_train_steps was 1, is 2" in refusal(pretrain.main, **given, max_train_steps=2)


def test_what_an_older_version_did_not_note_is_not_compared(bases, data, tmp_path):
    train(bases["tiny"], data, tmp_path, max_train_steps=1)
    noted = json.loads((tmp_path / "inputs.json").read_text())
    del noted["tokenizer"]
    (tmp_path / "inputs.json").write_text(json.dumps(noted))
    train(bases["tiny"], data, tmp_path, max_train_steps=2, dry_run="true")


def test_a_disk_that_is_full_from_the_start_is_told_in_one_line(bases, data, tmp_path, monkeypatch):
    def full(path: Path, value: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tiger.launch.write_json", full)
    with pytest.raises(WorkFailed, match="is full .*there was no checkpoint yet"):
        train(bases["tiny"], data, tmp_path)


def test_a_run_that_came_to_no_checkpoint_binds_nobody(bases, data, tmp_path, monkeypatch):
    def no_cache(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr("tiger.dataset.cache_latents", no_cache)
        train(bases["tiny"], data, tmp_path, seed=1)
    assert "seed: 1" in (tmp_path / "config.yaml").read_text()
    train(bases["tiny"], data, tmp_path, seed=2, max_train_steps=1)
    assert "seed: 2" in (tmp_path / "config.yaml").read_text()


def test_epochs_count_mirrored_images_and_rule_over_steps(bases, data, tmp_path, capsys):
    options = {"num_train_epochs": 1.5, "random_flip": "true", "max_train_steps": 1}
    train(bases["tiny"], data, tmp_path, **options)  # 9 images, 18 with mirrored ones, 2 a step
    assert json.loads((tmp_path / "finished.json").read_text()) == {"step": 14}
    capsys.readouterr()
    train(bases["tiny"], data, tmp_path, **options)
    assert "finished model of step 14: nothing to do" in capsys.readouterr().out


def test_lesions_count_more_where_asked(bases, data, tmp_path):
    for weight in (1, 4):
        train(bases["tiny"], data, tmp_path / str(weight), max_train_steps=1, lesion_weight=weight, log_steps=1)
    plain, heavy = (
        json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])["loss"] for name in ("1", "4")
    )
    assert plain != pytest.approx(heavy, rel=1e-4)


def test_lora_trains_adapters_and_merges_them(bases, data, tmp_path):
    options = {"lora_rank": 2, "checkpointing_steps": 1, "use_ema": "true"}
    train(bases["tiny"], data, tmp_path / "whole", max_train_steps=3, **options)
    train(bases["tiny"], data, tmp_path / "cut", max_train_steps=1, **options)
    train(bases["tiny"], data, tmp_path / "cut", max_train_steps=3, **options)
    changed = differing(tmp_path / "whole" / UNET, bases["tiny"] / UNET)
    assert changed and all(".to_" in name and name.endswith("weight") for name in changed)
    assert not differing(tmp_path / "whole" / UNET, tmp_path / "cut" / UNET)
    saved = load_file(tmp_path / "whole" / "checkpoint-3" / "unet_lora.safetensors")
    assert all("lora" in name for name in saved) and not (tmp_path / "whole" / "checkpoint-3" / "unet").exists()
    prompt = {"prompt": "benign", "num_inference_steps": 2, "output_type": "np"}
    merged = DiffusionPipeline.from_pretrained(tmp_path / "whole")
    adapted = DiffusionPipeline.from_pretrained(bases["tiny"])
    adapted.load_lora_weights(tmp_path / "whole")
    drawn = [pipe(**prompt, generator=torch.Generator().manual_seed(0)).images for pipe in (merged, adapted)]
    assert np.allclose(drawn[0], drawn[1], atol=1e-4)


def test_the_card_tells_what_was_trained(bases, data, tmp_path):
    train(bases["tiny"], data, tmp_path, max_train_steps=1)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffusers\n") and "9 images at\n64 px: PTC 7, FTC 1, benign 1" in card
    assert "code at git commit" in card and "max_train_steps: 1" in card


def test_only_the_model_is_uploaded_and_only_where_asked(bases, data, tmp_path, monkeypatch):
    """Not the validation grids, which show real images, nor caches and checkpoints. After a failure, once more."""
    out = tmp_path / "thyroid"
    given = {"pretrained_model": bases["tiny"], "data_dir": data, "output_dir": out, "max_train_steps": 1}
    asked = given | {"push_to_hub": "true", "validation_steps": 1}
    assert "--push_to_hub needs a token" in refusal(pretrain.main, **asked)
    monkeypatch.setenv("HF_TOKEN", "hf_none")
    assert "'a/b/c'. Use `repo_type` argument if needed. Give another --hub_model_id" in refusal(
        pretrain.main, **asked, hub_model_id="a/b/c"
    )
    sent = {}

    def upload(self, *, repo_id, folder_path, allow_patterns):
        names = (path.relative_to(folder_path).as_posix() for path in folder_path.rglob("*") if path.is_file())
        sent[repo_id] = sorted(filter_repo_objects(names, allow_patterns=allow_patterns))
        return "https://huggingface.co/x"

    def create(self, repo_id, *, private, exist_ok):
        assert private
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    def offline(self, *_, **__):
        raise OSError("no route to\nhost")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", offline)
    pretrain.main(flags(**given | {"output_dir": tmp_path / "kept"}))
    with pytest.raises(WorkFailed, match=r"upload failed \(no route to host\).* the same command uploads it"):
        pretrain.main(flags(**asked))
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", create)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    monkeypatch.setenv("RANK", "1")  # one of several processes, and not the first
    pretrain.main(flags(**asked))
    assert not sent
    monkeypatch.delenv("RANK")
    pretrain.main(flags(**asked))  # trained already
    folders = {name.partition("/")[0] for name in sent["me/thyroid"]}
    parts = {"unet", "vae", "text_encoder", "tokenizer", "scheduler"}
    assert folders == parts | {"README.md", "config.yaml", "model_index.json"}


def test_what_does_not_go_with_sharding_is_refused(bases, data, tmp_path, monkeypatch):
    given = {"pretrained_model": bases["tiny"], "data_dir": data, "output_dir": tmp_path}
    with monkeypatch.context() as deepspeed:
        deepspeed.setenv("ACCELERATE_USE_DEEPSPEED", "true")
        said = refusal(pretrain.main, **given)
    for part in ("configured for DeepSpeed", "before a bad step can be left out", "pickles", "accelerate/zero2.yaml"):
        assert part in said
    assert "\n" not in said
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "does not go with fsdp_version: 1" in refusal(pretrain.main, **given)
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert "does not go with --compile" in refusal(pretrain.main, **given, compile="true")
    with monkeypatch.context() as half:
        half.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
        assert "does not go with mixed_precision: fp16; give bf16" in refusal(pretrain.main, **given)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    assert "does not go with fsdp_cpu_ram_efficient_loading" in refusal(pretrain.main, **given)


def test_a_tracker_that_is_missing_is_named(bases, data, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = refusal(pretrain.main, pretrained_model=bases["tiny"], data_dir=data, output_dir=tmp_path, report_to="wandb")
    assert "--report_to wandb needs wandb" in said


def test_the_trained_model_is_a_base_in_turn(bases, data, tmp_path):
    train(bases["tiny"], data, tmp_path / "first", max_train_steps=1)
    train(tmp_path / "first", data, tmp_path / "second", max_train_steps=1)
    assert differing(tmp_path / "first" / UNET, tmp_path / "second" / UNET)


def test_a_base_in_half_precision_is_trained_in_full(bases, data, tmp_path):
    half = DiffusionPipeline.from_pretrained(bases["tiny"], torch_dtype=torch.float16)
    half.save_pretrained(tmp_path / "half")
    parts = load_components(str(tmp_path / "half"))
    assert {p.dtype for network in parts.networks for p in network.parameters()} == {torch.float32}
    train(tmp_path / "half", data, tmp_path / "out", max_train_steps=1)
    assert load_file(tmp_path / "out" / UNET)["conv_in.weight"].dtype == torch.float32


def test_dry_run_writes_nothing(bases, data, tmp_path, capsys):
    train(bases["tiny"], data, tmp_path / "out", dry_run="true")
    assert not (tmp_path / "out").exists()
    said = capsys.readouterr().out
    assert "9 images of 9 patients at 64 px: PTC 7, FTC 1, benign 1" in said
    assert "M parameters trained" in said and "2 steps of 2 images, 0.4 epochs" in said
    assert "GiB a process" in said and "GFLOP an image" in said and " hours at " in said


def test_dry_run_estimates_memory_and_time(bases, data, tmp_path, capsys, monkeypatch):
    """Weights are 4 bytes each; gradients, two moments and the average of what is trained 16 more."""
    monkeypatch.setattr("tiger.flops.peak", lambda device, half: 1e12)
    train(bases["tiny"], data, tmp_path / "out", dry_run="true", use_ema="true", max_train_steps=10**9)
    said = capsys.readouterr().out
    trained, frozen, gibibytes = (
        float(found) for found in re.findall(r"([\d.]+) (?:M parameters trained|M frozen|GiB a process)", said)
    )
    assert gibibytes == pytest.approx((20 * trained + 4 * frozen) * 1e6 / 2**30, abs=0.006)
    gigaflops = float(re.search(r"work: ([\d.]+) GFLOP an image", said)[1])
    hours = float(re.search(r"([\d.e+]+) hours at 30% of the devices' peak", said)[1])
    assert hours == pytest.approx(gigaflops * 1e9 * 2 * 10**9 / (0.3 * 1e12) / 3600, rel=0.01)  # 2 images a step
    monkeypatch.undo()
    monkeypatch.setattr("tiger.flops.product_rate", lambda device: 1e12)
    train(bases["tiny"], data, tmp_path / "out", dry_run="true", use_ema="true", max_train_steps=10**9)
    slower = float(
        re.search(r"([\d.e+]+) hours at 80% of the speed of matrix products here", capsys.readouterr().out)[1]
    )
    assert slower == pytest.approx(hours * 0.3 / 0.8, rel=0.01)


def refused(base: Path, data: Path, output_dir: Path, **values: object) -> str:
    """What a bad command prints; it must end with exit code 2 before anything is written."""
    argv = flags(pretrained_model=base, data_dir=data, output_dir=output_dir, **values)
    with pytest.raises(InputError) as error:
        pretrain.main(argv)
    assert run(pretrain.main, argv) == 2 and not (output_dir / "checkpoint-1").exists()
    return str(error.value)


def test_bases_that_are_none(bases, data, tmp_path):
    out = tmp_path / "out"
    assert "no such folder" in refused(tmp_path / "nowhere", data, out)
    assert "no model_index.json" in refused(data, data, out)
    assert "is a file" in refused(data / "metadata.jsonl", data, out)
    (tmp_path / "unfinished" / "checkpoint-7").mkdir(parents=True)
    assert "checkpoints up to step 7 but no finished model" in refused(tmp_path / "unfinished", data, out)
    partial = shutil.copytree(bases["tiny"], tmp_path / "partial")
    shutil.rmtree(partial / "tokenizer")
    assert "lacks tokenizer" in refused(partial, data, out)
    (partial / "tokenizer").mkdir()
    (partial / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"torn")
    assert "cannot be loaded" in refused(partial, data, out)


def test_bad_data_is_listed_before_anything_is_loaded(bases, tmp_path, monkeypatch):
    folder = save_data(tmp_path / "data", 8)
    (folder / "file_name" / "1.png").unlink()
    (folder / "file_name" / "3.png").write_bytes(b"no image")
    monkeypatch.setattr("tiger.components.load_components", lambda name: pytest.fail("loaded a model"))
    said = refused(bases["tiny"], folder, tmp_path / "out")
    assert "file_name/1.png" in said and "file_name/3.png" in said


def test_class_balance_without_labels_fails_before_anything_is_loaded(bases, tmp_path, monkeypatch):
    folder = save_data(tmp_path / "data", 8)
    text = (folder / "metadata.jsonl").read_text()
    (folder / "metadata.jsonl").write_text(text.replace('"label": "FTC", ', ""))
    monkeypatch.setattr("tiger.components.load_components", lambda name: pytest.fail("loaded a model"))
    said = refused(bases["tiny"], folder, tmp_path / "out", class_balance=0.5, dry_run="true")
    assert "--class_balance needs a label in every row, and 1 have none, first file_name/4.png" in said


def test_wrong_splits_and_sizes(bases, data, tmp_path):
    assert "no row has split 'test'; there are train, valid" in refused(bases["tiny"], data, tmp_path, split="test")
    assert "--resolution 50: this base needs a multiple of 32" in refused(bases["tiny"], data, tmp_path, resolution=50)


def test_a_model_says_at_which_size_it_was_trained(bases, data, tmp_path):
    coarse, fine = tmp_path / "coarse", tmp_path / "fine"
    train(bases["tiny"], data, coarse, max_train_steps=1, resolution=32)
    finetune.main(flags(pretrained_model=coarse, data_dir=data, output_dir=fine, max_train_steps=1))
    assert [model_resolution(str(folder)) for folder in (bases["tiny"], coarse, fine)] == [SIDE, 32, 32]


def test_a_patient_in_two_splits_is_refused(bases, tmp_path):
    folder = save_data(tmp_path / "data", 8)
    text = (folder / "metadata.jsonl").read_text()
    (folder / "metadata.jsonl").write_text(text.replace('"P7"', '"P0"'))
    assert "patient P0" in refused(bases["tiny"], folder, tmp_path / "out")


def test_a_synthetic_row_made_from_a_held_out_image_is_refused(bases, tmp_path):
    folder = save_data(tmp_path / "data", 4)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    rows[1] |= {"synthetic": True, "derived_from": [rows[0]["file_name"], rows[3]["file_name"]]}
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = refused(bases["tiny"], folder, tmp_path / "out")
    assert "file_name/1.png derives from file_name/3.png, which is in valid: leave the synthetic row out" in said
    rows[1]["derived_from"].pop()
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(bases["tiny"], folder, tmp_path / "out", dry_run="true")


def test_the_script_runs_from_any_folder(bases, data, tmp_path):
    argv = flags(pretrained_model=bases["tiny"], data_dir="data", output_dir="out", max_train_steps=1)
    (tmp_path / "data").symlink_to(data)
    script = ["bash", str(ROOT / "pretrain.sh")]
    done = subprocess.run([*script, *argv], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model_index.json").exists() and "use_ema: true" in (
        tmp_path / "out" / "config.yaml"
    ).read_text()
    bad = subprocess.run([*script, *argv, "--seed=x"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert bad.returncode == 2 and bad.stderr.startswith("error: --seed") and bad.stderr.count("\n") == 1


def test_wrong_flags_fail_before_torch_is_loaded():
    code = "import sys; from tiger import pretrain, finetune; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
