"""lm-evaluation-harness gives our model the numbers it gives transformers' model of the folder."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval")
pytestmark = [
    pytest.mark.slow,  # the harness and transformers take long to import
    pytest.mark.filterwarnings("ignore"),  # and libraries of the harness warn
]

WORDS = [
    "the",
    "door",
    "of",
    "red",
    "lamp",
    "is",
    "blue",
    "and",
    "birds",
    "sit",
    "in",
    "garden",
    "letters",
]


def sentence(draw: random.Random, most: int = 9) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(draw.randint(1, most)))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Three kinds of task, made here: choices, texts to read, texts to write.

    The strings that end a text are in no special token's name: transformers' class looks there
    too, but goes on until all rows of its batch have met one.
    """
    place = tmp_path_factory.mktemp("tasks")
    draw = random.Random(0)
    choices = [
        {
            "q": sentence(draw),
            "choices": [" " + sentence(draw, 4) for _ in range(4)],
            "right": n % 4,
        }
        for n in range(12)
    ]
    texts = [{"text": sentence(draw, 40)} for _ in range(6)]
    asked = [{"q": sentence(draw), "a": draw.choice(WORDS)} for _ in range(6)]
    for name, rows in (("choices", choices), ("texts", texts), ("asked", asked)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (place / f"{name}.jsonl").write_text(lines)
    head = (
        "dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {file}\ntest_split: test\n"
    )
    kinds = {
        "local_choices": (
            "choices",
            'output_type: multiple_choice\ndoc_to_text: "{{q}}"\ndoc_to_choice: "{{choices}}"\n'
            'target_delimiter: ""\ndoc_to_target: right\nmetric_list:\n  - metric: acc\n'
            "  - metric: acc_norm\n",
        ),
        "local_texts": (
            "texts",
            'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{text}}"\n'
            "metric_list:\n  - metric: bits_per_byte\n  - metric: word_perplexity\n",
        ),
        "local_asked": (
            "asked",
            'output_type: generate_until\ndoc_to_text: "{{q}}"\ndoc_to_target: "{{a}}"\n'
            'generation_kwargs:\n  until: ["b", "k", "7"]\n  max_gen_toks: 12\n'
            "metric_list:\n  - metric: exact_match\n",
        ),
    }
    for name, (file, rest) in kinds.items():
        text = f"task: {name}\n" + head.format(file=place / f"{file}.jsonl") + rest
        (place / f"{name}.yaml").write_text(text)
    return place


NAMES = ["local_choices", "local_texts", "local_asked"]


@pytest.fixture(scope="module")
def both(folder, tasks, tmp_path_factory):
    """The harness's results for transformers' model and for ours, of the same folder."""
    import os

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("datasets"))
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from ossature.eval.harness import OssatureLM

    models = (
        HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=3),
        OssatureLM(str(folder), batch_size="4"),
    )
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return [
        simple_evaluate(model=model, tasks=NAMES, task_manager=manager, bootstrap_iters=0)
        for model in models
    ]


@pytest.mark.parametrize("task", NAMES)
def test_the_harness_finds_the_same_as_for_transformers(both, task):
    theirs, ours = (found["samples"][task] for found in both)
    assert len(theirs) == len(ours) > 5
    for their, our in zip(theirs, ours, strict=True):
        assert their["arguments"] == our["arguments"]
        if task == "local_choices":
            for (a, is_greedy), (b, ours_is) in zip(
                (r[0] for r in their["resps"]), (r[0] for r in our["resps"]), strict=True
            ):
                assert abs(a - b) < 1e-4 and is_greedy == ours_is
            assert their["acc"] == our["acc"] and their["acc_norm"] == our["acc_norm"]
        elif task == "local_texts":
            assert abs(their["resps"][0][0] - our["resps"][0][0]) < 1e-4
        else:
            assert their["resps"] == our["resps"]
    a, b = (found["results"][task] for found in both)
    numbers = [key for key, value in a.items() if isinstance(value, float)]
    assert numbers and all(a[key] == pytest.approx(b[key], rel=1e-5) for key in numbers)


def test_a_chat_is_written_in_harmony_and_only_the_answer_is_graded(subject, monkeypatch):
    from lm_eval.api.instance import Instance

    from ossature.data.harmony import encode, render
    from ossature.eval.chat import RENDERING
    from ossature.eval.harness import OssatureLM
    from ossature.sample.request import Completion
    from tests.eval.test_tasks import answer

    model = OssatureLM(subject=subject)
    context = model.apply_chat_template([{"role": "user", "content": "the door?"}])
    assert context.endswith("<|start|>user<|message|>the door?<|end|><|start|>assistant")
    assert "Reasoning: low" in context
    tokens = model.tok_encode(context)
    assert tokens.count(subject.tokenizer.special["<|start|>"]) == 3
    begun = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert model.apply_chat_template(begun, add_generation_prompt=False).endswith("<|message|>b")

    pieces = render(answer(("analysis", "red? blue"), ("final", "blue, I say")), RENDERING)
    start = next(n for n, piece in enumerate(pieces) if piece.message == 0) + 2
    said, _ = encode(pieces[start:], [False] * (len(pieces) - start), subject.tokenizer)
    asked = []

    def texts(self, requests, what=""):
        asked.extend(requests)
        return [[Completion(tokens=said)] for _ in requests]

    monkeypatch.setattr(type(subject), "texts", texts)
    wanted = {"until": [","], "max_gen_toks": 9}
    request = Instance("generate_until", {}, (context, wanted), 0)
    assert model.generate_until([request]) == ["blue"]
    special = subject.tokenizer.special
    assert asked[0].options.stop == ()  # it would end the analysis too
    assert set(asked[0].options.stop_ids) == {special["<|return|>"], special["<|call|>"]}
    plain = Instance("generate_until", {}, ("the door", {"until": [","], "frequency": 3}), 0)
    with pytest.raises(ValueError, match="generation_kwargs: 'frequency' has no meaning here"):
        model.generate_until([plain])


