"""Runs that train adapters: what they start from, what they save, and how they go on."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ossature.checkpoint import store
from ossature.config import LORA_TARGETS, LoraConfig, OptimConfig, ParallelConfig
from ossature.convert.adapters import open_adapter, write_peft
from ossature.convert.base import identity, read_base
from ossature.convert.folder import open_source
from ossature.convert.model import load_model, save_model
from ossature.convert.names import UnknownTensor
from ossature.kernels.mxfp4 import dequantize
from ossature.model.flops import active_adapters, flops_per_token, matmul_parameters
from ossature.model.lora import adapt, init_adapters, is_adapter, merged_weights
from ossature.model.transformer import Transformer
from ossature.parallel.launch import launched
from ossature.train import optim
from ossature.train.evaluate import validate, validation_loader
from ossature.train.loop import introduction, train
from ossature.train.prove import whole
from ossature.train.setup import build
from tests.ranks import run_ranks
from tests.small_runs import TINY, ragged_batch, records, small_run, text_corpus

DORA = LoraConfig(rank=4, alpha=8.0, dora=True, targets=LORA_TARGETS)


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """One model in bfloat16 and in MXFP4."""
    model = Transformer(TINY)
    model.init_weights(9)
    folder = tmp_path_factory.mktemp("bases")
    for format in ("bf16", "mxfp4"):
        save_model(model.bfloat16(), folder / format, format=format)  # type: ignore[arg-type]
    return {format: folder / format for format in ("bf16", "mxfp4")}


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: store.read_weight(folder, name) for name in store.list_weights(folder)}


def loss_of(model: Transformer) -> float:
    batch = ragged_batch(2)
    targets = batch.tokens.roll(-1, 1)
    return model(batch.tokens, document=batch.document, targets=targets).item()


@pytest.mark.parametrize("kind", ["bf16", "mxfp4"])
def test_a_run_learns_saves_its_adapter_alone_and_is_loaded_with_its_base(tmp_path, bases, kind):
    lora = replace(DORA, base="mxfp4" if kind == "mxfp4" else "plain")
    before = identity(bases[kind])
    last = train(small_run(tmp_path / "run", init=bases[kind], lora=lora, steps=12))
    assert last is not None
    losses = [line["loss"] for line in records(tmp_path / "run")]
    assert losses[-1] < losses[0] - 0.1
    names = set(store.list_weights(last))
    assert names and all(map(is_adapter, names))
    assert identity(bases[kind]) == before

    model = load_model(tmp_path / "run")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == names
    plain = Transformer(TINY)
    plain.load_state_dict({n: w.float() for n, w in merged_weights(model).items()})
    assert loss_of(model) == pytest.approx(loss_of(plain), rel=1e-5)
    assert abs(loss_of(model) - loss_of(load_model(bases[kind]))) > 1
    with pytest.raises(ValueError, match="holds an adapter and no model"):
        open_source(last)


def test_a_packed_run_and_a_packed_model_hold_the_bytes_of_the_folder(tmp_path, bases):
    config = small_run(
        tmp_path, init=bases["mxfp4"], lora=replace(DORA, base="mxfp4"), precision="bf16"
    )
    source, model = open_source(bases["mxfp4"]), load_model(bases["mxfp4"], experts="mxfp4")
    with launched() as ranks:
        found = dict(build(config, ranks).model.named_parameters())
    for name in ("blocks.0.moe.experts.gate_up_", "blocks.1.moe.experts.down_"):
        blocks, scales = source.packed(name + "weight")
        for parts in (found, dict(model.named_parameters())):
            assert torch.equal(parts[name + "blocks"].view(torch.uint8), blocks)
            assert torch.equal(parts[name + "scales"].view(torch.uint8), scales.mT)
    dtypes = {n: p.dtype for n, p in found.items()}
    assert {dtypes[n] for n in dtypes if is_adapter(n)} == {torch.float32}
    assert {dtypes[n] for n in dtypes if not is_adapter(n)} == {torch.bfloat16}
    plain = load_model(bases["mxfp4"])
    assert loss_of(model) == pytest.approx(loss_of(plain), rel=1e-6)


def test_a_base_that_is_not_packed_is_rounded_only_when_asked(tmp_path, bases):
    lora = LoraConfig(rank=4, base="mxfp4")
    config = small_run(tmp_path / "run", init=bases["bf16"], lora=lora, steps=1)
    with pytest.raises(ValueError, match=r"lora.quantize_base = true rounds them"):
        train(config)
    with pytest.raises(ValueError, match="`ossature convert --to mxfp4` rounds them"):
        load_model(bases["bf16"], experts="mxfp4")
    train(replace(config, lora=replace(lora, quantize_base=True)))
    rounded = load_model(bases["bf16"], experts="mxfp4", quantize_experts=True)
    for one, other in zip(
        merged_weights(rounded).values(),
        merged_weights(load_model(bases["mxfp4"], experts="mxfp4")).values(),
        strict=True,
    ):
        assert torch.equal(one, other)
    name = "blocks.0.moe.experts.down"
    experts = load_model(tmp_path / "run").get_submodule(name.rpartition(".")[0])
    blocks, scales = experts.get_parameter("down_blocks"), experts.get_parameter("down_scales")
    true = open_source(bases["mxfp4"]).read(f"{name}_weight")
    assert torch.equal(dequantize(blocks, scales.mT.contiguous()), true)


def _started(rank: int, world: int, config) -> dict[str, torch.Tensor]:
    with launched() as ranks:
        model = build(config, ranks).model
        return {n: whole(p.detach()) for n, p in model.named_parameters() if is_adapter(n)}


@pytest.mark.parametrize("axes", [{"dp_shard": 2}, {"tp": 2, "ep": 2}])
def test_adapters_start_the_same_on_any_ranks_and_change_nothing(tmp_path, bases, axes):
    """Magnitudes are the lengths of the rows as the model holds them: here of the packed ones."""
    lora = replace(DORA, base="mxfp4")
    config = small_run(tmp_path, init=bases["mxfp4"], lora=lora, parallel=ParallelConfig(**axes))
    model = load_model(bases["mxfp4"], experts="mxfp4")
    true = loss_of(model)
    adapt(model, lora)
    init_adapters(model, config.seed)
    assert loss_of(model) == pytest.approx(true, rel=1e-5)
    for found in run_ranks(2, _started, config):
        for name, p in model.named_parameters():
            if is_adapter(name):
                assert torch.allclose(found[name], p, rtol=1e-6, atol=0), name


def test_resuming_gives_what_an_uninterrupted_run_gives(tmp_path, bases):
    """Bit for bit, dropout included; also after the base has moved."""
    changes = {"lora": replace(DORA, dropout=0.2), "recompute": "full", "optim__decay_steps": 4}
    straight = train(small_run(tmp_path / "straight", init=bases["bf16"], **changes))
    train(small_run(tmp_path / "halves", init=bases["bf16"], steps=3, **changes))
    shutil.copytree(bases["bf16"], tmp_path / "moved")
    resumed = train(small_run(tmp_path / "halves", init=tmp_path / "moved", **changes))
    assert straight and resumed
    for folder in ("", "optimizer"):
        one, other = stored(straight / folder), stored(resumed / folder)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    saved = read_base(resumed)
    assert saved is not None and saved.identity == identity(bases["bf16"])


BEGUN = LoraConfig(rank=4, alpha=8.0, targets=("q_proj", "gate_up", "down", "router"))


@pytest.fixture(scope="module")
def begun(tmp_path_factory, bases) -> Path:
    """An adapter of one step, in PEFT's format, without a word on its base."""
    root = tmp_path_factory.mktemp("begun")
    last = train(small_run(root / "run", init=bases["bf16"], lora=BEGUN, steps=1))
    assert last is not None
    adapter = open_adapter(last, TINY)
    write_peft(adapter, TINY, root / "peft")
    return root / "peft"


