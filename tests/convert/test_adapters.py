"""Adapters: peft's folders in and out, and merges into weights that others load."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ossature.cli import main
from ossature.config import LORA_TARGETS, LoraConfig
from ossature.convert import adapters
from ossature.convert.base import BASE, base_of
from ossature.convert.folder import open_source, write_folder
from ossature.convert.merge import Effect, MergedSource, effects
from ossature.convert.model import load_adapter, load_model, save_model
from ossature.convert.names import UnknownTensor
from ossature.model.lora import merged_weights
from tests.convert.folders import convert, loaded_by_transformers, theirs, weights
from tests.golden import ROOT, golden
from tests.tiny import random_tokens

TOKENS = random_tokens(2, 24, 96)
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
PEFT = {
    "attention": LoraConfig(rank=4, alpha=8.0, targets=ATTENTION),
    "experts": LoraConfig(rank=4, alpha=8.0, targets=(*ATTENTION, "gate_up", "down")),
    "gate_up": LoraConfig(rank=3, alpha=6.0, targets=("gate_up",)),
    "down": LoraConfig(rank=3, alpha=6.0, targets=("down",)),
    "all": LoraConfig(rank=5, alpha=7.0, rank_stabilised=True, targets=LORA_TARGETS),
    "dora": LoraConfig(rank=4, alpha=8.0, dora=True, targets=(*ATTENTION, "lm_head")),
}
CASES = [
    pytest.param(case, marks=() if case in ("experts", "dora") else pytest.mark.slow)
    for case in PEFT
]
EVERYWHERE = LoraConfig(rank=4, alpha=8.0, dora=True, targets=LORA_TARGETS)


# peft 0.21 uses a name that transformers 5.23 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")


def peft_model(folder: Path, lora: LoraConfig, adapter: Path | None = None):
    """transformers' model with adapters by peft: a folder's, or random ones."""
    import peft

    base = loaded_by_transformers(folder)
    if adapter is not None:
        return peft.PeftModel.from_pretrained(base, adapter).eval()
    modules = {"embedding": "embed_tokens"}
    parameters = {
        "gate_up": "mlp.experts.gate_up_proj", "down": "mlp.experts.down_proj",
        "router": "mlp.router.weight",
    }  # fmt: skip
    config = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, use_dora=lora.dora, use_rslora=lora.rank_stabilised,
        target_modules=[modules.get(t, t) for t in lora.targets if t not in parameters],
        target_parameters=[parameters[t] for t in lora.targets if t in parameters] or None,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(base, config)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1 + 0.2 * torch.rand(parameter.shape, generator=g))
            elif "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=g) * 0.1)
    return model.eval()


def ours_adapted(folder: Path, lora: LoraConfig, base: str = "a/base") -> adapters.Adapter:
    """Random adapters of ours on a folder's model, none of them zero."""
    config = open_source(folder).config
    g = torch.Generator().manual_seed(5)
    values: dict[str, Tensor] = {}
    for name, shape in adapters.adapter_shapes(config, lora).items():
        noise = torch.randn(shape, generator=g) * 0.1
        values[name] = 1 + noise if name.endswith("magnitude") else noise
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    return adapters.Adapter(Path("here"), lora, base, shapes, values.__getitem__)


def put_on(model, adapter: adapters.Adapter, tmp_path: Path):
    """As a run's checkpoint would hold it."""
    from ossature.checkpoint.store import save_weights

    folder = tmp_path / "native"
    folder.mkdir(exist_ok=True)
    save_weights(folder, {name: adapter.read(name) for name in adapter.shapes})
    settings = {f"lora.{k}": v for k, v in vars(adapter.lora).items()}
    settings["lora.targets"] = list(adapter.lora.targets)
    state = {"config": {**settings, "init": adapter.base}}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "config.json").write_text("{}")
    load_adapter(model, folder)
    return model


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_adapters_that_peft_wrote_give_its_logits(bf16, tmp_path, case):
    theirs = peft_model(bf16, PEFT[case])
    theirs.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    ours = load_model(bf16)
    plain = ours(TOKENS)
    read = load_adapter(ours, tmp_path / "adapter")
    assert read.lora == PEFT[case]
    expected = theirs(TOKENS).logits
    torch.testing.assert_close(ours(TOKENS), expected, rtol=0, atol=1e-4)
    assert (plain - expected).abs().max() > 0.1  # it does something


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_peft_loads_our_adapters_onto_transformers_model_with_our_logits(bf16, tmp_path, case):
    adapter = ours_adapted(bf16, PEFT[case])
    adapters.write_peft(adapter, open_source(bf16).config, tmp_path / "out")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")  # peft warns of keys that it misses or does not know
        theirs = peft_model(bf16, PEFT[case], tmp_path / "out")
    assert not [w for w in told if "keys" in str(w.message)]
    ours = put_on(load_model(bf16), adapter, tmp_path)
    torch.testing.assert_close(ours(TOKENS), theirs(TOKENS).logits, rtol=0, atol=1e-4)


