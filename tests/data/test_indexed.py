import struct
from pathlib import Path

import numpy as np
import pytest

from ossature.data.indexed import IndexedTokens, Writer
from tests.data.corpora import numbered, write_documents

# Documents of 3 and 2 tokens, int32: the 82 bytes written down by hand.
HEADER = "4d4d494449445800 00 0100000000000000 04 0200000000000000 0300000000000000"
LENGTHS = "03000000 02000000"
POINTERS = "0000000000000000 0c00000000000000"
DOCUMENTS = "0000000000000000 0100000000000000 0200000000000000"
BY_HAND = bytes.fromhex(HEADER + LENGTHS + POINTERS + DOCUMENTS)


def index(prefix: Path, code: int, lengths: list[int], item: int, documents: list[int]) -> None:
    """An index packed by `struct`, as another program would write it."""
    pointers = [item * sum(lengths[:n]) for n in range(len(lengths))]
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(lengths), len(documents))
    body = struct.pack(
        f"<{len(lengths)}i{len(lengths)}q{len(documents)}q", *lengths, *pointers, *documents
    )
    Path(f"{prefix}.idx").write_bytes(head + body)


def test_written_index_is_the_one_made_by_hand(tmp_path):
    write_documents(tmp_path / "a", [[7, 8, 9], [10, 201087]])

    assert len(BY_HAND) == 82
    assert (tmp_path / "a.idx").read_bytes() == BY_HAND
    assert (tmp_path / "a.bin").read_bytes() == struct.pack("<5i", 7, 8, 9, 10, 201087)


def test_the_index_made_by_hand_is_read(tmp_path):
    (tmp_path / "a.idx").write_bytes(BY_HAND)
    (tmp_path / "a.bin").write_bytes(struct.pack("<5i", 7, 8, 9, 10, 11))
    file = IndexedTokens(tmp_path / "a")

    assert (file.num_documents, file.num_tokens) == (2, 5)
    assert file.tokens(2, 5).tolist() == [9, 10, 11]
    assert file.document_starts(1, 5).tolist() == [3]
    assert [file.document_start(n) for n in range(3)] == [0, 3, 5]


def test_the_largest_id_survives(tmp_path):
    file = IndexedTokens(write_documents(tmp_path / "a.b", [[201087, 0]]))  # a dot in the prefix

    assert file.tokens(0, 2).tolist() == [201087, 0]


def test_uint16_tokens_of_other_writers_are_read(tmp_path):
    index(tmp_path / "a", 8, [2, 1], 2, [0, 1, 2])
    (tmp_path / "a.bin").write_bytes(struct.pack("<3H", 1, 65499, 3))

    assert IndexedTokens(tmp_path / "a").tokens(0, 3).tolist() == [1, 65499, 3]


def test_a_document_of_several_sequences_begins_once(tmp_path):
    index(tmp_path / "a", 4, [2, 3, 1, 4], 4, [0, 2, 4])
    (tmp_path / "a.bin").write_bytes(struct.pack("<10i", *range(10)))
    file = IndexedTokens(tmp_path / "a")

    assert file.num_documents == 2
    assert file.document_starts(0, 10).tolist() == [0, 5]


def test_documents_are_found_in_any_stretch(tmp_path):
    lengths = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    file = IndexedTokens(write_documents(tmp_path / "a", numbered(lengths)))
    starts = np.cumsum([0, *lengths])[:-1]

    for start in range(sum(lengths)):
        for stop in range(start, sum(lengths) + 1):
            expected = starts[(starts >= start) & (starts < stop)]
            assert file.document_starts(start, stop).tolist() == expected.tolist()


def test_an_index_in_many_chunks_is_the_same(tmp_path):
    documents = numbered([3, 1, 4, 1, 5, 9, 2])
    write_documents(tmp_path / "whole", documents)
    writer = Writer(tmp_path / "chunks")
    writer.add(np.concatenate(documents), np.array([len(document) for document in documents]))
    writer.close(chunk=2)

    assert (tmp_path / "chunks.idx").read_bytes() == (tmp_path / "whole.idx").read_bytes()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: Path(f"{p}.idx").unlink(), "a.idx: missing; expected a prefix"),
        (lambda p: Path(f"{p}.bin").unlink(), "a.bin: missing; expected a prefix"),
        (lambda p: Path(f"{p}.idx").write_bytes(BY_HAND[:20]), "a.idx: truncated: 20 bytes"),
        (lambda p: Path(f"{p}.idx").write_bytes(BY_HAND[:-1]), "a.idx: truncated or damaged: 81"),
        (lambda p: Path(f"{p}.bin").write_bytes(b"\0" * 16), "a.bin: 16 bytes, but .* 20"),
        (lambda p: Path(f"{p}.idx").write_bytes(b"X" + BY_HAND[1:]), "MMIDIDX"),
        (lambda p: index(p, 7, [3, 2], 4, [0, 1, 2]), "dtype code 7 is float32"),
        (lambda p: index(p, 4, [3, 2], 4, [0, 1, 1]), "document indices must run from 0 to 2"),
        (lambda p: Path(f"{p}.idx").write_bytes(BY_HAND + b"\0\0"), "has modes"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, spoil, message):
    prefix = write_documents(tmp_path / "a", [[7, 8, 9], [10, 11]])
    spoil(prefix)

    with pytest.raises(ValueError, match=message):
        IndexedTokens(prefix)


def test_damage_in_the_middle_is_seen_when_it_is_read(tmp_path):
    prefix = write_documents(tmp_path / "a", numbered([2] * 9))
    raw = bytearray((tmp_path / "a.idx").read_bytes())
    raw[34 + 4 * 4] = 3  # length of document 4
    (tmp_path / "a.idx").write_bytes(raw)
    file = IndexedTokens(prefix)

    assert file.document_starts(0, 6).tolist() == [0, 2, 4]
    with pytest.raises(ValueError, match=r"a\.idx: damaged: sequences 3 to 5"):
        file.document_starts(6, 12)


def test_a_file_without_documents_is_read(tmp_path):
    file = IndexedTokens(write_documents(tmp_path / "a", []))

    assert (file.num_documents, file.num_tokens, file.document_start(0)) == (0, 0, 0)