def test_training_begins_with_an_adapter_of_peft(tmp_path, bases, begun):
    """lora.start: the same values, then others; a resumed run does not ask for it again."""
    shutil.copytree(begun, tmp_path / "peft")
    lora = replace(BEGUN, start=str(tmp_path / "peft"), dropout=0.1)
    config = small_run(tmp_path / "run", init=bases["bf16"], lora=lora, steps=2)
    with launched() as ranks:
        parts = build(config, ranks)
    expected = stored(store.newest(begun.parent / "run"))
    assert parts.weights.keys() == expected.keys()
    for name, weight in parts.weights.items():
        assert torch.equal(weight.detach(), expected[name]), name
    assert parts.origin.endswith(f"adapters of {tmp_path / 'peft'}, whose base is not known")

    last = train(replace(config, steps=1))
    assert last is not None and any(
        not torch.equal(weight, expected[name]) for name, weight in stored(last).items()
    )
    shutil.rmtree(tmp_path / "peft")
    assert train(config) is not None
    assert len(records(tmp_path / "run")) == 2


@pytest.mark.slow
def test_ranks_begin_with_their_parts_of_an_adapter(tmp_path, bases, begun):
    config = small_run(
        tmp_path, init=bases["bf16"], lora=replace(BEGUN, start=str(begun)),
        parallel=ParallelConfig(tp=2, ep=2),
    )  # fmt: skip
    expected = stored(store.newest(begun.parent / "run"))
    for found in run_ranks(2, _started, config):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"rank": 8}, r"lora.rank \(8\) must be 4"),
        ({"alpha": 4.0}, r"lora.alpha \(4.0\) must be 8.0"),
        ({"dora": True}, r"lora.dora \(True\) must be False"),
        ({"rank_stabilised": True}, r"lora.rank_stabilised \(True\) must be False"),
        ({"targets": ("q_proj",)}, r"lora.targets \(q_proj\) must be q_proj, gate_up, down"),
    ],
)  # fmt: skip
def test_an_adapter_of_other_settings_does_not_begin_a_run(tmp_path, bases, begun, changes, words):
    lora = replace(BEGUN, start=str(begun), **changes)
    with pytest.raises(ValueError, match=words):
        train(small_run(tmp_path / "run", init=bases["bf16"], lora=lora))
    assert not (tmp_path / "run").exists()


