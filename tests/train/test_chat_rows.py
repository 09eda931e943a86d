"""Training on packed conversations is training on each of them alone."""

from pathlib import Path

from torch import Tensor

from ossature.data.loader import Batch
from ossature.data.tokenizer import load
from ossature.train.loop import train
from ossature.train.loss import language_model_loss
from tests import tiny
from tests.data.chats import conversations, data_chat, small_tokenizer, write_records
from tests.data.corpora import loader
from tests.small_runs import records, small_run

SEQ = 512


def build(folder: Path, name: str, vocab: int, *options) -> Path:
    source = write_records(folder / f"{name}.jsonl", conversations(8, most=4))
    tokenizer = small_tokenizer(folder / "tokenizer", vocab)
    data_chat(source, "--output", folder / name, "--tokenizer", tokenizer, "--seq-len", SEQ,
              "--workers", 1, "--split", "6,2", *options)  # fmt: skip
    return folder / name


def batches(folder: Path) -> list[Batch]:
    sizes = loader(folder, seq_len=SEQ, vocab_size=400)
    rows = sizes.num_rows
    return list(loader(folder, seq_len=SEQ, vocab_size=400, global_batch_rows=rows)
                .micro_batches(0))  # fmt: skip


def loss_and_gradients(model, batches: list[Batch]) -> tuple[float, int, dict[str, Tensor]]:
    model.zero_grad()
    count = sum(int(batch.loss_mask.sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        loss = language_model_loss(
            model, batch.tokens, batch.loss_mask, position=batch.position,
            document=batch.document, count=count,
        )  # fmt: skip
        loss.backward()
        total += loss.item()
    return total, count, {n: p.grad.clone() for n, p in model.named_parameters()}


def test_packed_rows_have_the_loss_and_gradients_of_single_conversations(tmp_path):
    packed = batches(build(tmp_path, "packed", 400))
    single = batches(build(tmp_path, "single", 400, "--pack", "false"))
    vocab = load(tmp_path / "packed").vocab_size
    theirs = tiny.hugging_face_model("oblong", vocab_size=vocab, num_hidden_layers=2)
    model = tiny.ours(theirs, attention_form="eager", moe_form="eager").double()
    loss, count, gradients = loss_and_gradients(model, packed)
    loss_alone, count_alone, gradients_alone = loss_and_gradients(model, single)

    assert len(packed) < len(single) == 6
    assert max(int(batch.document.max()) for batch in packed) >= 2
    assert count == count_alone > 100
    assert abs(loss - loss_alone) < 1e-12 * loss
    for name, gradient in gradients.items():
        alone = gradients_alone[name]
        assert alone.norm() > 0, name
        assert (gradient - alone).norm() <= 1e-10 * alone.norm(), name


def test_a_run_trains_on_packed_conversations_as_on_any_data(tmp_path):
    folder = build(tmp_path, "chats", 352)
    config = small_run(
        tmp_path / "run", model="tiny_text", steps=3, global_batch_tokens=2 * SEQ,
        micro_batch_tokens=SEQ, data__path=folder, data__mock=False, data__seq_len=SEQ,
        eval__every_steps=3, eval__tokens=SEQ,
    )  # fmt: skip
    train(config)
    found = records(tmp_path / "run")

    assert found[-1]["loss"] < found[0]["loss"]
    assert found[-1]["validation_loss"] > 0
