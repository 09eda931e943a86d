"""A file of answers goes on after a kill, and takes no other model's for its own."""

import json

import pytest

from ossature.eval.answers import Answers, key_of


def test_answers_are_there_after_a_kill_in_the_middle_of_a_line(tmp_path):
    file = tmp_path / "deep" / "cache.jsonl"
    first = Answers(file, {"weights": "a"})
    first.keep({key_of("x", [1]): [-1.5, 0], key_of("y"): [[[1, 2], "text", "stop"]]})
    with file.open("a") as handle:  # no close: the process is gone
        handle.write('["' + key_of("z") + '", [-3.')
    second = Answers(file, {"weights": "a"})
    assert second[key_of("x", [1])] == [-1.5, 0]
    assert key_of("z") not in second
    second.keep({key_of("z"): [-3.0, 1]})
    second.close()
    third = Answers(file, {"weights": "a"})
    assert third[key_of("z")] == [-3.0, 1]
    third.close()
    first.close()


def test_answers_of_another_model_are_refused_by_name(tmp_path):
    file = tmp_path / "cache.jsonl"
    Answers(file, {"weights": "a", "dtype": "fp32"}).close()
    with pytest.raises(ValueError, match=r"cache.jsonl: answers of another .* \(dtype is 'fp32'"):
        Answers(file, {"weights": "a", "dtype": "bf16"})
    for text in ("hello\n", '{"a": 1}\n', '["key", 3]\n'):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"cache.jsonl: (line 1 is none|not the answers)"):
            Answers(file, {})
        assert file.read_text() == text


@pytest.mark.parametrize("text", ['{"precious": 1}', "x", '["other"'])
def test_a_file_of_something_else_keeps_its_bytes(tmp_path, text):
    """Without an end of line all of it could be a line that a kill has cut short."""
    path = tmp_path / "x"
    path.write_text(text)
    with pytest.raises(ValueError, match="x: not the answers of"):
        Answers(path, {"weights": "a"})
    assert path.read_text() == text
    for begun in ("", '["own', '["owner", {"wei'):  # of a file whose first line was cut short
        path.write_text(begun)
        Answers(path, {"weights": "a"}).close()
        assert json.loads(path.read_text()) == ["owner", {"weights": "a"}]