def test_what_cannot_begin_a_run_is_refused(tmp_path, bases, begun):
    def refused(words: str, **changes) -> None:
        with pytest.raises((ValueError, UnknownTensor), match=words):
            train(small_run(tmp_path / "run", **changes))

    with pytest.raises(ValueError, match=r"lora.start \(x\) needs lora.rank"):
        LoraConfig(start="x")
    refused("no such folder", init=bases["bf16"], lora=replace(BEGUN, start=str(tmp_path / "x")))
    whole = replace(BEGUN, start=str(bases["bf16"]))
    refused("holds no adapter", init=bases["bf16"], lora=whole)
    run = replace(BEGUN, start=str(begun.parent / "run"))
    refused("its adapter was trained on", init=bases["mxfp4"], lora=run)
    refused("layers.1", init=None, lora=replace(BEGUN, start=str(begun)), num_layers=1)


def _train(rank: int, world: int, config) -> None:
    train(config)


@pytest.mark.slow
def test_adapters_go_on_on_other_ranks(tmp_path, bases):
    changes = {"init": bases["mxfp4"], "lora": replace(DORA, base="mxfp4"), "optim__decay_steps": 4}
    straight = train(small_run(tmp_path / "straight", **changes))
    split = ParallelConfig(tp=2, ep=2)
    run_ranks(2, _train, small_run(tmp_path / "run", steps=3, parallel=split, **changes))
    resumed = train(small_run(tmp_path / "run", **changes))
    assert straight and resumed
    one, other = stored(straight), stored(resumed)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.allclose(one[name], other[name], rtol=1e-3, atol=1e-5), name


