"""Many requests, one model: prompts in chunks, then a token of every running text a step.

A text that has ended leaves its place at once and a waiting request takes it, without stopping the
others.  A request is let in when the cache has room for all it may grow to: the bound on memory
holds, and no text is ever thrown out.

What a text says depends on its own request alone.  Its prompt is read by itself, in chunks that
depend on its length only; its attention sees its own keys only; its draws come from a generator of
its own.  The one thing shared are matrix products, and in float32 on a CPU those of some rows give
each row the same bits whatever their number, as long as there are a few: rows are filled up to
`ROWS`.  tests/sample/test_engine.py holds texts to that.

The model is only ever called: no parameter is touched outside of its forward, so that a model
whose weights are divided over ranks samples too, provided that all ranks make the same calls.
They do if they submit the same requests, or leave that to the first rank: see `Engine`.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ossature.data.tokenizer import Tokenizer
from ossature.model.cache import Cache
from ossature.model.config import ModelConfig
from ossature.model.prepacked import prepacked
from ossature.sample.constraint import Grammars, Matcher
from ossature.sample.options import Finish, SamplingOptions
from ossature.sample.request import Completion, Event, Request
from ossature.sample.sampling import Sampler
from ossature.sample.text import Continuation

ROWS = 8
"""Rows of a step in float32 on a CPU are filled up to a multiple of it, with copies of one that is
there.  MKL multiplies fewer than four rows in another way; matrices in oneDNN's order see to it
themselves: see `ossature.model.prepacked`."""


class Engine:
    """Runs requests on a model in evaluation mode.

    `submit` and `cancel` may be called by any thread while one thread calls `step` again and
    again.

    Args:
        max_batch: texts at a time.
        max_tokens: tokens of all running texts together that the cache may have to hold, with all
            that they may still grow by.  Memory: `max_tokens` in each full layer, `max_batch`
            windows in each sliding layer; see `ossature.model.cache.cache_bytes`.
        prefill_chunk: tokens of prompts that are read in a step, at most; longer prompts take
            several steps, between which running texts go on.
        tokenizer: for texts, stop strings and constraints.
        lockstep: with several ranks: requests come to the first rank, the others call `follow`.
            Otherwise all ranks make the same calls.
        device: that computes; default: where the weights are.
        adapters: by name, models that share the weights of `model` and add their own: see
            `ossature.convert.model.with_adapter`.  Texts of each take a pass of their own.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        max_batch: int = 8,
        max_tokens: int = 65_536,
        prefill_chunk: int = 512,
        tokenizer: Tokenizer | None = None,
        lockstep: bool = False,
        device: torch.device | None = None,
        adapters: Mapping[str, nn.Module] | None = None,
    ) -> None:
        sizes = {"max_batch": max_batch, "max_tokens": max_tokens, "prefill_chunk": prefill_chunk}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} ({size}) must be 1 or more")
        self.models = {"": model, **(adapters or {})}
        assert not any(model.training for model in self.models.values()), "call model.eval() first"
        self.tokenizer, self.lockstep = tokenizer, lockstep
        self.max_batch, self.max_tokens, self.prefill_chunk = max_batch, max_tokens, prefill_chunk
        self.config: ModelConfig = model.config  # pyright: ignore[reportAttributeAccessIssue]
        first = next(model.parameters())
        self.device = device or first.device
        plain = not all(map(prepacked, self.models.values()))
        exact = first.dtype == torch.float32 and self.device.type == "cpu"
        self._fill = ROWS if exact and plain else 1
        self.cache = Cache(self.config, max_batch, max_tokens)
        self._numbers = itertools.count()
        self._orders: list[_Order] = []
        self._wake = threading.Condition()
        self._waiting: deque[_Work] = deque()
        self._reading: deque[_Work] = deque()
        self._running: list[_Text] = []
        self._grammars: Grammars | None = None
        self._closed = False

    @property
    def busy(self) -> bool:
        """Whether there is something to do for `step`."""
        return bool(self._orders or self._waiting or self._reading or self._running)

    @property
    def waiting(self) -> int:
        """Requests that no step has begun."""
        return len(self._waiting) + len(self._orders)

    @property
    def running(self) -> int:
        """Texts that grow."""
        return len(self._running)

    @property
    def used_tokens(self) -> int:
        """Of `max_tokens`, those that are taken or kept free for running texts."""
        return self.max_tokens - self.cache.free_tokens

    def submit(self, request: Request) -> int:
        """Put a request at the end of the queue; returns its number, which its events have.

        Raises:
            ValueError: a request that can never be run: an empty prompt, a token that is not in
                the vocabulary, more than `max_tokens` or `max_batch` allow, a wrong constraint,
                an adapter that is not there.
        """
        options, prompt = request.options, list(request.prompt)
        self._check(prompt, options)
        if request.adapter not in self.models:
            known = ", ".join(name for name in self.models if name) or "none"
            raise ValueError(f"adapter ({request.adapter}) is not one of those there are: {known}")
        if options.constraint is not None:
            self._start_matcher(options)  # its mistakes are told here
        seed = options.seed
        if seed is None:
            if options.temperature and _world() > 1 and not self.lockstep:
                raise ValueError("seed: give one; ranks would each draw another text")
            seed = int(torch.randint(2**62, ()))
        with self._wake:
            number = next(self._numbers)
            self._orders.append(_Order("submit", number, prompt, options, seed, request.adapter))
            self._wake.notify_all()
        return number

    def cancel(self, request: int) -> None:
        """End a request's texts.  One that has ended, or never was, is no mistake."""
        with self._wake:
            self._orders.append(_Order("cancel", request))
            self._wake.notify_all()

    def close(self) -> None:
        """Let the other ranks return from `follow`; the next step tells them."""
        with self._wake:
            self._orders.append(_Order("close"))
            self._wake.notify_all()

    def wait(self, seconds: float) -> bool:
        """Sleep until there is something to do, at most so long; returns `busy`."""
        with self._wake:
            return self._wake.wait_for(lambda: self.busy, seconds)

    def follow(self) -> None:
        """On all ranks but the first of a lockstep engine: take part until the first one closes.

        The first rank has to step now and then while nothing is to do, or the others give up
        after the timeout of their group.
        """
        while not self._closed:
            self.step()

    @torch.no_grad()
    def step(self) -> list[Event]:
        """Let requests in, read a chunk of prompts, and add a token to every running text."""
        events = self._take_orders()
        self._admit()
        # Compiled blocks would be compiled anew for every length.
        with torch.compiler.set_stance("force_eager"):
            running = list(self._running)
            events += self._read()
            for name, model in self.models.items():
                if texts := [text for text in running if text.adapter == name]:
                    events += self._advance(model, texts)
        return events

    def generate(self, requests: Iterable[Request]) -> list[list[Completion]]:
        """Run requests to their end: for each of them, its texts."""
        assert not self.busy, "others' events would be lost"
        numbers = [self.submit(request) for request in requests]
        found: dict[int, dict[int, Completion]] = {number: {} for number in numbers}
        while self.busy:
            for event in self.step():
                text = found[event.request].setdefault(event.sample, Completion())
                if event.token is not None:
                    text.tokens.append(event.token)
                    text.logprobs.append(event.logprob)
                text.text += event.text
                text.finished = event.finished
        return [[found[n][sample] for sample in sorted(found[n])] for n in numbers]

    def _check(self, prompt: list[int], options: SamplingOptions) -> None:
        if not prompt:
            raise ValueError("prompt: it is empty; give at least one token")
        vocabulary = self.config.vocab_size
        biased = [token for token, _ in options.logit_bias]
        for name, tokens in (
            ("prompt", prompt), ("stop_ids", options.stop_ids), ("logit_bias", biased),
        ):  # fmt: skip
            wrong = next((n for n in tokens if not 0 <= n < vocabulary), None)
            if wrong is not None:
                raise ValueError(
                    f"{name}: token {wrong} is not in the model's vocabulary of {vocabulary}; "
                    "is this the model's tokenizer?"
                )
        if options.samples > self.max_batch:
            raise ValueError(f"samples ({options.samples}) must be at most {self.max_batch}")
        room = options.samples * _room(prompt, options)
        if room > self.max_tokens:
            raise ValueError(
                f"prompt ({len(prompt)}) and max_new_tokens ({options.max_new_tokens}) of "
                f"{options.samples} samples need {room} tokens in the cache, which has "
                f"{self.max_tokens}"
            )
        if self.tokenizer is None and (options.stop or options.constraint):
            raise ValueError("stop strings and constraints need the engine to have a tokenizer")

    def _take_orders(self) -> list[Event]:
        """Put what has been asked for into effect, on all ranks at the same step."""
        with self._wake:
            orders, self._orders = self._orders, []
        if self.lockstep and _world() > 1:
            box = [orders]
            dist.broadcast_object_list(box, src=0)
            orders = box[0]
        events = []
        for order in orders:
            if order.kind == "submit":
                self._waiting.append(_Work(order))
            elif order.kind == "cancel":
                events += self._drop(order.request)
            else:
                self._closed = True
        return events

    def _drop(self, request: int) -> list[Event]:
        events = []
        for queue in (self._waiting, self._reading):
            for work in [work for work in queue if work.order.request == request]:
                queue.remove(work)
                for row in work.rows:
                    self.cache.leave(row)
                events += [
                    _ended(request, n, "cancelled") for n in range(work.order.options.samples)
                ]
        for text in [text for text in self._running if text.request == request]:
            self._leave(text)
            events.append(_ended(request, text.sample, "cancelled"))
        return events

    def _admit(self) -> None:
        """First come, first served: a large request is not overtaken for ever by small ones."""
        while self._waiting:
            order = self._waiting[0].order
            samples, room = order.options.samples, _room(order.prompt, order.options)
            if self.cache.free_rows < samples or self.cache.free_tokens < samples * room:
                return
            work = self._waiting.popleft()
            work.rows = [self.cache.admit(room) for _ in range(samples)]
            self._reading.append(work)

    def _read(self) -> list[Event]:
        """The next chunk of prompts: of one, or of several that fit."""
        left, events = self.prefill_chunk, []
        while self._reading:
            work = self._reading[0]
            prompt, done = work.order.prompt, work.done
            # A chunk ends where it would end if the prompt were alone.
            size = min(self.prefill_chunk, len(prompt) - done)
            if size > left:
                break
            left -= size
            tokens = torch.tensor([prompt[done : done + size]], device=self.device)
            turn = self.cache.prompt(work.rows[0], size, self.device)
            logits = self.models[work.order.adapter](tokens, cache=turn)[:, -1]
            work.done += size
            if work.done == len(prompt):
                self._reading.popleft()
                texts = self._begin(work)
                events += self._choose(texts, logits.expand(len(texts), -1))
        return events

    def _begin(self, work: _Work) -> list[_Text]:
        """The texts of a prompt that has been read."""
        order = work.order
        for row in work.rows[1:]:
            self.cache.copy(work.rows[0], row)
        for sample, row in enumerate(work.rows):
            sampler = Sampler(
                order.options,
                # Another sample, another seed; the first has the request's own.
                order.seed + sample * 0x9E3779B97F4A7C15,
                order.prompt,
                self.config.vocab_size,
            )
            text = _Text(order.request, sample, row, order.options, sampler, order.adapter)
            if order.options.constraint is not None:
                text.matcher = self._start_matcher(order.options)
            if self.tokenizer is not None:
                text.shown = Continuation(self.tokenizer.decode, order.options.stop)
            self._running.append(text)
        return self._running[-len(work.rows) :]

    def _advance(self, model: nn.Module, texts: list[_Text]) -> list[Event]:
        """One token more for each of some texts."""
        # In the order of their rows: rings of rows 0, 1, ... are then used where they lie.
        texts.sort(key=lambda text: text.row)
        fill = -len(texts) % self._fill
        last = [text.last for text in texts]
        tokens = torch.tensor(last + last[:1] * fill, device=self.device)[:, None]
        turn = self.cache.step([text.row for text in texts], fill, self.device)
        return self._choose(texts, model(tokens, cache=turn)[:, -1])

    def _choose(self, texts: list[_Text], logits: Tensor) -> list[Event]:
        """Put the next token on each text; the n-th row of logits is the n-th text's."""
        logits = logits.float()
        best = logits.argmax(-1).tolist()
        # Each by itself: `exp` of many rows at once may differ by the last bit, by their number.
        total = torch.stack([row.logsumexp(-1) for row in logits[: len(texts)]]).tolist()
        chosen: list[int | None] = []
        problems = [""] * len(texts)  # of a text; the others go on
        for n, text in enumerate(texts):
            try:
                if not math.isfinite(total[n]):
                    raise ValueError("the model's logits are not numbers")
                chosen.append(text.choose(logits[n], best[n]))
            except ValueError as error:
                problems[n] = str(error)
                chosen.append(None)
        place = torch.tensor([n or 0 for n in chosen], device=logits.device)[:, None]
        values = logits[: len(texts)].gather(-1, place)[:, 0].tolist()
        events = []
        for n, (text, token) in enumerate(zip(texts, chosen, strict=True)):
            if token is None:
                self._leave(text)
                events.append(_ended(text.request, text.sample, "failed", problems[n]))
                continue
            top = _top(logits[n], text.options.logprobs, total[n])
            shown, finished = text.take(token)
            if finished:
                self._leave(text)
            logprob = values[n] - total[n]
            events.append(Event(text.request, text.sample, token, logprob, top, shown, finished))
        return events

    def _leave(self, text: _Text) -> None:
        self.cache.leave(text.row)
        self._running.remove(text)

    def _start_matcher(self, options: SamplingOptions) -> Matcher:
        assert self.tokenizer is not None and options.constraint is not None
        if self._grammars is None:
            self._grammars = Grammars(self.tokenizer, self.config.vocab_size)
        return self._grammars.start(options.constraint, options.stop_ids)


