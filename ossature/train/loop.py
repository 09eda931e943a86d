"""The training loop: build everything, then step, log, validate, sample, save.

One loop for every number of ranks: it is written for a mesh, and a laptop is a mesh of size 1.
"""

from __future__ import annotations

import gc
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import torch

from ossature.checkpoint.store import newest
from ossature.config import TrainConfig
from ossature.data.loader import Batch
from ossature.model.flops import active_parameters, flops_per_token, parameters
from ossature.model.lora import table
from ossature.parallel.gradients import global_norm, scale_and_clip
from ossature.parallel.launch import launched
from ossature.train import optim
from ossature.train.console import Screen
from ossature.train.devices import device_name, memory_bytes, peak_flops
from ossature.train.evaluate import validate
from ossature.train.metrics import MetricsLog, Record, check_services, cut_after, router_record
from ossature.train.resume import seed_step
from ossature.train.samples import samples
from ossature.train.setup import Parts, build, whole_model, write_config
from ossature.train.signals import StopRequest
from ossature.train.step import accumulate, anneal_balance, count, update_balance
from ossature.train.tasks import ask_tasks, check_tasks

STEADY_STEPS = 1000
"""Steps without an overflow after which fp16's loss scale doubles."""


class TrainingFailed(RuntimeError):
    """A run that cannot go on; the message says why, and which checkpoint is its last."""


class ConfigError(ValueError):
    """What every rank finds wrong alike, before the first step: one of them says it."""


def train(
    config: TrainConfig, again: str = "the same command", stop: StopRequest | None = None
) -> Path | None:
    """Train until `config.steps` or a signal; returns the newest checkpoint, if there is one.

    Args:
        again: the command that goes on with this run, for the line printed after a signal.
        stop: asked to stop, the run saves and ends after the current step; default: never.

    Raises:
        ConfigError: settings, corpus and checkpoint that do not fit together.
        TrainingFailed: too many steps without a finite loss and gradient.
        OSError: among others, when another rank is lost.
    """
    with ExitStack() as stack:
        stop = stop or StopRequest()
        stack.enter_context(_settings(config))
        ranks = stack.enter_context(launched(config.timeout_seconds, lambda: stop.asked))
        try:
            check_services(config)
            check_tasks(config)
            parts = build(config, ranks)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        stack.enter_context(closing(parts.saver))
        progress, screen = parts.progress, Screen(config.steps, config.log.every_steps, ranks.first)
        log = None
        if ranks.first:
            config.run.mkdir(parents=True, exist_ok=True)
            write_config(config)
            cut_after(config.run / "samples.jsonl", progress.step)
            log = stack.enter_context(closing(MetricsLog(config, progress.step)))
        for line in introduction(parts):
            screen.say(line)
        screen.begin(progress.step)
        stack.callback(screen.end)

        stopped = False
        while progress.step < config.steps:
            began = time.monotonic()
            batches = list(parts.loader.micro_batches(progress.step))
            counted, stopped = count(batches, stop.asked, parts.mesh)
            if stopped:
                break
            record = one_step(parts, batches, counted)
            parts.data_state = parts.loader.state()
            record["seconds"] = time.monotonic() - began
            describe_speed(record, parts)
            if due(config.eval.every_steps, progress.step, config.steps):
                assert parts.validation is not None
                loss = validate(parts.model, parts.validation, parts.mesh)
                record["validation_loss"] = loss
                screen.say(f"step {progress.step}: validation loss {loss:.4f}")
            if due(config.eval.tasks_every_steps, progress.step, config.steps):
                record["eval"] = ask_tasks(parts)
                for name, value in record["eval"].items():
                    if ", " not in name:  # kinds of questions are in metrics.jsonl alone
                        screen.say(f"step {progress.step}: {name} {value:.4f}")
            if log is not None:
                log.write(record)
            screen.show(record)
            if len(progress.recent_skips) > config.max_skipped_steps:
                raise TrainingFailed(_too_many_skips(parts))
            if due(config.sample.every_steps, progress.step, config.steps):
                show_samples(parts, screen)
            if due(config.checkpoint.every_steps, progress.step, 0):
                parts.save()
            if config.gc_every_steps and progress.step % config.gc_every_steps == 0:
                gc.collect(1)
        if progress.step:
            parts.save()
        parts.saver.wait()
        screen.end()
        last = newest(config.run) if progress.step else None
        if stopped and last is None:
            screen.say("stopped by a signal before the first step; nothing to save")
        elif stopped:
            screen.say(f"stopped by a signal after step {progress.step}; saved {last}")
            screen.say(f"to go on: {again}")
        else:
            screen.say(f"{progress.step} steps done; saved {last}")
        return last


