"""The whole network against transformers' GptOss: logits and every parameter's gradient."""

import itertools

import pytest
import torch
from safetensors.torch import load_file

from ossature.convert import to_hugging_face
from ossature.model.attention import Layout
from ossature.model.config import DEBUG, GPT_OSS_20B
from ossature.model.moe import RouterLog
from ossature.model.transformer import Transformer
from ossature.train.loss import language_model_loss, shift
from tests.golden import golden
from tests.tiny import hugging_face_model, ours, random_tokens

FORMS = [
    {"attention_form": attention, "moe_form": moe}
    for attention, moe in itertools.product(("eager", "fast"), repeat=2)
]
PACKED = torch.tensor([[0] * 11 + [1] * 1 + [2] * 13, [0] * 17 + [1] * 8])


def relative_errors(model, reference):
    """Per Hugging Face name: |ours - theirs| / max(|theirs|, 1e-6 of the largest gradient)."""
    gradients = {name: p.grad for name, p in model.named_parameters()}
    mine = to_hugging_face(gradients)
    assert mine.keys() == reference.keys()
    floor = 1e-6 * max(g.norm() for g in reference.values())
    return {
        name: float((mine[name] - g).norm() / max(g.norm(), floor)) for name, g in reference.items()
    }


def their_gradients(theirs):
    return {name: p.grad for name, p in theirs.named_parameters()}


def packed_masks(document, window):
    """transformers' masks of a packed row; it builds none itself from documents."""
    layout = Layout(document)

    def additive(mask):
        return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[:, None]

    return {
        "full_attention": additive(layout.mask(None)),
        "sliding_attention": additive(layout.mask(window)),
    }


@pytest.mark.parametrize("shape", ["oblong", "square"])
@pytest.mark.parametrize("seq", [3, 8, 25])
@pytest.mark.parametrize("packed", [False, True])
def test_logits_and_gradients_equal_those_of_transformers(shape, seq, packed):
    theirs = hugging_face_model(shape)
    tokens = random_tokens(2, seq, theirs.config.vocab_size)
    loss_mask = torch.rand(2, seq) < 0.7
    document = PACKED[:, :seq] if packed else None
    extra = {}
    if packed:
        extra = {
            "attention_mask": packed_masks(document, theirs.config.sliding_window),
            "position_ids": Layout(document).position,
        }
    their_logits = theirs(tokens, **extra).logits
    targets = shift(tokens, loss_mask, document)
    count = max(int((targets >= 0).sum()), 1)
    log_probability = their_logits.log_softmax(-1)
    chosen = log_probability.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    their_loss = -(chosen * (targets >= 0)).sum() / count
    their_loss.backward()

    for forms in FORMS:
        model = ours(theirs, **forms)
        logits = model(tokens, document=document)
        loss = language_model_loss(model, tokens, loss_mask, document=document)
        loss.backward()

        assert (logits - their_logits).abs().max() <= 1e-4
        torch.testing.assert_close(loss, their_loss, rtol=1e-5, atol=1e-6)
        errors = relative_errors(model, their_gradients(theirs))
        worst = max(errors, key=errors.__getitem__)
        assert errors[worst] <= 1e-4, (forms, worst, errors[worst])


@pytest.mark.parametrize("forms", FORMS, ids=lambda f: "-".join(f.values()))
def test_a_row_of_one_token_has_logits(forms):
    theirs = hugging_face_model("oblong")
    tokens = random_tokens(3, 1, 96)

    with torch.no_grad():
        error = (ours(theirs, **forms)(tokens) - theirs(tokens).logits).abs().max()
    assert error <= 1e-4


@pytest.mark.parametrize("forms", FORMS, ids=lambda f: "-".join(f.values()))
def test_a_packed_row_is_its_documents_run_alone(forms):
    """Logits and gradients; positions restart, windows and causality stay within a document."""
    theirs = hugging_face_model("oblong")
    model = ours(theirs, **forms).double()
    tokens = random_tokens(1, 25, theirs.config.vocab_size)
    document = PACKED[:1]
    spans = [slice(0, 11), slice(11, 12), slice(12, 25)]

    packed = model(tokens, document=document)
    alone = torch.cat([model(tokens[:, span]) for span in spans], dim=1)
    language_model_loss(model, tokens, document=document, count=1).backward()
    packed_gradients = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    sum(language_model_loss(model, tokens[:, span], count=1) for span in spans).backward()

    assert (packed - alone).abs().max() <= 1e-9
    for name, parameter in model.named_parameters():
        error = (packed_gradients[name] - parameter.grad).norm()
        assert error <= 1e-9 * parameter.grad.norm(), name


