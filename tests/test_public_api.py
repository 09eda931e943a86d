"""The surface that others build on: names, signatures, and that importing it costs nothing."""

import inspect
import subprocess
import sys

import pytest
import torch

import ossature
from tests.tiny import hugging_face_model, ours, random_tokens


def test_importing_the_package_imports_no_torch():
    program = (
        "import sys, ossature, ossature.cli, ossature.config, ossature.model.config\n"
        "heavy = {'torch', 'numpy', 'tyro', 'transformers'} & set(sys.modules)\n"
        "sys.exit(f'imports {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ossature.__all__)
def test_every_public_name_is_there(name: str):
    assert getattr(ossature, name) is not None
    assert name in dir(ossature)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'trainer'"):
        ossature.trainer  # noqa: B018


def parameters(function: object) -> list[str]:
    """Names with their kind and default, as written in a call."""
    return [
        ("*" if p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) else "")
        + p.name
        + ("" if p.default is p.empty else f"={p.default!r}")
        for p in inspect.signature(function).parameters.values()  # type: ignore[arg-type]
    ]


@pytest.mark.parametrize(
    ("name", "promised"),
    [
        ("load_model", ["folder", "dtype=torch.float32", "device='cpu'"]),
        ("save_model", ["model", "folder", "format='bf16'"]),
        (
            "language_model_loss",
            ["model", "tokens", "loss_mask=None", "*position=None", "*document=None",
             "*count=None"],
        ),
        (
            "generate",
            ["model", "prompt_tokens", "max_new_tokens=16", "temperature=0.0", "stop_ids=()",
             "pad_id=0", "seed=None"],
        ),
    ],
)  # fmt: skip
def test_signatures_are_the_promised_ones(name: str, promised: list[str]):
    """More may follow, but only by keyword."""
    written = parameters(getattr(ossature, name))

    assert written[: len(promised)] == promised
    assert all(extra.startswith("*") for extra in written[len(promised) :])


def test_the_surface_works_together(tmp_path):
    theirs = hugging_face_model(seed=4)
    tokens = random_tokens(2, 9, theirs.config.vocab_size)
    ossature.save_model(ours(theirs), tmp_path / "folder")
    model = ossature.load_model(tmp_path / "folder")

    torch.testing.assert_close(model(tokens), theirs(tokens).logits, atol=1e-4, rtol=0)
    loss = ossature.language_model_loss(model, tokens)
    expected = theirs(tokens, labels=tokens).loss
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    assert ossature.generate(model, tokens, max_new_tokens=3).shape == (2, 12)
    names = ossature.convert.to_hugging_face(dict(model.named_parameters()))
    assert set(names) == {name for name, _ in theirs.named_parameters()}
