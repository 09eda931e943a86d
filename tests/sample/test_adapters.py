"""Several adapters over one base in one batch, and experts that stay packed in MXFP4."""

from pathlib import Path

import pytest
import torch

import ossature
from ossature.cli import main
from ossature.config import LoraConfig
from ossature.convert import adapters
from ossature.convert.folder import open_source
from ossature.convert.model import load_adapter, load_model, with_adapter
from ossature.sample.engine import Engine
from ossature.sample.options import SamplingOptions
from ossature.sample.request import Request
from tests.sample.test_command import byte_tokenizer
from tests.tiny import hugging_face_model, ours, random_tokens

KINDS = {
    "one": LoraConfig(rank=4, targets=("q_proj", "o_proj", "gate_up", "down")),
    "two": LoraConfig(rank=2, targets=("k_proj", "lm_head")),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model with its experts in MXFP4, and two adapters of it."""
    parent = tmp_path_factory.mktemp("adapters")
    theirs = hugging_face_model(vocab_size=259, seed=2, eos_token_id=None, pad_token_id=None)
    ossature.save_model(ours(theirs), parent / "base", "mxfp4")
    byte_tokenizer().save(parent / "base")
    config = open_source(parent / "base").config
    for seed, (name, lora) in enumerate(KINDS.items()):
        draw = torch.Generator().manual_seed(seed)
        shapes = adapters.adapter_shapes(config, lora)
        values = {key: 0.3 * torch.randn(shape, generator=draw) for key, shape in shapes.items()}
        adapter = adapters.Adapter(parent, lora, "base", shapes, values.__getitem__)
        adapters.write_peft(adapter, config, parent / name)
    return {name: parent / name for name in ("base", *KINDS)}


def requests() -> list[Request]:
    names = ("", "one", "two", "one", "", "two")
    return [
        Request(
            random_tokens(1, 3 * n + 1, 250, seed=n)[0].tolist(),
            SamplingOptions(temperature=n % 2 * 1.0, seed=n, max_new_tokens=12),
            name,
        )
        for n, name in enumerate(names)
    ]


@pytest.mark.parametrize("experts", ["plain", "mxfp4"])
def test_adapters_in_one_batch_say_what_each_says_on_a_model_of_its_own(folders, experts: str):
    base = load_model(folders["base"], experts=experts).eval()
    found = {name: with_adapter(base, folders[name]) for name in KINDS}

    together = Engine(base, max_batch=4, adapters=found).generate(requests())

    texts = []
    for request in requests():
        model = load_model(folders["base"], experts=experts)
        if request.adapter:
            load_adapter(model, folders[request.adapter])
        alone = Engine(model.eval(), max_batch=1)
        texts += alone.generate([Request(request.prompt, request.options)])
    assert together == texts
    # The adapters matter: the same request through each says three things.
    same = [Request(requests()[3].prompt, requests()[0].options, name) for name in ("", *KINDS)]
    said = Engine(base, adapters=found).generate(same)
    assert len({tuple(text.tokens) for (text,) in said}) == 3


def test_adapters_share_the_weights_of_the_model_they_are_put_on(folders):
    base = load_model(folders["base"], experts="mxfp4").eval()
    before = dict(base.named_parameters())

    other = with_adapter(base, folders["one"])

    assert dict(base.named_parameters()).keys() == before.keys()
    for name, parameter in other.named_parameters():
        if "lora_" not in name:
            assert parameter.data_ptr() == before[name].data_ptr(), name
    assert any("lora_" in name for name, _ in other.named_parameters())


def test_packed_experts_say_what_the_plain_ones_say(folders):
    plain, packed = (
        load_model(folders["base"], experts=kind).eval() for kind in ("plain", "mxfp4")
    )
    free = [Request(request.prompt, request.options) for request in requests()]

    texts = [Engine(model, max_batch=4).generate(free) for model in (plain, packed)]

    assert [t.tokens for (t,) in texts[0]] == [t.tokens for (t,) in texts[1]]
    assert packed.blocks["0"].get_submodule("moe.experts").packed  # pyright: ignore


def test_an_adapter_that_is_not_there_is_refused_by_name(folders):
    base = load_model(folders["base"]).eval()
    engine = Engine(base, adapters={"one": with_adapter(base, folders["one"])})

    with pytest.raises(ValueError, match=r"adapter \(uno\) is not one of those there are: one"):
        engine.submit(Request([3], SamplingOptions(), "uno"))


def test_the_command_continues_each_prompt_with_each_adapter(
    folders, capsys: pytest.CaptureFixture[str]
):
    words = ["sample", str(folders["base"]), "--prompt", "a", "b", "--temperature", "0"]
    words += ["--max-new-tokens", "8", "--experts", "mxfp4"]
    both = [f"{name}={folders[name]}" for name in KINDS]
    shown = {}
    for name, given in {"": [], "one": both[:1], "two": both[1:], "both": both}.items():
        assert main([*words, *(["--adapter", *given] if given else [])]) == 0
        shown[name] = capsys.readouterr().out.removesuffix("\n").split("\n\n")

    (a1, b1), (a2, b2) = shown["one"], shown["two"]
    assert shown["both"] == [f"[one] {a1}", f"[two] {a2}", f"[one] {b1}", f"[two] {b2}"]
    assert len({a1, a2, shown[""][0]}) == 3


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["one"], "adapter (one) must be NAME=FOLDER"),
        (["a=x", "a=y"], "adapter: a is given twice"),
        (["a=nowhere"], "nowhere"),
    ],
)
def test_adapters_that_cannot_be_are_one_line(
    folders, given: list[str], line: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["sample", str(folders["base"]), "--prompt", "a", "--adapter", *given]) == 2
    errors = capsys.readouterr().err
    assert line in errors and errors.count("\n") == 1


def test_experts_that_are_not_packed_are_not_packed_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    theirs = hugging_face_model(vocab_size=259, eos_token_id=None, pad_token_id=None)
    ossature.save_model(ours(theirs), tmp_path / "m")
    byte_tokenizer().save(tmp_path / "m")
    assert main(["sample", str(tmp_path / "m"), "--prompt", "a", "--experts", "mxfp4"]) == 2
    assert "its experts are not in MXFP4" in capsys.readouterr().err
