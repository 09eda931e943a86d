"""lm-evaluation-harness asks our model: its model class, and its tasks among ours.

    ossature eval FOLDER --tasks hellaswag
    python -m ossature.eval.harness run --model ossature --model_args folder=FOLDER --tasks ...

The second is the harness's own command line, which knows the model once this module is imported;
so does its Python API.  What a request means follows its class for models of Hugging Face, so
that a folder gives the same numbers through either: tests/eval/test_harness.py compares them.

In chats a request is written in harmony, and what is graded is the text of the channel final: the
analysis is stripped.

Source: lm_eval/api/model.py, lm_eval/models/huggingface.py of EleutherAI/lm-evaluation-harness
0.4.13.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ossature.config import ParallelConfig
from ossature.convert.folder import resolve
from ossature.data.conversations import conversation
from ossature.data.harmony import START, Conversation, render, text
from ossature.data.tokenizer import load as load_tokenizer
from ossature.eval.answers import key_of
from ossature.eval.chat import RENDERING, read, stops
from ossature.eval.likelihood import Row
from ossature.eval.options import EvalOptions, TaskOptions
from ossature.eval.results import Metric, Outcome
from ossature.eval.statistics import Z
from ossature.eval.subject import Subject, open_subject
from ossature.parallel.environment import environment
from ossature.parallel.launch import Ranks
from ossature.sample.command import stop_ids
from ossature.sample.options import SamplingOptions
from ossature.sample.request import Request

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError:
    raise ValueError("lm-eval is not installed: pip install 'ossature[eval]'") from None

DEFAULT_NEW_TOKENS = 256
ASSISTANT = f"{START}assistant"
GENERATION = (
    "until", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed",
    "max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens",
)  # fmt: skip
"""What a task may say of its texts."""


@register_model("ossature")
class OssatureLM(TemplateLM):
    """A checkpoint in any format, or a model that is open already.

    Args:
        folder: the checkpoint.
        subject: instead of it.
        dtype: fp32 or bf16.
        cache: file for answers as they come.
        effort: reasoning effort, in chats.
        batch_size: texts that are sampled at a time.
        max_batch_size: of the harness; there is nothing to find here.
    """

    def __init__(
        self,
        folder: str = "",
        *,
        subject: Subject | None = None,
        dtype: str = "fp32",
        cache: str = "",
        effort: str = "low",
        tokenizer: str = "",
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if subject is None:
            # "auto" has no meaning here: rows are batched by their tokens.
            word = str(batch_size)
            if device == "cuda:0" and not torch.cuda.is_available():
                device = None  # the harness's command line says so where nobody said anything
            batch = int(word) if word.isdigit() else EvalOptions.batch
            options = EvalOptions(
                folder=Path(folder), dtype=dtype, cache=Path(cache) if cache else None,  # type: ignore[arg-type]
                tokenizer=tokenizer, device=device or "", batch=batch,
            )  # fmt: skip
            subject = open_alone(options)
        self.subject, self.effort, self.seed = subject, effort, seed
        self.tokenizer = subject.tokenizer
        self._device = subject.device

    @property
    def max_length(self) -> int:
        return self.subject.model.config.max_position_embeddings

    @property
    def eot_token_id(self) -> int:
        special = self.tokenizer.special
        return special.get("<|return|>", self.tokenizer.end_of_document)

    @property
    def prefix_token_id(self) -> int:
        return self.tokenizer.special.get("<|startoftext|>", self.eot_token_id)

    @property
    def tokenizer_name(self) -> str:
        return f"ossature-{self.tokenizer.sha256()[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return f"harmony, {RENDERING.style}, {RENDERING.date}, {self.effort}"

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        # Requests of chats spell their special tokens, as with tokenizers of Hugging Face.
        return self.tokenizer.encode(string, special=True)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        rows = [self._row(context, continuation) for _, context, continuation in requests]
        scores = self.subject.scores(rows, "loglikelihood")
        found = [(score.logprob, score.missed == 0) for score in scores]
        for (asked, _, _), answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", asked, answer)
        return found

    def _row(self, context: Sequence[int], continuation: Sequence[int]) -> Row:
        """What is too long loses its beginning."""
        if len(continuation) > self.max_length:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens is longer than the model's "
                f"max_position_embeddings ({self.max_length})"
            )
        return Row(context[len(continuation) - self.max_length - 1 :], continuation)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        rows, owner = [], []
        for n, request in enumerate(requests):
            string = str(request.args[0])
            parts = get_rolling_token_windows(
                token_list=self.tok_encode(string),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for part in map(make_disjoint_window, parts):
                rows.append(self._row(*part))
                owner.append(n)
        totals = [0.0] * len(requests)
        for n, score in zip(owner, self.subject.scores(rows, "rolling"), strict=True):
            totals[n] += score.logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        asked = [self._request(n, *_arguments(request)) for n, request in enumerate(requests)]
        said = self.subject.texts(asked, "generate_until")
        found = []
        for request, texts in zip(requests, said, strict=True):
            (completion,) = texts
            context, wanted = _arguments(request)
            if context.endswith(ASSISTANT):
                whole = read(completion.tokens, self.tokenizer).final
            else:
                special = set(self.tokenizer.special.values())
                plain = [token for token in completion.tokens if token not in special]
                whole = self.tokenizer.decode(plain)
            for stop in _until(wanted):
                whole = whole.split(stop)[0]
            found.append(whole)
            self.cache_hook.add_partial("generate_until", request.args, whole)
        return found

    def _request(self, number: int, context: str, wanted: Mapping[str, Any]) -> Request:
        unknown = [key for key in wanted if key not in GENERATION]
        if unknown:
            raise ValueError(f"generation_kwargs: {unknown[0]!r} has no meaning here")
        names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        most = next((int(wanted[n]) for n in names if n in wanted), DEFAULT_NEW_TOKENS)
        if most >= self.max_length:
            raise ValueError(
                f"{most} new tokens must be less than the model's max_position_embeddings "
                f"({self.max_length})"
            )
        temperature = float(wanted.get("temperature", 0.0))
        draws = wanted.get("do_sample")
        draws = temperature > 0 if draws is None else draws
        chat = context.endswith(ASSISTANT)
        ends = {self.eot_token_id}
        ends |= stop_ids(self.tokenizer.special, self.subject.model.config.eos_token_id)
        sampling = SamplingOptions(
            temperature=(temperature or 1.0) if draws else 0.0,
            top_k=int(wanted.get("top_k", 0)) if draws else 0,
            top_p=float(wanted.get("top_p", 1.0)) if draws else 1.0,
            min_p=float(wanted.get("min_p", 0.0)) if draws else 0.0,
            repetition_penalty=float(wanted.get("repetition_penalty", 1.0)),
            # Repeats of a question draw other texts.
            seed=int(wanted.get("seed", self.seed)) + (number if draws else 0),
            max_new_tokens=most,
            stop_ids=stops(self.tokenizer) if chat else tuple(sorted(ends)),
            stop=() if chat else tuple(_until(wanted)),
        )
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        return Request(tokens[most - self.max_length :], sampling)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The messages in harmony; without a prompt to answer, the last one goes on."""
        record = {"messages": chat_history, "reasoning_effort": self.effort}
        chat: Conversation = conversation(record, "messages", frozenset(), answered=False)
        pieces = render(chat, RENDERING, generate=add_generation_prompt)
        return text(pieces if add_generation_prompt else pieces[:-1])


