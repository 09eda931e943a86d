"""What ranks do in the tests of this folder; apart, for transformers takes seconds to import."""

import io
import os
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from ossature.checkpoint import box
from ossature.config import ParallelConfig
from ossature.convert import round_trip, verify
from ossature.convert.folder import open_source
from ossature.convert.open import open_model
from ossature.parallel.gradients import local
from ossature.parallel.launch import launched
from ossature.sample.generate import generate
from ossature.train.prove import whole


def opened(folder: Path, axes: dict):
    """The model, with the bytes of tensors that were read for it, and all bytes."""
    counts, preadv = [], os.preadv
    of_tensors, read_into = [], box._read_into

    def counting(handle, buffer, *rest):
        of_tensors.append(len(buffer))
        read_into(handle, buffer, *rest)

    with launched() as ranks, pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "preadv", lambda *a: counts.append(preadv(*a)) or counts[-1])
        patch.setattr(box, "_read_into", counting)
        model = open_model(folder, ParallelConfig(**axes), torch.float32, ranks)
    return model, sum(of_tensors), sum(counts)


def read(rank: int, world: int, cases: list[tuple[Path, dict]]) -> list:
    """For each folder and layout: names, bytes of tensors, all bytes; numbers are compared here."""
    found = []
    for folder, axes in cases:
        source = open_source(folder)
        model, *counts = opened(folder, axes)
        for name, parameter in model.named_parameters():
            assert torch.equal(whole(parameter), source.read(name).float()), (axes, name)
        found.append(([name for name, _ in model.named_parameters()], *counts))
        source.close()
    return found


def say(rank: int, world: int, folder: Path, layouts: list[dict], prompts: list) -> list[list]:
    """For each layout, what the model says: the most probable, and drawn."""
    said = []
    for axes in layouts:
        model, *_ = opened(folder, axes)
        greedy = generate(model, prompts, 8)
        drawn = generate(model, prompts, 8, temperature=1.0, seed=3)
        said.append([greedy.tolist(), drawn.tolist()])
    return said


def run_verify(
    rank: int, world: int, commands: list[list[str]], fault: str
) -> list[tuple[int, str]]:
    """Exit status and output of each command."""
    right = round_trip.open_model

    def faulty(*args):
        model = right(*args)
        if rank == world - 1:
            part = local(model.get_parameter(fault).data)
            part.view(-1).view(torch.int16)[-1] ^= 1
        return model

    said = []
    with pytest.MonkeyPatch.context() as patch:
        if fault:
            patch.setattr(round_trip, "open_model", faulty)
        for command in commands:
            out = io.StringIO()
            with redirect_stdout(out):
                status = verify.main(command)
            said.append((status, out.getvalue()))
    return said
