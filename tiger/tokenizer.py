"""The CLIP tokenizer, built offline, and text -> hidden states."""

import gzip
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

MAX_LENGTH = 77  # tokens CLIP's text encoder takes, begin and end included


def build_clip_tokenizer() -> CLIPTokenizer:
    """OpenAI's CLIP tokenizer from the vocabulary that open_clip_torch ships. 49408 entries, `model_max_length` 77."""
    package = importlib.util.find_spec("open_clip")  # located, not imported: that would take seconds
    if package is None or package.origin is None:
        raise ModuleNotFoundError("open_clip_torch is not installed; run: pip install -r requirements.txt")
    with gzip.open(Path(package.origin).with_name("bpe_simple_vocab_16e6.txt.gz"), "rt", encoding="utf-8") as file:
        # The header line goes; so do the merges past CLIP's vocabulary (openai/CLIP simple_tokenizer.py, line 67).
        lines = file.read().split("\n")[1 : 49152 - 256 - 2 + 1]
    merges = [tuple(line.split()) for line in lines]
    characters = list(bytes_to_unicode().values())
    tokens = characters + [c + "</w>" for c in characters] + ["".join(merge) for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(tokens)}
    # `vocab_file=`/`merges_file=` would silently build a two-token tokenizer in transformers 5.
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH)  # type: ignore[arg-type]


def token_ids(texts: Sequence[str], tokenizer: CLIPTokenizer) -> torch.Tensor:
    """(B,) texts -> (B, 77) int64, padded and cut."""
    return tokenizer(
        list(texts), padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


def forget_calls(tokenizer: CLIPTokenizer) -> None:
    """Undo what a call leaves in the tokenizer, its padding and cutting, which `save_pretrained` would write too."""
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()


def encode_text(texts: Sequence[str], tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> torch.Tensor:
    """(B,) texts -> (B, 77, D) last hidden states, as Stable Diffusion uses them (no attention mask)."""
    return text_encoder(token_ids(texts, tokenizer).to(text_encoder.device))[0]