def due(every_steps: int, step: int, last: int) -> bool:
    """Whether a thing done every so many steps is done now; also at the last step."""
    return bool(every_steps) and (step % every_steps == 0 or step == last)


def one_step(parts: Parts, batches: list[Batch], counted: int) -> Record:
    """One optimizer step, or a skipped one if its loss or gradient is not finite."""
    config, progress, model = parts.config, parts.progress, parts.model
    step = progress.step + 1
    seed_step(config.seed, step, parts.ranks.rank)
    router = config.router
    routed = step % config.log.every_steps == 0 or bool(
        router.aux_loss or router.z_loss or router.bias_update_rate
    )
    lr = optim.learning_rate(config.optim, step, config.steps)
    for group in parts.optimizer.param_groups:
        group["lr"] = lr
    sums = accumulate(
        model,
        batches,
        counted,
        parts.mesh,
        router,
        loss_scale=progress.loss_scale,
        log_router=routed,
        pipeline=parts.pipeline,
        axes=config.parallel,
    )
    if parts.in_backward is None:
        scaled_norm = global_norm(parts.weights.values(), parts.mesh)
    else:
        scaled_norm = parts.in_backward.norm()
    # The one time in a step that the host waits for the device.
    heads = torch.stack([sums.loss, sums.router_loss, scaled_norm.to(sums.loss.device)])
    numbers = torch.cat([heads, sums.entropy, sums.counts.flatten()]).tolist()
    loss, router_loss, norm, *rest = numbers
    norm /= progress.loss_scale

    progress.step = step
    progress.tokens += config.global_batch_tokens
    progress.counted_tokens += counted
    good = math.isfinite(loss) and math.isfinite(norm)
    if not good and parts.in_backward is not None:
        raise TrainingFailed(
            f"step {step}: loss ({loss}) or gradient norm ({norm}) not finite, after "
            f"optim.in_backward has stepped; last checkpoint: {newest(config.run) or 'none'}"
        )
    if good:
        scale_and_clip(parts.weights.values(), scaled_norm, config.optim.clip, progress.loss_scale)
        parts.optimizer.step()
    else:
        progress.skipped_steps += 1
        if not (math.isfinite(loss) and progress.loss_scale > 1):
            progress.note_skip()
    parts.optimizer.zero_grad(set_to_none=True)
    if router.bias_update_rate:
        left = config.steps - step
        if left < router.bias_anneal_steps:
            anneal_balance(model, left / (left + 1))
        elif good:
            update_balance(model, sums.counts, router.bias_update_rate)
    record: Record = {
        "step": step,
        "loss": loss,
        "grad_norm": norm,
        "lr": lr,
        "tokens": progress.tokens,
        "counted_tokens": progress.counted_tokens,
        "skipped_steps": progress.skipped_steps,
    }
    if router.aux_loss or router.z_loss:
        record["router_loss"] = router_loss
    if config.precision == "fp16":
        record["loss_scale"] = progress.loss_scale
        adjust_loss_scale(parts, good)
    if step % config.log.every_steps == 0:
        layers, experts = sums.counts.shape
        counts = [rest[n : n + experts] for n in range(layers, len(rest), experts)]
        record["router"] = router_record(counts, rest[:layers])
    return record