@pytest.mark.parametrize("forms", FORMS, ids=lambda f: "-".join(f.values()))
def test_a_later_token_changes_nothing_before_it(forms):
    model = ours(hugging_face_model("oblong"), **forms)
    tokens = random_tokens(2, 25, 96)
    changed = tokens.clone()
    changed[:, 15] = (changed[:, 15] + 1) % 96

    with torch.no_grad():
        before, after = model(tokens), model(changed)

    torch.testing.assert_close(before[:, :15], after[:, :15], rtol=1e-5, atol=1e-5)
    assert (before[:, 15:] - after[:, 15:]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("forms", FORMS, ids=lambda f: "-".join(f.values()))
def test_every_parameter_has_a_gradient_sinks_included(forms):
    model = ours(hugging_face_model("oblong"), **forms)
    language_model_loss(model, random_tokens(2, 25, 96)).backward()

    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_positions_turn_and_places_mask():
    """Positions with gaps change the logits; a shift of all positions does not."""
    theirs = hugging_face_model("oblong")
    model = ours(theirs)
    tokens = random_tokens(2, 25, 96)
    strided = (torch.arange(25) * 257).expand(2, -1)

    with torch.no_grad():
        got = model(tokens, position=strided)
        want = theirs(tokens, position_ids=strided, attention_mask=torch.ones_like(tokens)).logits
        shifted = model(tokens, position=torch.arange(25).expand(2, -1) + 1000)

    assert (got - want).abs().max() <= 1e-4
    assert (got - model(tokens)).abs().max() > 0.1
    assert (shifted - model(tokens)).abs().max() <= 1e-3


@pytest.mark.parametrize("form", ["eager", "fast"])
def test_the_golden_fixture_is_reproduced(form):
    import ossature

    io = load_file(golden("io.safetensors"))
    gradients = load_file(golden("grads_fp32.safetensors"))
    for folder in ("hf_bf16", "hf_mxfp4", "original"):
        model = ossature.load_model(golden(folder), attention_form=form, moe_form=form)
        with torch.no_grad():
            logits = model(io["input_ids"])
            strided = model(io["input_ids"], position=io["position_ids_stride257"])
        assert (logits - io["logits"]).abs().max() <= 1e-4
        assert (strided - io["logits_stride257"]).abs().max() <= 1e-4
        loss = language_model_loss(model, io["input_ids"], io["labels"] != -100)
        loss.backward()
        assert abs(loss.item() - 6.387883186) <= 1e-5
        errors = relative_errors(model, gradients)
        assert max(errors.values()) <= 1e-4


def test_weights_do_not_depend_on_how_the_model_is_built():
    """Built on meta and filled, or built in memory: the same, and another seed is another model."""
    in_memory = Transformer(DEBUG)
    with torch.device("meta"):
        model = Transformer(DEBUG)
    model.to_empty(device="cpu")
    model.init_weights(seed=0)

    for name, parameter in in_memory.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name
    model.init_weights(seed=1)
    assert not torch.equal(model.lm_head.weight, in_memory.lm_head.weight)
    tokens = random_tokens(1, 9, DEBUG.vocab_size)
    model.init_weights(seed=0)
    with torch.no_grad():
        assert torch.equal(model(tokens), in_memory(tokens))


def test_initial_statistics_are_those_of_transformers():
    for name, parameter in Transformer(DEBUG).named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
        elif name.endswith("bias") and "router" not in name:
            assert not parameter.any(), name
        else:  # sinks are drawn like the rest: not +4, not 0
            error = 4 / parameter.numel() ** 0.5
            assert abs(parameter.std() / 0.02 - 1) < max(error, 0.5 * (parameter.numel() < 16)), (
                name
            )
            assert abs(parameter.mean() / 0.02) < error, name
    first, second = Transformer(DEBUG).blocks["0"].moe.experts.gate_up_weight[:2]
    assert not torch.equal(first, second)


def test_the_20b_model_has_its_published_parameters_and_layers():
    with torch.device("meta"):
        model = Transformer(GPT_OSS_20B)

    assert sum(p.numel() for p in model.parameters()) == 20_914_757_184
    windows = [block.attention.window for block in model.blocks.values()]
    assert windows == [128, None] * 12


def test_the_router_log_counts_every_token_once_with_recomputation():
    from torch.utils.checkpoint import checkpoint

    model = ours(hugging_face_model("oblong"))
    tokens = random_tokens(2, 25, 96)
    document = torch.zeros_like(tokens)
    document[1, 20:] = -1
    for name in list(model.blocks):
        block = model.blocks[name]
        block.forward = lambda *inputs, run=block.forward: checkpoint(
            run, *inputs, use_reentrant=False
        )
    log = RouterLog()
    targets = shift(tokens, None, document)
    model(tokens, document=document, targets=targets, router_log=log).backward()

    assert len(log.layers) == 4
    for layer in log.layers:
        assert layer.tokens == 45
        assert layer.counts.sum() == 45 * 3


def test_targets_are_shifted_once():
    tokens = torch.tensor([[10, 11, 12, 13, 14, 15]])
    document = torch.tensor([[0, 0, 0, 1, 1, -1]])
    mask = torch.tensor([[True, True, False, True, True, True]])

    assert shift(tokens).tolist() == [[11, 12, 13, 14, 15, -100]]
    assert shift(tokens, mask).tolist() == [[11, -100, 13, 14, 15, -100]]
    assert shift(tokens, mask, document).tolist() == [[11, -100, -100, 14, -100, -100]]


def test_the_loss_of_no_counted_token_is_zero():
    model = ours(hugging_face_model("oblong"))
    tokens = random_tokens(1, 5, 96)

    loss = language_model_loss(model, tokens, torch.zeros_like(tokens, dtype=torch.bool))

    assert loss.item() == 0.0


def test_any_split_of_a_batch_gives_the_same_loss_and_gradients():
    """Sum over counted tokens / global count; a mean of means would depend on the split."""
    model = ours(hugging_face_model("oblong")).double()
    tokens = random_tokens(4, 25, 96)
    loss_mask = torch.rand(4, 25) < torch.tensor([[0.9], [0.1], [0.5], [0.02]])
    whole = language_model_loss(model, tokens, loss_mask)
    want = torch.autograd.grad(whole, tuple(model.parameters()))
    count = int((shift(tokens, loss_mask) >= 0).sum())

    parts = [
        language_model_loss(model, t, m, count=count)
        for t, m in zip(tokens.split([1, 3]), loss_mask.split([1, 3]), strict=True)
    ]
    got = torch.autograd.grad(sum(parts), tuple(model.parameters()))

    torch.testing.assert_close(sum(parts), whole)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
