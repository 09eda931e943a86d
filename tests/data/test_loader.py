import os
import struct
from collections import Counter

import numpy as np
import psutil
import pytest

from ossature.data.blend import parse_blend, place
from ossature.data.indexed import HEADER, MAGIC
from tests.data.corpora import first_batch, loader, numbered, rows, step_rows, write_documents

LENGTHS = [3, 2, 9, 5, 1, 20, 7, 4, 12, 30, 2, 8, 41, 6]  # 150 tokens: 18 rows of 8 and 6 more


@pytest.fixture
def corpus(tmp_path):
    return write_documents(tmp_path / "a", numbered(LENGTHS))


def ranks(path, world, **options):
    return [loader(path, rank=rank, world=world, **options) for rank in range(world)]


def test_an_epoch_has_each_token_once(corpus):
    """Four passes of 150 tokens are exactly 75 rows: each token four times."""
    only = loader(corpus, global_batch_rows=1)
    seen = Counter(token for row in rows(only, range(75)) for token in row)

    assert seen == Counter(dict.fromkeys(range(150), 4))
    first = Counter(token for row in rows(only, range(19)) for token in row)
    assert first == Counter(dict.fromkeys(range(150), 1)) + Counter([0, 1])  # of the next epoch


def test_a_row_that_ends_an_epoch_goes_on_with_the_next(corpus):
    only = loader(corpus, global_batch_rows=1)
    (across,) = [row for row in rows(only, range(19)) if row[0] == 144]

    assert across == [144, 145, 146, 147, 148, 149, 0, 1]


def test_documents_and_positions_are_those_of_the_corpus(corpus):
    starts = set(np.cumsum([0, *LENGTHS]))
    for batch in [b for step in range(10) for b in loader(corpus).micro_batches(step)]:
        tokens = batch.tokens[0].tolist()
        begins = [n == 0 or token in starts for n, token in enumerate(tokens)]
        assert batch.document[0].tolist() == (np.cumsum(begins) - 1).tolist()
        assert batch.loss_mask[0].tolist() == [not begin for begin in begins]
        expected = [n - max(m for m in range(n + 1) if begins[m]) for n in range(8)]
        assert batch.position[0].tolist() == expected


def test_the_token_that_ends_a_document_carries_loss(tmp_path):
    end = 199
    path = write_documents(tmp_path / "a", [[1, 2, end], [3, end], [4, 5, 6, end]] * 4)
    batch = first_batch(loader(path, seq_len=36, global_batch_rows=1, vocab_size=200))
    ends = batch.tokens == end

    assert ends.sum() == 12
    assert batch.loss_mask[ends].all()


def test_not_separated_a_row_is_one_document(corpus):
    batch = first_batch(loader(corpus, separate_documents=False))

    assert batch.document.tolist() == [[0] * 8]
    assert batch.position.tolist() == [list(range(8))]
    assert batch.loss_mask.tolist() == [[False] + [True] * 7]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_global_batch_of_one_rank(corpus, world):
    several = ranks(corpus, world, global_batch_rows=8, micro_batch_rows=2)
    for step in range(6):
        alone = step_rows([loader(corpus, global_batch_rows=8, micro_batch_rows=2)], step)
        assert step_rows(several, step) == alone  # as lists: no row twice, none missing


def test_the_seed_decides_the_order_and_no_row_keeps_its_place(tmp_path):
    path = write_documents(tmp_path / "a", numbered([8] * 400))
    first, again, other = (
        rows(loader(path, seed=seed), range(100)) for seed in (1, 1, 2)
    )  # fmt: skip

    assert first == again
    assert first != other
    assert sorted(first) == sorted(other)
    # Shuffled over the whole corpus: one global batch reaches from its beginning to its end.
    places = np.array(first)[:, 0].reshape(-1, 20) / 3200
    assert (np.ptp(places, axis=1) > 0.5).all()
    assert 0.25 < np.abs(np.diff(np.array(first)[:, 0])).mean() / 3200 < 0.42