def adjust_loss_scale(parts: Parts, good: bool) -> None:
    """Halve fp16's loss scale after an overflow, double it after a long time without."""
    progress = parts.progress
    progress.steady_steps = progress.steady_steps + 1 if good else 0
    if not good:
        progress.loss_scale = max(1.0, progress.loss_scale / 2)
    elif progress.steady_steps == STEADY_STEPS:
        progress.loss_scale, progress.steady_steps = progress.loss_scale * 2, 0


def describe_speed(record: Record, parts: Parts) -> None:
    """Add tokens_per_second, memory_bytes, and mfu where the device's peak is known."""
    config, device = parts.config, parts.ranks.device
    rate = config.global_batch_tokens / record["seconds"]
    record["tokens_per_second"] = rate
    record["memory_bytes"] = memory_bytes(device)
    peak = peak_flops(device_name(device), config.precision)
    if peak is not None:
        flops = flops_per_token(parts.model.config, config.data.seq_len, config.lora)
        record["mfu"] = rate * flops / (peak * parts.ranks.world)


def show_samples(parts: Parts, screen: Screen) -> None:
    """Print what the model says, and append it to samples.jsonl."""
    config, step = parts.config, parts.progress.step
    said = samples(parts.model, parts.tokenizer, config, config.seed + step, parts.ranks.device)
    if parts.ranks.first:
        with (config.run / "samples.jsonl").open("a", encoding="utf-8") as file:
            for entry in said:
                file.write(json.dumps({"step": step, **entry}) + "\n")
    for entry in said:
        problem = f" ({entry['problem']})" if entry.get("problem") else ""
        screen.say(f"step {step}: {entry['prompt']!r} -> {entry['text']!r}{problem}")


def introduction(parts: Parts) -> Iterator[str]:
    """What is trained on what and how, before the first step."""
    config, shape, mesh = parts.config, parts.model.config, parts.mesh
    assert mesh.mesh_dim_names is not None
    axes = {name: mesh[name].size() for name in mesh.mesh_dim_names if mesh[name].size() > 1}
    layout = " x ".join(f"{name} {size}" for name, size in axes.items()) or "one rank"
    borrowed = {"ep": config.parallel.ep, "etp": config.parallel.etp}
    layout += "".join(f", {name} {size}" for name, size in borrowed.items() if size > 1)
    yield (
        f"model {config.model}: {parameters(shape):,} parameters, {active_parameters(shape):,} "
        f"active; {parts.origin}"
    )
    yield (
        f"{config.global_batch_tokens:,} tokens a step in rows of {config.data.seq_len:,}, "
        f"{config.global_batch_tokens * config.steps:,} in all; {config.precision} on "
        f"{device_name(parts.ranks.device)}, {layout}"
    )
    if parts.pipeline is not None:
        yield "of the stages on the first rank:"
    yield from optim.describe(parts.optimizer)
    if config.lora.rank:
        lora = config.lora
        yield (
            f"{'DoRA' if lora.dora else 'LoRA'}: rank {lora.rank}, scale {lora.scale:g}, dropout "
            f"{lora.dropout:g}"
        )
        yield from table(whole_model(config, shape))


def _too_many_skips(parts: Parts) -> str:
    config, progress = parts.config, parts.progress
    parts.saver.wait()
    last = newest(config.run)
    return (
        f"step {progress.step}: loss or gradient not finite, for the "
        f"{len(progress.recent_skips)}th time in 1000 steps (max_skipped_steps is "
        f"{config.max_skipped_steps}); last checkpoint: {last or 'none'}"
    )


@contextmanager
def _settings(config: TrainConfig) -> Iterator[None]:
    """Process-wide switches of a run, set back at its end."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    automatic = gc.isenabled()
    if config.gc_every_steps:
        gc.disable()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic)
        if automatic:
            gc.enable()
