"""A folder with a small model and a tokenizer of its own, and the model open."""

import json
from pathlib import Path

import pytest
import torch

from ossature.convert.hugging_face import generation_config
from ossature.convert.model import load_model
from ossature.data import vocabulary
from ossature.data.tokenizer import Tokenizer, load
from ossature.eval.subject import Subject
from tests.tiny import hugging_face_model

TEXT = "the door of the red lamp is blue and 12 + 34 = 46 birds sit in the garden of letters. "


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(vocabulary.train([TEXT * 3], 380), "toy")
    special = tokenizer.special
    hugging_face_model(
        vocab_size=tokenizer.vocab_size,
        num_hidden_layers=2,
        max_position_embeddings=2048,
        eos_token_id=special["<|return|>"],
        pad_token_id=special["<|endoftext|>"],
        dtype=torch.float32,
    ).save_pretrained(path)
    tokenizer.save(path)
    (path / "generation_config.json").write_text(json.dumps(generation_config(special)))
    return path


@pytest.fixture
def subject(folder) -> Subject:
    model = load_model(folder, dtype=torch.float32).eval()
    return Subject(model, load(folder), torch.device("cpu"))