def _arguments(request: Instance) -> tuple[str, dict[str, Any]]:
    arguments: tuple[Any, ...] = request.args
    context, wanted = arguments
    return str(context), dict(wanted)


def _until(wanted: Mapping[str, Any]) -> list[str]:
    until = wanted.get("until") or []
    return [stop for stop in ([until] if isinstance(until, str) else until) if stop]


def open_alone(options: EvalOptions) -> Subject:
    """The model of a folder, in a process of its own.

    Raises:
        ValueError: there are more processes, which only `ossature eval` divides a model over.
    """
    world = environment().world
    if world > 1:
        raise ValueError(f"{world} ranks: use `ossature eval FOLDER --tasks ...` under torchrun")
    cuda = torch.cuda.is_available()
    ranks = Ranks(0, 0, 1, torch.device("cuda" if cuda else "cpu"))
    folder = resolve(options.folder)
    tokenizer = load_tokenizer(options.tokenizer or str(folder))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
    assert options.parallel == ParallelConfig()
    return open_subject(folder, options, tokenizer, dtype, ranks)


def check_tasks(names: Sequence[str], options: TaskOptions, ours: Sequence[str]) -> None:
    """Refuse names that the harness does not know."""
    known = _manager(options).all_tasks
    for name in names:
        if name not in known:
            raise ValueError(
                f"tasks: {name} is neither {', '.join(ours)}, a .jsonl file nor a task of lm-eval"
            )


