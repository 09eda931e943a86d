import json

import pytest

from ossature.data.corpus import open_corpus
from tests.data.corpora import loader, numbered, write_documents


@pytest.fixture
def folder(tmp_path):
    """A data folder with 10 tokens to train on and 5 to validate."""
    path = tmp_path / "data"
    path.mkdir()
    splits = {}
    for split, lengths in {"train": [4, 6], "validation": [5], "test": []}.items():
        write_documents(path / f"{split}_text_document", numbered(lengths))
        splits[split] = {"documents": len(lengths), "tokens": sum(lengths)}
    manifest = {"split": "2,1", "splits": splits, "tokenizer": {"vocab_size": 50}}
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def test_a_folder_gives_its_splits(folder):
    assert open_corpus(folder, "train").read(2, 10)[0].tolist() == list(range(2, 10))
    assert open_corpus(folder, "train").read(2, 10)[1].tolist() == [2]
    assert open_corpus(folder, "validation").num_documents == 1


def test_a_prefix_is_split_by_documents(tmp_path):
    prefix = write_documents(tmp_path / "a", numbered([3, 2, 4, 1, 5]))
    validation = open_corpus(prefix, "validation", "2,2,1")

    assert validation.read(0, 5)[0].tolist() == [5, 6, 7, 8, 9]
    assert validation.read(0, 5)[1].tolist() == [0, 4]


def test_a_listed_corpus_that_is_missing_is_an_error_never_mock(tmp_path):
    there = write_documents(tmp_path / "a", numbered([30]))
    missing = tmp_path / "dclm_02_text_document"

    for options in ({"path": missing}, {"blend": (str(there), str(missing))}):
        with pytest.raises(ValueError, match="dclm_02_text_document: does not exist; expected"):
            loader(**options, shares="1")


def test_a_file_of_another_kind_is_refused_with_a_sentence(tmp_path):
    (tmp_path / "train.nvjsonl").write_text("{}")

    with pytest.raises(ValueError, match=r"nvjsonl: is a file; .* prefix with \.bin and \.idx"):
        open_corpus(tmp_path / "train.nvjsonl", "train")


def test_a_prefix_with_its_suffix_says_what_to_give(tmp_path):
    prefix = write_documents(tmp_path / "a", numbered([3]))

    with pytest.raises(ValueError, match=f"give the prefix {prefix}, without"):
        open_corpus(tmp_path / "a.bin", "train")


def test_a_folder_that_was_not_built_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        open_corpus(tmp_path, "train")


def test_a_folder_that_lost_documents_is_refused(folder):
    write_documents(folder / "train_text_document", numbered([4]))

    with pytest.raises(ValueError, match=r"train_text_document: 1 documents, but .* says 2"):
        open_corpus(folder, "train")


def test_a_folder_keeps_the_split_it_was_built_with(folder):
    open_corpus(folder, "train", "2,1")
    with pytest.raises(ValueError, match=r"data.split \(9,1\) differs from .* \(2,1\)"):
        open_corpus(folder, "train", "9,1")


def test_a_vocabulary_larger_than_the_models_is_refused(folder):
    loader(folder, vocab_size=50)
    with pytest.raises(ValueError, match="vocabulary of 50, but the model's vocab_size is 49"):
        loader(folder, vocab_size=49)