def test_adapters_are_validated_and_sampled_from(tmp_path):
    """Without dropout: the loss is that of the model as it is loaded."""
    corpus = text_corpus(tmp_path)
    changes = {
        "model": "tiny_text", "data__mock": False, "data__path": corpus, "steps": 4,
        "eval__every_steps": 4, "eval__tokens": 64, "sample__every_steps": 4,
        "sample__max_new_tokens": 4, "lora": replace(DORA, dropout=0.5, base="mxfp4"),
    }  # fmt: skip
    config = small_run(tmp_path / "run", **changes)
    last = train(config)
    assert last and (tmp_path / "run" / "samples.jsonl").read_text().count("\n") == 1
    with launched() as ranks:
        mesh = build(config, ranks).mesh
        loader = validation_loader(config, 352)
        loss = validate(load_model(last), loader, mesh)
    assert records(tmp_path / "run")[-1]["validation_loss"] == pytest.approx(loss, rel=1e-5)


def test_another_base_is_refused(tmp_path, bases):
    run = tmp_path / "run"
    train(small_run(run, init=bases["bf16"], lora=DORA, steps=1))
    shutil.copytree(bases["bf16"], tmp_path / "other")
    file = tmp_path / "other" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"trained on .*{bases['bf16'].name}, and .*other are"):
        train(small_run(run, init=tmp_path / "other", lora=DORA, steps=2))
    with pytest.raises(ValueError, match=r"cannot go on with other settings: lora\.rank"):
        train(small_run(run, init=bases["bf16"], lora=replace(DORA, rank=5), steps=2))


def test_a_damaged_note_of_the_base_is_refused_in_a_line(tmp_path, bases):
    run = tmp_path / "run"
    last = train(small_run(run, init=bases["bf16"], lora=LoraConfig(rank=2), steps=1))
    assert last
    path = last / "base.json"
    good = json.loads(path.read_text())
    for change, line in [
        ({"extra": 1}, "has an unknown key extra"),
        ({"seed": "x"}, r"seed \('x'\) must be of type int"),
        ({"packed": 1}, r"packed \(1\) must be of type bool"),
        ({"identity": "0"}, r"was trained on .*bf16, and .*bf16 are others"),
    ]:
        path.write_text(json.dumps({**good, **change}))
        with pytest.raises(ValueError, match=line):
            load_model(run)


def test_weight_decay_acts_on_adapters_and_not_on_magnitudes():
    model = Transformer(TINY)
    adapt(model, DORA)
    optimizer = optim.build(model.named_parameters(), OptimConfig(weight_decay=0.1))
    decay = {n: g["weight_decay"] for g in optimizer.param_groups for n in g["param_names"]}
    assert set(decay) == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, value in decay.items():
        none = name.endswith("magnitude") or name.startswith("embedding")
        assert value == (0.0 if none else 0.1), name


def test_what_is_trained_is_said_before_the_first_step(tmp_path, bases):
    config = small_run(tmp_path, init=bases["mxfp4"], lora=replace(DORA, base="mxfp4"))
    with launched() as ranks:
        lines = list(introduction(build(config, ranks)))
    assert "DoRA: rank 4, scale 2, dropout 0" in lines
    shown = "\n".join(lines)
    assert "moe.experts.down_weight, MXFP4" in shown and "lm_head adapter" in shown


def test_a_frozen_matrix_counts_two_thirds():
    """By hand: LoRA of rank 1 on q alone, in 2 layers of 64 -> 96."""
    lora = LoraConfig(rank=1, targets=("q_proj",))
    assert active_adapters(TINY, lora) == 2 * (64 + 96)
    full, adapted = flops_per_token(TINY, 32), flops_per_token(TINY, 32, lora)
    assert full - adapted == 2 * matmul_parameters(TINY) - 6 * active_adapters(TINY, lora)
    every = replace(lora, targets=LORA_TARGETS)
    model = Transformer(TINY)
    adapt(model, every)
    idle = 5 / 8  # of 8 experts 3 are chosen; A of the embedding is a lookup
    met = sum(
        p.numel() * ((1 - idle) if "experts" in name else 1)
        for name, p in model.named_parameters()
        if is_adapter(name) and name != "embedding.lora_a"
    )
    assert active_adapters(TINY, every) == met