class _Order(NamedTuple):
    """What another thread or rank asks for."""

    kind: Literal["submit", "cancel", "close"]
    request: int = -1
    prompt: list[int] = []  # noqa: RUF012
    options: SamplingOptions = SamplingOptions()
    seed: int = 0
    adapter: str = ""


class _Work:
    """A request whose prompt has not been read."""

    def __init__(self, order: _Order) -> None:
        self.order = order
        self.rows: list[int] = []
        """Of the cache, one for each sample."""
        self.done = 0
        """Tokens of the prompt that were read."""


@dataclass(eq=False)
class _Text:
    """A text that grows."""

    request: int
    sample: int
    row: int
    """Of the cache."""
    options: SamplingOptions
    sampler: Sampler
    adapter: str
    matcher: Matcher | None = None
    shown: Continuation | None = None
    count: int = 0
    """Tokens so far."""
    last: int = -1

    def choose(self, logits: Tensor, best: int) -> int:
        """The next token.

        Raises:
            ValueError: the constraint lets none through.
        """
        if self.matcher is None:
            return best if self.sampler.plain else self.sampler.choose(logits)
        return self.sampler.choose(logits, self.matcher.allowed())

    def take(self, token: int) -> tuple[str, Finish]:
        """Go on with a token: the text that is certain now, and whether it ends here."""
        self.count, self.last = self.count + 1, token
        self.sampler.accept(token)
        shown, finished = "", ""
        if token in self.options.stop_ids:
            finished = "stop"
        else:
            if self.matcher is not None:
                self.matcher.accept(token)
            if self.shown is not None:
                shown = self.shown.feed(token)
            if (self.shown and self.shown.stopped) or (self.matcher and self.matcher.ended):
                finished = "stop"
            elif self.count == self.options.max_new_tokens:
                finished = "length"
        if finished and self.shown is not None:
            shown += self.shown.finish()
        return shown, finished


def _top(logits: Tensor, count: int, total: float) -> tuple[tuple[int, float], ...]:
    """The most probable tokens and their log-probabilities; total: logsumexp of the logits."""
    if not count:
        return ()
    most = logits.topk(min(count, len(logits)))
    values = (value - total for value in most.values.tolist())
    return tuple(zip(most.indices.tolist(), values, strict=True))


def _room(prompt: list[int], options: SamplingOptions) -> int:
    """Tokens in the cache, for each sample; the last token is never read."""
    return len(prompt) + options.max_new_tokens - 1


def _ended(request: int, sample: int, finished: Finish, problem: str = "") -> Event:
    return Event(request, sample, None, 0.0, (), "", finished, problem)


def _world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
