"""Flags and YAML files: layering, types, contradictions, and what may change on resume."""

from pathlib import Path

import pytest

from tiger.config import DistillConfig, FinetuneConfig, PretrainConfig, check_resume, config_text, parse
from tiger.errors import InputError

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
NEEDED = ["--pretrained_model=base", "--data_dir=data", "--output_dir=out"]


def test_later_files_and_then_flags_win(tmp_path):
    (tmp_path / "a.yaml").write_text("learning_rate: 1e-4\nseed: 1\nmax_train_steps: 7\n")
    (tmp_path / "b.yaml").write_text("seed: 2\n")
    files = [f"--config={tmp_path / 'a.yaml'}", f"--config={tmp_path / 'b.yaml'}"]
    config = parse(PretrainConfig, [*files, *NEEDED, "--max_train_steps=9"])
    assert (config.learning_rate, config.seed, config.max_train_steps) == (1e-4, 2, 9)


def test_a_switch_needs_no_value():
    config = parse(FinetuneConfig, ["--dry_run", "--use_ema", *NEEDED, "--blank_nodule", "false"])
    assert config.dry_run and config.use_ema and not config.blank_nodule
    assert parse(PretrainConfig, [*NEEDED, "--random_flip"]).random_flip


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--learning_rat=1"], "learning_rat"),
        (["--seed=one"], "--seed"),
        (["--update=sometimes"], "separate"),
        (["--config=nowhere.yaml"], "nowhere.yaml"),
        (["--max_train_steps=0"], "--max_train_steps 0: must be at least 1"),
        (["--fg_dropout=1"], "--fg_dropout 1"),
        (["--class_balance=2"], "--class_balance 2"),
        (["--output_dir=base/"], "same folder"),
    ],
)
def test_wrong_flags_are_refused_in_one_line(argv, message):
    with pytest.raises(InputError) as error:
        parse(FinetuneConfig, [*NEEDED, *argv])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_missing_flags_are_named():
    with pytest.raises(InputError, match="data_dir"):
        parse(PretrainConfig, ["--pretrained_model=base"])


def test_a_typo_in_a_file_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("learning_rat: 1e-4\n")
    with pytest.raises(InputError, match="learning_rat"):
        parse(PretrainConfig, [*NEEDED, f"--config={tmp_path / 'a.yaml'}"])


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_file_is_read(path):
    stages = {"pretrain": PretrainConfig, "finetune": FinetuneConfig, "distill": DistillConfig}
    stage = stages.get(path.stem.split("-")[0])
    if stage is None:
        pytest.skip("not a training stage's file")
    parse(stage, [f"--config={path}", *NEEDED])


def test_the_saved_file_gives_the_same_config(tmp_path):
    config = parse(FinetuneConfig, [*NEEDED, "--snr_gamma=5", "--update=joint"])
    (tmp_path / "config.yaml").write_text(config_text(config))
    assert parse(FinetuneConfig, [f"--config={tmp_path / 'config.yaml'}"]) == config


def test_resume_refuses_what_changes_steps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = tmp_path / "config.yaml"
    saved.write_text(config_text(parse(PretrainConfig, NEEDED)))
    longer = ["--max_train_steps=99", "--checkpointing_steps=3", "--output_dir=elsewhere"]
    check_resume(parse(PretrainConfig, [*NEEDED, *longer, f"--data_dir={tmp_path / 'data'}"]), saved)
    with pytest.raises(InputError, match="--seed was 0, is 1; .*--data_dir was data, is other|--data_dir.*--seed"):
        check_resume(parse(PretrainConfig, [*NEEDED, "--seed=1", "--data_dir=other"]), saved)
    with pytest.raises(InputError, match="not written by this stage, .* '# FinetuneConfig', found '# PretrainConfig"):
        check_resume(parse(FinetuneConfig, NEEDED), saved)