def test_the_second_epoch_has_another_order(tmp_path):
    path = write_documents(tmp_path / "a", numbered([8] * 40))
    both = rows(loader(path), range(20))

    assert sorted(both[:40]) == sorted(both[40:])
    assert both[:40] != both[40:]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_resumed_anywhere_the_stream_goes_on(corpus, world):
    """Also in the middle of an epoch, also at another number of ranks."""
    whole = [step_rows([loader(corpus, global_batch_rows=8)], step) for step in range(9)]
    before = ranks(corpus, 2, global_batch_rows=8)
    states = []
    for rank in before:
        rows(rank, range(4))
        states.append(rank.state())
    assert states[0] == states[1]
    after = ranks(corpus, world, global_batch_rows=8)
    for rank in after:
        rank.load_state(states[0])

    assert [step_rows(after, step) for step in range(4, 9)] == whole[4:]


def test_resumed_with_another_global_batch_no_row_is_lost(corpus):
    whole = rows(loader(corpus, global_batch_rows=1), range(32))
    first = loader(corpus, global_batch_rows=8)
    seen = rows(first, range(2))
    second = loader(corpus, global_batch_rows=4)
    second.load_state(first.state())

    assert seen + rows(second, range(2, 6)) == whole


def test_a_state_of_other_data_is_refused(corpus, tmp_path):
    state = loader(corpus).state()
    (tmp_path / "moved").mkdir()
    moved = write_documents(tmp_path / "moved/b", numbered(LENGTHS))
    loader(moved).load_state(state)  # the same content at another place is the same data
    raw = bytearray((tmp_path / "moved/b.bin").read_bytes())
    raw[300] ^= 1
    (tmp_path / "moved/b.bin").write_bytes(raw)

    with pytest.raises(ValueError, match="the corpus has changed"):
        loader(moved).load_state(state)
    with pytest.raises(ValueError, match=r"data\.seq_len \(4; then 8\) has changed"):
        loader(corpus, seq_len=4).load_state(state)
    with pytest.raises(ValueError, match="seed"):
        loader(corpus, seed=9).load_state(state)


def test_a_blend_keeps_its_weights(corpus, tmp_path):
    other = write_documents(tmp_path / "b", numbered([16] * 9, first=1000))
    words = ("0.25", str(corpus), "0.75", str(other))
    blend = loader(blend=words, shares="1")
    seen = rows(blend, range(25))
    from_other = [row[0] >= 1000 for row in seen]

    assert sum(from_other) == 75
    assert [int(n) for n in from_other[:8]] == [place(n, (1, 3))[0] for n in range(8)]
    # Each corpus is used pass after pass: 75 rows of 8 are 4 passes of 144 tokens and 3 rows more.
    counts = Counter(token for row in seen for token in row if token >= 1000)
    assert set(counts) == set(range(1000, 1144))
    assert set(counts.values()) <= {4, 5}


def test_memory_does_not_grow_by_what_is_read(tmp_path):
    path = write_documents(tmp_path / "a", [range(4096)] * 8)
    with (tmp_path / "a.idx").open("r+b") as file:  # one document of 256 MiB, empty on the disk
        file.write(HEADER.pack(MAGIC, 1, 4, 1, 2) + struct.pack("<iqqq", 2**26, 0, 0, 1))
        file.truncate()
    os.truncate(tmp_path / "a.bin", 4 * 2**26)
    long = loader(path, seq_len=2**16, global_batch_rows=8)
    rows(long, range(1))
    process = psutil.Process()
    before = process.memory_info().rss
    for step in range(1, 32):
        for batch in long.micro_batches(step):
            del batch

    assert process.memory_info().rss - before < 32 * 2**20


def test_without_weights_a_blend_is_in_proportion_to_size(tmp_path):
    small = write_documents(tmp_path / "a", numbered([8] * 10))
    large = write_documents(tmp_path / "b", numbered([8] * 30, first=1000))
    blend = loader(blend=(f"{small} {large}",), shares="1")
    seen = [token for row in rows(blend, range(10)) for token in row]

    assert sorted(seen) == [*range(80), *range(1000, 1240)]
    assert parse_blend([f"{small} {large}"]).weights is None