def test_what_is_written_is_read_back_to_the_bit(bf16, tmp_path):
    config = open_source(bf16).config
    adapter = ours_adapted(bf16, PEFT["all"])
    adapters.write_peft(adapter, config, tmp_path / "out")
    back = adapters.open_adapter(tmp_path / "out", config)
    assert (back.lora, back.base) == (adapter.lora, "a/base")
    assert back.shapes == adapter.shapes
    for name in adapter.shapes:
        assert torch.equal(back.read(name), adapter.read(name)), name


@torch.no_grad()
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_the_golden_adapters_give_the_golden_logits(kind):
    expected = load_file(golden("adapter_logits.safetensors"))
    key = next(name for name in expected if name.startswith(f"{kind}_"))
    model = load_model(golden("hf_bf16"))
    load_adapter(model, golden(f"adapter_{kind}"))
    tokens = load_file(golden("io.safetensors"))["input_ids"]
    torch.testing.assert_close(model(tokens), expected[key], rtol=0, atol=3e-4)


@pytest.mark.parametrize("target", ["gate_up", "down", "router", "embedding"])
def test_dora_where_peft_has_none_is_refused_and_a_merge_offered(bf16, tmp_path, target):
    lora = LoraConfig(rank=2, dora=True, targets=("q_proj", target))
    with pytest.raises(ValueError, match=rf"PEFT refuses DoRA on {target}: merge"):
        adapters.write_peft(ours_adapted(bf16, lora), open_source(bf16).config, tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_a_run_that_trained_adapters_is_written_for_peft(bf16, tmp_path, capsys):
    adapter = ours_adapted(bf16, PEFT["gate_up"])
    put_on(load_model(bf16), adapter, tmp_path)
    shutil.copy(bf16 / "config.json", tmp_path / "native")
    assert main(["convert", str(tmp_path / "native"), str(tmp_path / "out"), "--to", "peft"]) == 0
    assert "vLLM wants adapters on gate_up and down" in capsys.readouterr().out
    back = adapters.open_adapter(tmp_path / "out", open_source(bf16).config)
    assert all(torch.equal(back.read(name), adapter.read(name)) for name in adapter.shapes)
    assert main(["convert", str(bf16), str(tmp_path / "no"), "--to", "peft"]) == 2
    assert "holds no adapter" in capsys.readouterr().err


def test_what_vllm_does_not_load_is_named(bf16, tmp_path):
    config = open_source(bf16).config
    said = {
        case: adapters.write_peft(ours_adapted(bf16, lora), config, tmp_path / case)
        for case, lora in PEFT.items()
    }
    assert said["attention"] == said["experts"] == []
    assert "gate_up alone" in said["gate_up"][0] and "down alone" in said["down"][0]
    assert "router, embedding, lm_head" in said["all"][0]
    assert "DoRA" in said["dora"][0]


@pytest.mark.parametrize("lora", [PEFT["all"], EVERYWHERE], ids=["lora", "dora"])
def test_merged_pieces_are_the_merged_matrices(bf16, tmp_path, lora):
    """Of every weight, read whole and in pieces, against the fp64 of the model."""
    adapter = ours_adapted(bf16, lora)
    model = put_on(load_model(bf16), adapter, tmp_path)
    merged = MergedSource(open_source(bf16), adapter)
    for name, expected in merged_weights(model).items():
        found = merged.read(name).double()
        scale = expected.detach().abs().max()
        assert (found - expected.detach().double()).abs().max() <= 2e-6 * scale, name
        rows = len(expected)
        cut = torch.cat([merged.read(name, s, min(s + 3, rows)) for s in range(0, rows, 3)])
        torch.testing.assert_close(cut.double(), found, rtol=1e-5, atol=1e-6, msg=name)


def saved_adapter(bf16: Path, tmp_path: Path, lora: LoraConfig, strength: float = 1.0) -> Path:
    adapter = ours_adapted(bf16, lora)
    stronger = adapters.Adapter(
        adapter.folder, lora, adapter.base, adapter.shapes,
        lambda name: adapter.read(name) * (strength if name.endswith("lora_b") else 1.0),
    )  # fmt: skip
    folder = tmp_path / "adapter"
    adapters.write_peft(stronger, open_source(bf16).config, folder)
    return folder


def test_lengths_of_a_wide_embedding_are_over_all_its_rows(tmp_path):
    """They are added up some thousand rows at a time, and a piece may begin anywhere."""
    theirs(tmp_path / "wide", vocab_size=9000)
    source = open_source(tmp_path / "wide")
    adapter = ours_adapted(tmp_path / "wide", LoraConfig(rank=2, dora=True, targets=("embedding",)))
    found = adapter.of("embedding.weight")
    assert found is not None
    a, b, magnitude = found
    whole = source.read("embedding.weight").double().mT + adapter.lora.scale * (b @ a).double()
    whole = whole * (magnitude.double() / whole.norm(dim=-1))[:, None]
    part = MergedSource(source, adapter).read("embedding.weight", 8500, 8900)
    torch.testing.assert_close(part.double(), whole.mT[8500:8900], rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_transformers_loads_a_bf16_merge_of_the_merged_weights(bf16, tmp_path, capsys):
    folder = saved_adapter(bf16, tmp_path, PEFT["all"])
    assert main(["merge", str(bf16), str(folder), str(tmp_path / "out"), "--to", "bf16"]) == 0
    said = capsys.readouterr().out
    assert "gate_up: 100.0% of the adapter's effect" in said
    merged = MergedSource(
        open_source(bf16), adapters.open_adapter(folder, open_source(bf16).config)
    )
    written = open_source(tmp_path / "out")
    for name in merged.names():
        assert torch.equal(written.read(name), merged.read(name).bfloat16()), name
    theirs = loaded_by_transformers(tmp_path / "out")(TOKENS).logits
    torch.testing.assert_close(load_model(tmp_path / "out")(TOKENS), theirs, rtol=0, atol=1e-4)


def test_a_merge_leaves_every_other_tensor_its_bytes(mxfp4, bf16, tmp_path, capsys):
    """Of an MXFP4 base: with an adapter on down alone, gate_up keeps blocks and scales."""
    folder = saved_adapter(bf16, tmp_path, PEFT["down"])
    out = tmp_path / "out"
    assert main(["merge", str(mxfp4), str(folder), str(out), "--to", "mxfp4"]) == 0
    before, after = weights(mxfp4), weights(out)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "down_proj_blocks" in name or (
        "down_proj_scales" in name and name in changed)}  # fmt: skip
    assert "quantisation error" in capsys.readouterr().out


def test_an_effect_that_four_bits_lose_is_told_with_its_figure(mxfp4, bf16, tmp_path, capsys):
    """Changes far below half a step of MXFP4 round back to where they were."""
    folder = saved_adapter(bf16, tmp_path, PEFT["experts"], strength=0.1)
    out = tmp_path / "out"
    assert main(["merge", str(mxfp4), str(folder), str(out), "--to", "mxfp4"]) == 0
    said = capsys.readouterr().out
    lines = {line.split(":")[0]: line for line in said.splitlines() if "adapter's effect" in line}
    share = float(lines["gate_up"].split(": ")[1].split("%")[0])
    assert share < 20
    assert "warning: gate_up: most of what the adapter does is lost in mxfp4" in said
    assert "warning: q_proj" not in said  # attention stays in bfloat16


def test_the_share_of_an_effect_is_a_projection(bf16, tmp_path):
    """Half of the change on disk is a share of a half; none of it is none."""
    lora = LoraConfig(rank=2, targets=("q_proj",))
    adapter = ours_adapted(bf16, lora)
    merged = MergedSource(open_source(bf16), adapter)

    class Written(MergedSource):
        part: float

        def read(self, name, start=0, stop=None):
            before = self.base.read(name, start, stop)
            return before.float() + self.part * self.change(name, before, start)

    for part in (0.0, 0.5, 1.0):
        written = Written(merged.base, adapter)
        written.part = part
        whole = Effect()
        for _, _, effect in effects(merged, written):
            whole = whole.plus(effect)
        assert whole.share == pytest.approx(part, abs=1e-5)
        assert whole.error == pytest.approx(1 - part, abs=1e-5)


def effect_on(merged: MergedSource, written: Path, target: str) -> Effect:
    whole = Effect()
    for name, _, effect in effects(merged, open_source(written)):
        if adapters.target_of(name) == target:
            whole = whole.plus(effect)
    return whole


def test_what_rounding_does_to_the_base_is_no_effect_of_the_adapter(bf16, tmp_path):
    """A base in bfloat16: an adapter of nothing has no error, and one of a little has a little.

    The base's own rounding is some thousand times what this adapter asks for.
    """
    lora = LoraConfig(rank=4, alpha=8.0, targets=("down",))
    adapter = ours_adapted(bf16, lora)
    base = open_source(bf16)
    for strength in (0.0, 0.003):
        weak = adapters.Adapter(
            adapter.folder, lora, "", adapter.shapes,
            lambda name, s=strength: adapter.read(name) * (s if name.endswith("lora_b") else 1.0),
        )  # fmt: skip
        merged = MergedSource(base, weak)
        out = tmp_path / str(strength)
        write_folder(merged, out, "mxfp4")
        found = effect_on(merged, out, "down")
        rounding = sum(
            (open_source(out).read(n).double() - base.read(n).double()).square().sum().item()
            for n in base.names()
            if merged.touches(n)
        )
        if not strength:
            assert found == Effect(0.0, 0.0, 0.0)
        else:
            assert 0 < found.missed < rounding / 5


def test_an_adapter_without_its_base_written_down_is_not_merged_in_silence(bf16, tmp_path, capsys):
    adapter = ours_adapted(bf16, LoraConfig(rank=2, targets=("q_proj",)))
    put_on(load_model(bf16), adapter, tmp_path)
    native = tmp_path / "native"
    shutil.copy(bf16 / "config.json", native)
    assert main(["merge", str(bf16), str(native), str(tmp_path / "no")]) == 2
    assert f"{native}: lacks base.json" in capsys.readouterr().err
    (native / BASE).write_text(base_of(adapter.lora, bf16, seed=0).text())
    peft = tmp_path / "peft"
    assert main(["convert", str(native), str(peft), "--to", "peft"]) == 0
    capsys.readouterr()
    assert main(["merge", str(bf16), str(peft), str(tmp_path / "yes")]) == 0
    said = capsys.readouterr().out
    assert "not checked" not in said and "warning" not in said
    assert main(["merge", str(tmp_path / "yes"), str(peft), str(tmp_path / "twice")]) == 0
    assert "warning" in capsys.readouterr().out
    (peft / BASE).unlink()
    assert main(["merge", str(bf16), str(peft), str(tmp_path / "told")]) == 0
    assert "trained on, but for a name (a/base): that those in" in capsys.readouterr().out


SLOW = """
import sys, time
from ossature import cli
from ossature.checkpoint.safetensors import Writer
write = Writer.write
def slow(self, *arguments):
    write(self, *arguments)
    print("written", file=sys.stderr, flush=True)
    time.sleep(0.5)
Writer.write = slow
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_merge_that_is_ended_midway_leaves_nothing(bf16, tmp_path):
    folder, out = saved_adapter(bf16, tmp_path, PEFT["experts"]), tmp_path / "out"
    words = ["merge", bf16, folder, out, "--to", "mxfp4"]
    command = [sys.executable, "-c", SLOW, *map(str, words)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    with process:
        while "written" not in process.stderr.readline():
            assert process.poll() is None
        assert (tmp_path / f"out.partial-{process.pid}").is_dir() and not out.exists()
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=20)
    assert process.returncode == 143
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_files_of_a_size_are_refused_where_there_is_one_file(bf16, tmp_path, capsys):
    adapter = ours_adapted(bf16, LoraConfig(rank=2, targets=("q_proj",)))
    put_on(load_model(bf16), adapter, tmp_path)
    words = ["convert", str(tmp_path / "native"), str(tmp_path / "out"), "--to", "peft"]
    assert main([*words, "--max-shard-size", "1MB"]) == 2
    assert "max_shard_size: --to peft has no files of a given size" in capsys.readouterr().err
    assert main(["merge", str(bf16), "x", str(tmp_path / "out"), "--max-shard-size", "0GB"]) == 2
    assert "max_shard_size: '0GB' holds no tensor" in capsys.readouterr().err


def spoil_config(folder: Path, **changes) -> None:
    path = folder / adapters.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def spoil_tensors(folder: Path, edit) -> None:
    tensors = load_file(folder / adapters.FILE)
    edit(tensors)
    save_file(tensors, folder / adapters.FILE)


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:900])


KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda f: spoil_config(f, peft_type="LOHA"), "peft_type (LOHA) must be LORA"),
        (lambda f: spoil_config(f, bias="all"), "bias (all) must be none"),
        (lambda f: spoil_config(f, rank_pattern={"q_proj": 8}), "rank_pattern"),
        (lambda f: spoil_config(f, modules_to_save=["lm_head"]), "modules_to_save"),
        (lambda f: spoil_config(f, use_tomorrows=True), "use_tomorrows (True) is not supp"),
        (lambda f: spoil_tensors(f, lambda t: t.update({KEY: t[KEY].char()})), "is I8, not"),
        (lambda f: spoil_config(f, init_lora_weights="pissa"), "init_lora_weights (pissa)"),
        (lambda f: spoil_config(f, r=8), "shape"),
        (lambda f: spoil_config(f, r=4.0), "adapter_config.json: r (4.0) must be a number"),
        (lambda f: spoil_config(f, r=None), "lacks r"),
        (lambda f: spoil_config(f, r=0), "r (0) must be at least 1"),
        (lambda f: spoil_config(f, lora_alpha="x"), "lora_alpha ('x') must be a number"),
        (lambda f: spoil_config(f, lora_alpha=float("nan")), "lora.alpha (nan) must be more than"),
        (lambda f: spoil_config(f, lora_dropout=[1]), "lora_dropout ([1]) must be a number"),
        (lambda f: spoil_config(f, lora_dropout=2), "adapter_config.json: lora.dropout (2.0)"),
        (lambda f: spoil_config(f, use_dora="no"), "use_dora ('no') must be true or false"),
        (lambda f: spoil_tensors(f, lambda t: t[KEY].fill_(math.nan)), "q_proj.lora_a has numbers"),
        (lambda f: spoil_tensors(f, lambda t: t.pop(KEY)), "lacks blocks.1"),
        (lambda f: spoil_tensors(f, lambda t: t.update({"x.lora_A": t[KEY].clone()})), "x.lora_A"),
        (lambda f: spoil_tensors(f, lambda t: t.update({KEY: t[KEY].mT.contiguous()})), "shape"),
        (lambda f: (f / adapters.FILE).unlink(), "no adapter_model.safetensors"),
        (lambda f: cut_short(f / adapters.FILE), "adapter_model"),
        (lambda f: (f / adapters.CONFIG).write_text("{"), "adapter_config.json"),
    ],
)  # fmt: skip
def test_a_damaged_adapter_is_refused_by_name(bf16, tmp_path, spoil, words, capsys):
    folder = saved_adapter(bf16, tmp_path, PEFT["experts"])
    spoil(folder)
    status = main(["merge", str(bf16), str(folder), str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert status == 2 and words in said and len(said.splitlines()) == 1, said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"config": None}, "state.json: not the state of a run"),
        ({"lora.rank": "4"}, "state.json: lora.rank ('4') must be of int"),
        ({"lora.alpha": -1.0}, "state.json: lora.alpha (-1.0) must be more than 0"),
        ({"lora.targets": None}, "state.json: lora.targets (None) must be of tuple"),
        ({"lora.shape": 3}, "state.json: lora.shape is no setting of adapters"),
    ],
)
def test_a_damaged_state_of_a_run_is_refused_by_name(bf16, tmp_path, change, words, capsys):
    adapter = ours_adapted(bf16, PEFT["experts"])
    put_on(load_model(bf16), adapter, tmp_path)
    path = tmp_path / "native" / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({"config": change.get("config", {**state["config"], **change})}))
    assert main(["merge", str(bf16), str(tmp_path / "native"), str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert words in said and len(said.splitlines()) == 1, said
    assert not (tmp_path / "out").exists()


def test_a_merge_says_when_the_base_is_another_one(bf16, tmp_path, capsys):
    """Shapes cannot tell, and a merge into what was merged before adds the change twice."""
    adapter = ours_adapted(bf16, LoraConfig(rank=2, targets=("q_proj",)))
    put_on(load_model(bf16), adapter, tmp_path)
    native, out = tmp_path / "native", tmp_path / "out"
    (native / BASE).write_text(base_of(adapter.lora, bf16, seed=0).text())
    assert main(["merge", str(bf16), str(native), str(out)]) == 0
    assert "warning" not in capsys.readouterr().out
    assert main(["merge", str(out), str(native), str(tmp_path / "twice")]) == 0
    assert f"was trained on {bf16}, and the weights in {out} are others" in capsys.readouterr().out


def test_a_merge_does_not_say_that_what_it_rounds_keeps_its_bytes(bf16, mxfp4, tmp_path, capsys):
    """Of a base in bfloat16 all others do; its experts in MXFP4, or a base in float32, do not."""
    folder = saved_adapter(bf16, tmp_path, PEFT["attention"])
    experts = 2 * len(load_model(bf16).blocks)
    wide = tmp_path / "wide"
    save_model(load_model(bf16, dtype=torch.float32), wide, "native")
    for number, (base, to, rounded) in enumerate(
        ((bf16, "bf16", 0), (bf16, "mxfp4", experts), (mxfp4, "mxfp4", 0), (wide, "bf16", None))
    ):
        out = tmp_path / str(number)
        assert main(["merge", str(base), str(folder), str(out), "--to", to]) == 0
        said = re.search(
            r"of the others (\d+) have the bytes they had, (\d+) are as", capsys.readouterr().out
        )
        assert said
        kept, made = map(int, said.groups())
        assert (kept == 0) if rounded is None else (made == rounded)


def test_one_adapter_of_the_experts_needs_to_be_named(bf16, tmp_path, capsys):
    """`experts.lora_A` is gate_up's or down's: only the config can tell."""
    folder = saved_adapter(bf16, tmp_path, PEFT["down"])
    spoil_config(folder, target_parameters=["mlp.experts.gate_up_proj"])
    assert main(["merge", str(bf16), str(folder), str(tmp_path / "out")]) == 2
    assert "shape" in capsys.readouterr().err
    spoil_config(folder, target_parameters=None)
    assert main(["merge", str(bf16), str(folder), str(tmp_path / "out")]) == 2
    assert "must name one of" in capsys.readouterr().err


def test_an_adapter_of_another_model_is_refused(bf16, tmp_path):
    folder = saved_adapter(bf16, tmp_path, PEFT["attention"])
    other = convert(bf16, tmp_path / "other", "bf16")
    config = json.loads((other / "config.json").read_text())
    shutil.rmtree(other)
    from ossature.convert.config import read_config

    (tmp_path / "c").mkdir()
    config |= {"num_hidden_layers": 2, "layer_types": config["layer_types"][:2]}
    (tmp_path / "c" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnknownTensor, match=r"layers\.2"):
        adapters.open_adapter(folder, read_config(tmp_path / "c" / "config.json"))