def _manager(options: TaskOptions) -> TaskManager:
    return TaskManager(include_path=options.include_path or None)


def evaluate(subject: Subject, names: Sequence[str], options: TaskOptions) -> dict[str, Outcome]:
    """Tasks of the harness, and those that its groups are made of."""
    model: Any = OssatureLM  # the harness's decorator hides its arguments
    with _random_states_kept():
        found: Any = simple_evaluate(
            model=model(subject=subject, effort=options.effort, seed=options.seed),
            tasks=list(names),
            num_fewshot=None if options.fewshot < 0 else options.fewshot,
            limit=options.limit or None,
            apply_chat_template=options.chat,
            task_manager=_manager(options),
            bootstrap_iters=100,
            random_seed=options.seed,
            numpy_random_seed=options.seed,
            torch_random_seed=options.seed,
            fewshot_random_seed=options.seed,
        )
    assert found is not None  # it is, on the ranks that are not the harness's first
    samples = found["samples"]
    return {name: _outcome(found["results"][name], samples[name]) for name in samples}


@contextmanager
def _random_states_kept() -> Iterator[None]:
    """The harness seeds every generator there is; a run that goes on draws as if it had not."""
    python, arrays = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)


def _outcome(scores: Mapping[str, Any], samples: list[dict[str, Any]]) -> Outcome:
    """The harness's own value of each metric, with its items."""
    metrics = {}
    for key, value in scores.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        mine = [s[metric] for s in samples if s["filter"] == chosen and metric in s]
        each, sizes = _items(metric, mine)
        error = scores.get(f"{metric}_stderr,{chosen}")
        half = Z * error if isinstance(error, int | float) else math.nan
        whole = (float(value), float(value) - half, float(value) + half)
        name = metric if chosen == "none" else f"{metric}, {chosen}"
        metrics[name] = Metric(each, sizes, whole, len(mine))
    asked = sorted((s["doc_id"], s["doc_hash"], s["prompt_hash"]) for s in samples)
    said = [
        {"id": s["doc_id"], "target": str(s["target"]), "said": str(s["filtered_resps"])}
        for s in samples
    ]
    return Outcome(key_of(asked), metrics, said)


PER_SIZE: dict[str, Callable[[float], float]] = {
    "word_perplexity": math.exp, "byte_perplexity": math.exp,
    "bits_per_byte": lambda nats: nats / math.log(2),
}  # fmt: skip
"""Of nats by word, or by byte; the harness keeps the log-probability of a text and its size."""


def _items(metric: str, mine: list[Any]) -> tuple[list[float], list[float] | None]:
    """The metric of every item, in its own unit, and how items weigh.

    Neither, where items are other things than numbers, from which the harness computes one of all
    together: f1 or bleu.
    """
    if metric in PER_SIZE and all(isinstance(item, tuple | list) for item in mine):
        sizes = [float(size) for _, size in mine]
        nats = [
            -float(logprob) / (size or 1) for (logprob, _), size in zip(mine, sizes, strict=True)
        ]
        # Of so many nats a perplexity is beyond all numbers.
        return [PER_SIZE[metric](min(n, 700.0)) for n in nats], sizes
    if not all(isinstance(item, int | float | np.number | np.bool_) for item in mine):
        return [], None
    numbers = [float(item) for item in mine]
    return [math.exp(min(-n, 700.0)) for n in numbers] if metric == "perplexity" else numbers, None


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