def test_validation_is_each_token_once_and_always_the_same(corpus):
    options = {"split": "validation", "shares": "0,1", "global_batch_rows": 4}
    first = loader(corpus, seed=1, **options)
    assert (first.num_rows, first.num_steps) == (19, 5)
    batches = [batch for step in range(first.num_steps) for batch in first.micro_batches(step)]
    kept = [t for b in batches for t in b.tokens[b.document >= 0].tolist()]

    assert sorted(kept) == list(range(150))
    assert sum((batch.document == -1).sum() for batch in batches) == 5 * 4 * 8 - 150
    assert rows(loader(corpus, seed=2, **options), range(5)) == rows(first, range(5))
    for step in range(5):
        assert step_rows(ranks(corpus, 4, **options), step) == step_rows([first], step)


def test_a_part_of_validation_is_its_first_rows(corpus):
    options = {"split": "validation", "shares": "0,1", "global_batch_rows": 4}
    part = loader(corpus, max_rows=6, **options)

    assert (part.num_rows, part.num_steps) == (6, 2)
    assert rows(part, range(2))[:6] == rows(loader(corpus, **options), range(2))[:6]


def test_training_and_validation_share_no_document(corpus):
    train = loader(corpus, shares="10,4", global_batch_rows=1)
    held_out = loader(corpus, shares="10,4", split="validation", global_batch_rows=1)
    seen = {t for row in rows(train, range(30)) for t in row}
    batches = [next(held_out.micro_batches(n)) for n in range(held_out.num_steps)]
    unseen = {t for batch in batches for t in batch.tokens[batch.document >= 0].tolist()}

    assert seen == set(range(sum(LENGTHS[:10])))
    assert unseen == set(range(sum(LENGTHS[:10]), 150))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 149}, "a: token id .* not in the model's vocabulary: vocab_size is 149"),
        ({"world": 3}, r"rows of a global batch \(4\) must be a multiple .* data ranks \(3\)"),
        (
            {"seq_len": 151},
            r"150 tokens of split train do not fill one row of data.seq_len \(151\)",
        ),
        ({"split": "test"}, "no documents in split test"),
        ({"split": "dev"}, r"split \(dev\) must be one of train, validation, test"),
        ({"mock": True}, "give exactly one of data.path, data.blend, blends for each split"),
    ],
)
def test_what_does_not_fit_is_refused(corpus, options, message):
    with pytest.raises(ValueError, match=message):
        rows(loader(corpus, **options), range(20))


def test_nothing_asked_for_is_not_mock():
    with pytest.raises(ValueError, match="give exactly one of"):
        loader()


def test_each_split_may_have_a_blend_of_its_own(tmp_path):
    """A prefix named for a split is of that split as a whole, whatever its shares elsewhere."""
    one = write_documents(tmp_path / "one", numbered([8, 8]))
    two = write_documents(tmp_path / "two", numbered([8, 8], first=100))
    three = write_documents(tmp_path / "three", numbered([16], first=200))
    blends = {
        "train_blend": ("3", str(one), "1", str(two)),
        "validation_blend": (str(three), str(two)),
    }
    train = loader(**blends)
    assert {token for row in rows(train, range(4)) for token in row} == {
        *range(16), *range(100, 116),
    }  # fmt: skip
    assert [sum(row[0] < 100 for row in step_rows([train], n)) for n in range(3)] == [3, 3, 3]
    seen = rows(loader(split="validation", **blends), range(1))
    assert sorted(token for row in seen for token in row) == [*range(100, 116), *range(200, 216)]
    with pytest.raises(ValueError, match=r"data.test_blend is empty, and other splits have"):
        loader(split="test", **blends)
    with pytest.raises(ValueError, match=r"data.split \(9,1\) must be empty with a blend"):
        loader(shares="9,1", **blends)
    with pytest.raises(ValueError, match=r"data.train_blend: slot 2"):
        loader(train_blend=("1", str(one), "x", str(two)))
