"""Which token gets which weight."""

import pytest
import torch

from tiger.attention import term_weight
from tiger.knowledge import Knowledge
from tiger.terms import TermFrequencies, token_weights

OTHER = term_weight(1.0)
PARTICULAR = term_weight(0.0)


@pytest.fixture(scope="module")
def knowledge() -> Knowledge:
    return Knowledge.load("thyroid")


def weights_by_token(text, tokenizer, knowledge, frequencies=None):
    """[(token, weight)] without padding, and the weights of the padding."""
    weights = token_weights([text], tokenizer, knowledge, frequencies or TermFrequencies())[0]
    ids = tokenizer(text).input_ids
    tokens = [t.removesuffix("</w>") for t in tokenizer.convert_ids_to_tokens(ids)]
    return list(zip(tokens, weights[: len(ids)].tolist(), strict=True)), weights[len(ids) :]


def test_a_particular_term_weighs_most_on_all_its_subwords(tokenizer, knowledge):
    pairs, padding = weights_by_token("malignant, follicular, uneven thick halo, extracapsular", tokenizer, knowledge)
    heavy = [token for token, weight in pairs if weight == pytest.approx(PARTICULAR)]
    assert heavy[:3] == ["uneven", "thick", "halo"]
    assert len(heavy) > 4  # "extracapsular" is several subwords
    assert "".join(heavy[3:]) == "extracapsular"
    light = [weight for token, weight in pairs if token not in heavy]
    assert light == pytest.approx([OTHER] * len(light))  # begin, end, commas, status and subtype
    assert torch.allclose(padding, torch.tensor(OTHER))


def test_the_class_of_a_term_depends_on_the_subtype(tokenizer, knowledge):
    pairs, _ = weights_by_token("malignant, papillary, uneven thick halo", tokenizer, knowledge)
    assert dict(pairs)["thick"] < PARTICULAR - 0.1


def test_a_joint_term_weighs_by_its_frequency(tokenizer, knowledge):
    term = sorted(t for t in knowledge.subtypes["FTC"].joint if " " not in t)[0]
    text = f"malignant, follicular, {term}"
    frequencies = TermFrequencies({term: 1, "others": 3})
    pairs, _ = weights_by_token(text, tokenizer, knowledge, frequencies)
    assert "".join(token for token, weight in pairs if weight == pytest.approx(term_weight(0.25))) == term
    rare, _ = weights_by_token(text, tokenizer, knowledge, TermFrequencies({term: 1, "others": 99}))
    assert "".join(token for token, weight in rare if weight == pytest.approx(term_weight(0.01))) == term


def test_no_text_no_terms(tokenizer, knowledge):
    assert torch.allclose(token_weights([""], tokenizer, knowledge, TermFrequencies()), torch.tensor(OTHER))


def test_a_long_prompt_is_cut(tokenizer, knowledge):
    weights = token_weights(["solid, " * 100], tokenizer, knowledge, TermFrequencies())
    assert weights.shape == (1, 77)


def test_spaces_and_capitals_keep_the_offsets(tokenizer, knowledge):
    pairs, _ = weights_by_token("Malignant,   FOLLICULAR,  uneven  thick halo", tokenizer, knowledge)
    assert [token for token, weight in pairs if weight > 3] == ["uneven", "thick", "halo"]


def test_frequencies_are_shares_of_all_terms(knowledge):
    batch = ["malignant, papillary, solid, hypoechoic", "benign, solid"]  # six terms, "solid" twice
    frequencies = TermFrequencies.of(batch, knowledge)
    assert frequencies.counts.total() == 6
    assert frequencies.tau("solid") == pytest.approx(2 / 6)
    assert frequencies.tau("cystic") == 0
    assert TermFrequencies().tau("solid") == 0


def test_update_accumulates(knowledge):
    running = TermFrequencies({"solid": 2})
    running.update(TermFrequencies({"solid": 1, "cystic": 1}))
    assert running.tau("solid") == pytest.approx(3 / 4)
