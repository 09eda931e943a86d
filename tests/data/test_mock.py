import numpy as np
import pytest

from ossature.data.mock import entropy, zipf
from tests.data.corpora import first_batch, loader, rows


def tokens_of(count: int, **options) -> np.ndarray:
    made = loader(mock=True, seq_len=512, vocab_size=300, **options)
    return np.array(rows(made, range(count // (512 * made.global_batch_rows))))


def test_tokens_follow_zipf_and_nothing_else():
    """Knowing the token before gives no help: a model can only reach the entropy of the law."""
    tokens = tokens_of(2**19)
    shares = np.bincount(tokens.ravel(), minlength=300) / tokens.size
    pairs = np.zeros((300, 300))
    np.add.at(pairs, (tokens[:, :-1].ravel(), tokens[:, 1:].ravel()), 1)
    pairs /= pairs.sum()
    both = np.outer(pairs.sum(1), pairs.sum(0))
    known = pairs > 0
    information = (pairs[known] * np.log(pairs[known] / both[known])).sum()

    assert np.abs(shares - zipf(300)).max() < 0.003
    assert -(zipf(300) * np.log(shares)).sum() == pytest.approx(entropy(300), abs=0.01)
    assert information < 0.1  # what chance leaves in so small a sample; 1, 2, 3, ... has 5.7


def test_rows_repeat_for_one_seed_and_differ_for_another():
    assert (tokens_of(2**13) == tokens_of(2**13)).all()
    assert (tokens_of(2**13) != tokens_of(2**13, seed=1)).any()


def test_validation_has_rows_of_its_own_whatever_the_seed():
    train = first_batch(loader(mock=True, vocab_size=300))
    validation = first_batch(loader(mock=True, vocab_size=300, split="validation"))
    again = first_batch(loader(mock=True, vocab_size=300, split="validation", seed=5))

    assert (validation.tokens != train.tokens).any()
    assert (validation.tokens == again.tokens).all()
