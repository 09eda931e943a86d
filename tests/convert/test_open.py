"""A folder opened on several ranks: what each reads, what it then has, and what it says."""

from fractions import Fraction
from pathlib import Path

import pytest
import torch

from ossature.convert.folder import open_source
from ossature.convert.model import load_model
from ossature.convert.names import shapes
from ossature.sample.generate import generate
from tests.convert import on_ranks
from tests.convert.folders import convert
from tests.ranks import run_ranks
from tests.tiny import random_tokens

TWO = [{"tp": 2}, {"ep": 2}, {"pp": 2}, {}, {"etp": 2}, {"cp": 2}]
FOUR = [
    {"tp": 2, "pp": 2},
    {"ep": 4},
    {"tp": 2, "ep": 4},
    {"pp": 2, "ep": 2},
    {"dp_replicate": 2, "etp": 2},
    {"tp": 2, "ep": 2, "etp": 2},
    {"pp": 2, "pp_schedule": "ZBVZeroBubble"},
    {"cp": 2, "tp": 2},
]
PROMPTS = [random_tokens(1, 5, 96)[0].tolist(), random_tokens(1, 9, 96, seed=1)[0].tolist()]


@pytest.fixture(scope="session")
def folders(bf16: Path, mxfp4: Path, openai: Path) -> dict[str, Path]:
    """The same numbers in every format: those that MXFP4 can hold."""
    parent = bf16.parent
    return {
        "bf16": convert(mxfp4, parent / "exact", "bf16"),
        "mxfp4": mxfp4,
        "openai": openai,
        "native": convert(mxfp4, parent / "native", "native"),
    }


def stored_bytes(name: str, shape: tuple[int, ...], format: str) -> int:
    count = torch.Size(shape).numel()
    if format in ("mxfp4", "openai") and name.endswith(("gate_up_weight", "down_weight")):
        return count // 32 * 17
    return 2 * count


def share(name: str, axes: dict, format: str) -> Fraction:
    """Of a weight that is on this rank of two, by hand."""
    half, leaf = Fraction(1, 2), name.removesuffix(".weight").removesuffix(".bias")
    leaf = leaf.rpartition(".")[2]
    if axes in ({}, {"cp": 2}, {"ep": 2}):  # ep borrows the two ranks that share all weights
        return half
    if axes == {"tp": 2}:
        split = ("embedding", "lm_head", "q_proj", "k_proj", "v_proj", "sinks")
        # The experts' own view of the ranks has no tp: FSDP shards them over both.
        split_weight = leaf in split or name.endswith("o_proj.weight")
        return half if split_weight or ".experts." in name else Fraction(1)
    if axes == {"etp": 2}:
        if leaf == "down_weight" and format in ("mxfp4", "openai"):
            return Fraction(1)  # the 32 numbers of a row are one group, and a group is read whole
        if leaf == "down_bias":
            return Fraction(1)  # FSDP, where etp borrows its ranks, has one rank left
        return half
    assert axes == {"pp": 2}
    return Fraction(1)


def check(folders: dict[str, Path], cases: list[tuple[str, dict]]) -> None:
    size = shapes(open_source(folders["bf16"]).config)
    ranks = run_ranks(
        2, on_ranks.read, [(folders[format], axes) for format, axes in cases], seconds=150
    )
    for (format, axes), *found in zip(cases, *ranks, strict=True):
        for names, count, all_bytes in found:
            shares = {n: share(n, axes, format) * stored_bytes(n, size[n], format) for n in names}
            assert count == sum(shares.values()), (format, axes)
            # Of a native folder, where the numbers of each tensor begin is read too.
            beside = all_bytes - count
            assert beside == 0 if format != "native" else 0 < beside < 8192 * len(names)
        if axes in ({"pp": 2}, {}):
            everything = sum(stored_bytes(name, shape, format) for name, shape in size.items())
            assert sum(count for _, count, _ in found) == everything, (format, axes)


def test_each_rank_of_two_reads_its_own_bytes_and_no_others(folders):
    cases = [("mxfp4", axes) for axes in TWO]
    check(folders, [*cases, ("bf16", TWO[0]), ("openai", TWO[0]), ("native", TWO[0])])


@pytest.mark.slow
def test_each_rank_reads_its_own_bytes_of_every_format(folders):
    check(folders, [(format, axes) for format in ("bf16", "openai", "native") for axes in TWO])


@pytest.mark.slow
def test_four_ranks_have_the_weights_of_every_format(folders):
    size = shapes(open_source(folders["bf16"]).config)
    cases = [(format, axes) for format in folders for axes in FOUR]
    ranks = run_ranks(
        4, on_ranks.read, [(folders[format], axes) for format, axes in cases], seconds=300
    )
    for (format, axes), *found in zip(cases, *ranks, strict=True):
        everything = sum(stored_bytes(name, shape, format) for name, shape in size.items())
        assert all(count < everything for _, count, _ in found), (format, axes)


def alone(folder: Path) -> list:
    model = load_model(folder)
    drawn = generate(model, PROMPTS, 8, temperature=1.0, seed=3)
    return [generate(model, PROMPTS, 8).tolist(), drawn.tolist()]


def test_two_ranks_say_what_one_says_token_by_token(folders):
    """Heads, experts, stages and all weights divided; cp and etp are among the four's."""
    said = run_ranks(2, on_ranks.say, folders["mxfp4"], TWO[:4], PROMPTS)
    assert said == [[alone(folders["mxfp4"])] * 4] * 2


@pytest.mark.slow
def test_four_ranks_say_what_one_says_token_by_token(folders):
    assert (
        run_ranks(4, on_ranks.say, folders["bf16"], FOUR, PROMPTS)
        == [[alone(folders["bf16"])] * len(FOUR)] * 4
    )