def test_the_command_asks_the_harness_and_keeps_its_items(folder, tasks, tmp_path, capsys, both):
    from ossature.cli import main

    output = tmp_path / "a.json"
    argv = ["eval", str(folder), "--tasks", *NAMES, "--include-path", str(tasks)]
    assert main([*argv, "--output", str(output)]) == 0
    made = json.loads(output.read_text())["tasks"]
    for task in NAMES:
        results = both[1]["results"][task]
        for metric, found in made[task]["metrics"].items():
            assert found["value"] == pytest.approx(results[f"{metric},none"], rel=1e-6)
    assert len(made["local_choices"]["items"]["acc"]["values"]) == 12
    bits = made["local_texts"]["items"]["bits_per_byte"]
    mean = np.average(bits["values"], weights=bits["weights"])
    assert mean == pytest.approx(made["local_texts"]["metrics"]["bits_per_byte"]["value"])
    words = made["local_texts"]["items"]["word_perplexity"]
    mean = np.exp(np.average(np.log(words["values"]), weights=words["weights"]))
    assert mean == pytest.approx(made["local_texts"]["metrics"]["word_perplexity"]["value"])
    assert main(["eval", "--compare", str(output), str(output)]) == 0
    assert main(["eval", str(folder), "--tasks", "no_such_task"]) == 2
    assert "tasks: no_such_task is neither arithmetic, " in capsys.readouterr().err


def test_a_run_that_asks_the_harness_draws_on_as_if_it_had_not(subject, tasks, both):
    from ossature.eval.harness import _random_states_kept, evaluate
    from ossature.eval.options import TaskOptions

    def states():
        return np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()

    before = states()
    evaluate(subject, ["local_choices"], TaskOptions(limit=2, include_path=str(tasks)))
    assert states() == before
    # Python's own generator is drawn from by what checks types in tests.
    python = random.getstate()
    with _random_states_kept():
        random.seed(5)
    assert random.getstate() == python


def test_items_have_the_unit_of_their_metric_where_they_have_one():
    from ossature.eval.harness import _outcome

    head = {"filter": "none", "doc_id": 0, "doc_hash": "", "prompt_hash": "", "target": ""}
    # The second of a pair for mcc is the number of the choice, and 0 the first one's.
    items = [
        {"mcc": (1, 0), "bits_per_byte": (-8.0, 4), "word_perplexity": (-8.0, 2), "acc": 1.0,
         "bleu": ("a", "b")},
        {"mcc": (0, 0), "bits_per_byte": (-2.0, 2), "word_perplexity": (-2.0, 1), "acc": 0.0,
         "bleu": ("a", "b")},
    ]  # fmt: skip
    scores = {f"{metric},none": 0.5 for metric in items[0]}
    samples = [{**head, "filtered_resps": "", **item} for item in items]
    found = _outcome(scores, samples).metrics
    assert found["mcc"].values == found["bleu"].values == []
    assert found["mcc"].summary()["count"] == 2
    assert found["bits_per_byte"].values == pytest.approx([2 / np.log(2), 1 / np.log(2)])
    assert found["bits_per_byte"].weights == [4, 2]
    assert found["word_perplexity"].values == pytest.approx([np.exp(4), np.exp(2)])
    assert found["acc"].values == [1, 0]


def test_a_text_after_nothing_follows_the_beginning_of_a_text(subject):
    from lm_eval.api.instance import Instance

    from ossature.eval.harness import OssatureLM

    wanted = {"until": ["\n"], "max_gen_toks": 3}
    (text,) = OssatureLM(subject=subject).generate_until(
        [Instance("generate_until", {}, ("", wanted), 0)]
    )
    assert isinstance(text, str)


def test_lm_evals_own_command_line_knows_the_model(folder, tasks):
    """In a process of its own, without network."""
    import os
    import subprocess
    import sys

    words = [sys.executable, "-m", "ossature.eval.harness", "run", "--model", "ossature"]
    words += ["--model_args", f"folder={folder}", "--tasks", "local_choices"]
    words += ["--include_path", str(tasks), "--limit", "2"]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|local_choices|" in done.stdout
