"""The tokenizer built from open_clip's vocabulary is CLIP's."""

import random

import torch

from tiger.tokenizer import encode_text, token_ids


def test_agrees_with_open_clip(tokenizer):
    from open_clip.tokenizer import SimpleTokenizer

    oracle = SimpleTokenizer()
    rng = random.Random(0)
    words = [word.removesuffix("</w>") for word in oracle.encoder if word.removesuffix("</w>").isascii()]
    texts = [" ".join(rng.choices(words, k=8)) for _ in range(500)]
    texts += ["malignant, follicular, uneven thick halo", "wider-than-tall", "it's 3.5 cm", "", "naïve café"]
    clean = [text for text in texts if "&" not in text and "<" not in text]  # open_clip also decodes HTML
    assert torch.equal(token_ids(clean, tokenizer), _padded(oracle(clean, context_length=77)))


def _padded(ids: torch.Tensor) -> torch.Tensor:
    """open_clip pads with 0, CLIPTokenizer with the end token."""
    ends = (ids == 49407).int().cumsum(1).bool()
    return torch.where(ends, 49407, ids)


def test_length(tokenizer):
    assert len(tokenizer) == 49408
    assert tokenizer.model_max_length == 77
    assert token_ids(["solid, " * 100, ""], tokenizer).shape == (2, 77)


def test_survives_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    assert loaded.model_max_length == 77
    text = "malignant, follicular, extracapsular"
    assert loaded(text).input_ids == tokenizer(text).input_ids


def test_hidden_states(tokenizer, text_encoder):
    states = encode_text(["solid", "cystic"], tokenizer, text_encoder)
    assert states.shape == (2, 77, 16)
    assert not torch.allclose(states[0], states[1])
