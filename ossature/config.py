"""Every knob of a run, on one page.  No torch here: `--help` and typos answer at once.

A run file (TOML) is flags written down: `parse` reads both into words per key and converts them
in one place, so files and flags have one set of errors and a later value wins over an earlier one.
No option is a union or a group that may be absent: a feature is off when its number is zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from ossature.arguments import parse as parse


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    path: Path | None = None
    """Folder made by `ossature data build` or `data chat`, or a prefix with .bin and .idx."""
    blend: tuple[str, ...] = ()
    """Several corpora: "path path ..." or "weight path weight path ..."; instead of path."""
    train_blend: tuple[str, ...] = ()
    """A blend for each split, of corpora that are used whole; instead of path and blend."""
    validation_blend: tuple[str, ...] = ()
    test_blend: tuple[str, ...] = ()
    split: str = ""
    """Shares of the documents for training, validation, test, such as "9999,8,2"; empty takes
    the split stored in the data folder."""
    seq_len: int = 4096
    """Tokens in one row."""
    mock: bool = False
    """Random tokens (Zipf) instead of a corpus; only ever when asked for here."""
    separate_documents: bool = True
    """Tokens attend within their own document only; positions restart with each."""

    def check(self) -> None:
        """Raises ValueError unless the data come from exactly one place."""
        each = bool(self.train_blend or self.validation_blend or self.test_blend)
        given = [self.path is not None, bool(self.blend), each, self.mock]
        if sum(given) != 1:
            raise ValueError(
                "data: give exactly one of data.path, data.blend, blends for each split and "
                f"data.mock ({sum(given)} are given)"
            )
        if each and self.split:
            raise ValueError(f"data.split ({self.split}) must be empty with a blend for each split")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    name: Literal["adamw", "muon"] = "adamw"
    """muon steps the matrices of attention and experts with Muon, the rest with AdamW."""
    states: Literal["fp32", "bf16", "8bit"] = "fp32"
    """How AdamW's two moments are kept: 8, 4 or 2.25 bytes a parameter."""
    weights: Literal["fp32", "bf16"] = "fp32"
    """Master weights; bf16 rounds every update stochastically and has no other copy."""
    in_backward: bool = False
    """Step each weight when its gradient is found, and hold no other: one rank, one micro-batch
    a step, no clipping, weights in the precision of the computation."""
    lr: float = 3e-4
    """Peak learning rate."""
    min_lr: float = 3e-5
    """Learning rate at the end of the decay."""
    warmup_steps: int = 100
    decay_steps: int = 0
    """Steps of the decay, after the warm-up; 0 decays until the last step.  wsd decays over the
    last so many steps of the run (0: over the last fifth)."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """wsd: warm-up, stable, then linear decay."""
    weight_decay: float = 0.1
    """On matrices only: never on norms, biases, sinks and the embedding."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0
    """Greatest global norm of the gradient; 0 does not clip."""


LORA_TARGETS = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_up", "down", "router", "embedding", "lm_head",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Adapters of low rank on a frozen model (arXiv 2106.09685): W + scale x B @ A."""

    rank: int = 0
    """Of the adapters; 0 trains the whole model and none of the keys below counts."""
    alpha: float = 32.0
    """scale is alpha / rank."""
    dropout: float = 0.0
    """Share of an adapter's inputs that is dropped, in training."""
    dora: bool = False
    """Train the length of every row of the adapted matrices too (DoRA, arXiv 2402.09353)."""
    rank_stabilised: bool = False
    """scale is alpha / sqrt(rank) instead (arXiv 2312.03732)."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up", "down")
    """What is adapted, by leaf name: these, and router, embedding, lm_head.  gate_up and down are
    the experts', an adapter for each expert."""
    base: Literal["plain", "mxfp4"] = "plain"
    """How the experts' frozen matrices are held in memory: in the precision of the run, or packed
    in 4.25 bits a number."""
    quantize_base: bool = False
    """With base = mxfp4, quantise a checkpoint that is stored otherwise; false refuses it."""
    start: str = ""
    """Folder with an adapter, PEFT's or a run's, whose values training begins with; its settings
    must be those above.  Empty begins with fresh ones, which change nothing."""

    @property
    def scale(self) -> float:
        """What B @ A is multiplied with."""
        if not self.rank:
            return 0.0
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora.dropout ({self.dropout}) must be at least 0 and less than 1")
        if self.rank and not 0 < self.alpha < math.inf:
            raise ValueError(f"lora.alpha ({self.alpha}) must be more than 0 and finite")
        if self.quantize_base and self.base != "mxfp4":
            raise ValueError(f"lora.quantize_base does nothing when lora.base is {self.base}")
        for target in self.targets:
            if target not in LORA_TARGETS:
                raise ValueError(
                    f"lora.targets: {target} matches nothing; there are {', '.join(LORA_TARGETS)}"
                )
        if len(set(self.targets)) < len(self.targets):
            raise ValueError(f"lora.targets ({', '.join(self.targets)}) names one twice")
        if self.start and not self.rank:
            raise ValueError(f"lora.start ({self.start}) needs lora.rank")
        if self.rank and not self.targets:
            raise ValueError(f"lora.rank ({self.rank}) needs at least one of lora.targets")


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    aux_loss: float = 0.0
    """Coefficient of the load-balancing loss.  The 0.9 of the published config.json is never
    adopted: balance is already worth num_experts_per_tok, so it would add 3.6 to the loss."""
    z_loss: float = 0.0
    """Coefficient of mean(logsumexp(router logits) ** 2)."""
    bias_update_rate: float = 0.0
    """Step of the aux-loss-free balancing bias (arXiv 2408.15664).  Pretraining only: exported
    formats have no place for the bias, so it is annealed to zero over the last steps."""
    bias_anneal_steps: int = 100
    """Last steps of a run, over which the balancing bias shrinks linearly to zero."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    every_steps: int = 0
    """Validation every so many steps; 0 never."""
    tokens: int = 2**16
    """Size of the fixed validation set, in tokens, rounded up to whole rows."""
    tasks: tuple[str, ...] = ()
    """Tasks of `ossature eval`, asked of the model as it is; needs a corpus with a tokenizer."""
    tasks_every_steps: int = 0
    """Ask them every so many steps; 0 never."""
    task_items: int = 100
    """Questions of each task, at most; 0 takes all."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    every_steps: int = 0
    """Sample text every so many steps; 0 never."""
    prompts: tuple[str, ...] = ()
    """What is continued, "def " if there are none.  With chat data, what a user says, answered in
    harmony; if there are none, the first questions of the validation split."""
    max_new_tokens: int = 64
    temperature: float = 0.8


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    every_steps: int = 0
    """Save every so many steps; 0 only at the end."""
    keep: int = 2
    """Newest checkpoints that stay on disk; 0 keeps all."""
    asynchronous: bool = False
    """Write in the background while training goes on."""


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """world = pp x dp_replicate x dp_shard x cp x tp; ep x etp divides dp_shard x cp x tp."""

    pp: int = 1
    """Pipeline stages."""
    dp_replicate: int = 1
    """Copies of the model."""
    dp_shard: int = 0
    """Ranks that share the weights of one copy (FSDP); 0 takes the ranks left over."""
    cp: int = 1
    """Ranks that share each sequence."""
    tp: int = 1
    """Ranks that share each head and each vocabulary row."""
    ep: int = 1
    """Ranks that share the experts."""
    etp: int = 1
    """Ranks that share the inner dimension of each expert."""
    loss_parallel: bool = True
    """Under tp, find the loss without gathering logits over the vocabulary."""
    async_tp: bool = False
    """Under tp, transfer in pieces while attention's projections multiply others: between GPUs of
    one machine; a CPU does one after the other."""
    pp_schedule: Literal["GPipe", "1F1B", "Interleaved1F1B", "ZBVZeroBubble", "DualPipeV"] = "1F1B"
    """Order of the micro-batches through the pipeline; the last two put the first and the last
    stage on one rank."""
    pp_chunks: int = 2
    """Stages of each rank under Interleaved1F1B."""
    reshard_after_forward: Literal["auto", "always", "never"] = "auto"
    """Whether a block's gathered weights are dropped after its forward and gathered again for its
    backward.  never keeps them for all micro-batches of a step; auto drops them unless there are
    pipeline stages."""
    prefetch_blocks: int = 0
    """Blocks whose weights are gathered ahead of the block that computes, forward and backward;
    0 leaves it to FSDP, which looks one block ahead."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """In which gradients are added up over ranks, and over micro-batches until then."""
    reduce_every_micro_batch: bool = False
    """Reduce-scatter after each micro-batch and keep gradients sharded in between: less memory, as
    many times the communication.  Copies are still added up once a step."""
    cpu_offload: bool = False
    """Keep master weights, gradients and optimizer in the memory of the host, and step there."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    every_steps: int = 1
    """Progress line every so many steps; metrics.jsonl has every step."""
    tensorboard: bool = True
    wandb_project: str = ""
    """Weights & Biases project (needs ossature[wandb]); empty does not log there."""
    wandb_entity: str = ""
    """Whose project; empty takes the default of the account."""
    wandb_name: str = ""
    """Name of the run there; empty takes that of its folder."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    run: Path
    """Folder for checkpoints, metrics and the resolved copy of this config."""
    model: str = "debug"
    """"debug", "20b", "120b", or the path of a config.json."""
    num_layers: int = 0
    """Cuts the depth of the model, for trials; 0 takes all of its layers."""
    init: Path | None = None
    """Checkpoint to start from, in any format; none starts from random weights."""
    steps: int = 1000
    """Optimizer steps."""
    seed: int = 1234
    """Of the initial weights and of the order of the data."""
    global_batch_tokens: int = 2**19
    """Tokens per optimizer step, over all ranks and micro-batches."""
    micro_batch_tokens: int = 2**14
    """Tokens one rank holds in one forward pass."""
    precision: Literal["bf16", "fp32", "fp16"] = "bf16"
    """Of the computation; master weights, optimizer and reductions are fp32 throughout."""
    float8: Literal["", "tensorwise", "rowwise", "mxfp8"] = ""
    """Multiply in 8 bits in attention's projections and in experts (needs ossature[float8]): one
    scale a tensor, one a row, or one for each 32 numbers; empty multiplies in `precision`."""
    float8_emulate: bool = False
    """Round the same way but multiply in fp32: slow, on any device."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation checkpointing.  selective keeps matrix products, experts and attention."""
    offload_activations: bool = False
    """Keep what a block keeps for its backward in the memory of the host, but for its weights: with
    recompute full only its input."""
    compile: bool = False
    """torch.compile each block; with recompute selective, only where tp, ep, etp and cp are 1."""
    deterministic: bool = False
    """Only deterministic kernels; an operation without one raises."""
    gc_every_steps: int = 100
    """Python's garbage collector runs only then, at the same step on every rank; 0: automatic."""
    max_skipped_steps: int = 20
    """Steps with a non-finite loss or gradient, among the last 1000, that are skipped; one more
    stops the run."""
    timeout_seconds: int = 300
    """Within which every rank ends, and says why, after one has died; also how long ranks wait for
    each other at the start."""
    resume: bool = True
    """Go on from the newest checkpoint in `run`; false refuses a folder that has one."""

    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        for key, value in flatten(self):
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            least = 1 if key in _AT_LEAST_ONE else 0
            if not math.isfinite(value) or value < least:
                raise ValueError(f"{key} ({value}) must be at least {least}")
        rows, micro, whole = self.data.seq_len, self.micro_batch_tokens, self.global_batch_tokens
        if micro % rows:
            raise ValueError(
                f"micro_batch_tokens ({micro}) must be a multiple of data.seq_len ({rows})"
            )
        if whole % micro:
            raise ValueError(
                f"global_batch_tokens ({whole}) must be a multiple of micro_batch_tokens ({micro})"
            )
        self.data.check()
        asked, every = self.eval.tasks, self.eval.tasks_every_steps
        if bool(asked) != bool(every):
            raise ValueError(
                f"eval.tasks ({' '.join(asked) or 'none'}) and eval.tasks_every_steps ({every}) go "
                "together"
            )
        optim = self.optim
        for key, beta in [("optim.beta1", optim.beta1), ("optim.beta2", optim.beta2)]:
            if beta >= 1:
                raise ValueError(f"{key} ({beta}) must be less than 1")
        if optim.schedule != "constant" and optim.min_lr > optim.lr:
            raise ValueError(f"optim.min_lr ({optim.min_lr}) must be at most optim.lr ({optim.lr})")
        self._check_optimizer()
        if self.lora.base == "mxfp4" and not self.lora.rank:
            raise ValueError(
                "lora.base = mxfp4 needs lora.rank: weights that are trained cannot be packed"
            )
        self._check_float8()
        self._check_async_tp()
        if self.offload_activations and self.recompute == "selective":
            raise ValueError(
                "offload_activations (True) goes with recompute none or full, not selective: what "
                "torch keeps there it does not hand over"
            )
        if self.offload_activations and self.compile:
            raise ValueError(
                "offload_activations (True) must be false with compile: a compiled block decides "
                "itself what it keeps"
            )
        axes = self.parallel
        splits = {"tp": axes.tp, "ep": axes.ep, "etp": axes.etp, "cp": axes.cp}
        for axis, ranks in splits.items():
            if self.compile and self.recompute == "selective" and ranks > 1:
                raise ValueError(
                    f"recompute (selective) must be none or full with compile and parallel.{axis} "
                    f"({ranks}): ranks exchange data inside of a block, where its graph ends, and "
                    "torch compiles no part of such a block"
                )
        if self.parallel.reduce_every_micro_batch and self.parallel.pp > 1:
            raise ValueError(
                f"parallel.reduce_every_micro_batch (True) must be false with parallel.pp "
                f"({self.parallel.pp}): schedules reduce once, after the last micro-batch"
            )
        if self.router.bias_update_rate and self.lora.rank:
            raise ValueError(
                f"router.bias_update_rate ({self.router.bias_update_rate}) must be 0 with "
                f"lora.rank ({self.lora.rank}): the router's bias is frozen"
            )
        if self.router.bias_update_rate and self.init is not None:
            raise ValueError(
                f"router.bias_update_rate ({self.router.bias_update_rate}) must be 0 when init is "
                "given: no published format has a place for the bias of a fine-tuned router"
            )

    def _check_float8(self) -> None:
        if not self.float8:
            if self.float8_emulate:
                raise ValueError("float8_emulate (True) needs float8")
            return
        if self.precision != "bf16" and not (self.float8_emulate and self.precision == "fp32"):
            raise ValueError(f"float8 ({self.float8}) needs precision bf16, not {self.precision}")
        if self.lora.rank:
            raise ValueError(
                f"float8 ({self.float8}) must be empty with lora.rank ({self.lora.rank}): products "
                "of frozen weights are others"
            )

    def _check_async_tp(self) -> None:
        if not self.parallel.async_tp:
            return
        if self.parallel.tp == 1:
            raise ValueError("parallel.async_tp (True) needs parallel.tp of 2 or more")
        if self.float8 or self.lora.rank:
            key, value = ("float8", self.float8) if self.float8 else ("lora.rank", self.lora.rank)
            raise ValueError(
                f"parallel.async_tp (True) must be false with {key} ({value}): it multiplies with "
                "attention's plain matrices"
            )

    def _check_optimizer(self) -> None:
        optim = self.optim
        if optim.name == "muon" and optim.states == "8bit":
            raise ValueError("optim.states (8bit) must be fp32 or bf16 when optim.name is muon")
        if optim.name == "muon" and self.lora.rank:
            raise ValueError(
                f"optim.name (muon) must be adamw with lora.rank ({self.lora.rank}): Muon steps "
                "whole matrices, not the factors of their change"
            )
        if optim.weights == "bf16" and self.precision != "bf16":
            raise ValueError(
                f"optim.weights (bf16) must be fp32 when precision is {self.precision}"
            )
        if not optim.in_backward:
            return
        whole, micro = self.global_batch_tokens, self.micro_batch_tokens
        wrong = [
            (optim.clip != 0, f"optim.clip ({optim.clip}) must be 0"),
            (optim.name == "muon", "optim.name (muon) must be adamw"),
            (self.parallel.cpu_offload, "parallel.cpu_offload (True) must be false"),
            (whole != micro, f"global_batch_tokens ({whole}) must be micro_batch_tokens ({micro})"),
            (
                optim.weights != self.precision,
                f"optim.weights ({optim.weights}) must be precision ({self.precision})",
            ),
        ]
        for is_wrong, rule in wrong:
            if is_wrong:
                raise ValueError(f"optim.in_backward: {rule}")


_AT_LEAST_ONE = {
    "steps", "timeout_seconds", "global_batch_tokens", "micro_batch_tokens", "data.seq_len",
    "eval.tokens",
    "log.every_steps", "sample.max_new_tokens", "parallel.pp", "parallel.dp_replicate",
    "parallel.cp", "parallel.tp", "parallel.ep", "parallel.etp",
    "parallel.pp_chunks",
}  # fmt: skip


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key of a config with its value."""
    for entry in fields(config):
        value = getattr(config, entry.name)
        if is_dataclass(value):
            yield from flatten(value, f"{prefix}{entry.name}.")
        else:
            yield f"{prefix}{entry.name}", value


def to_json(config: Any) -> dict[str, Any]:
    """Every dotted key with a value that JSON can hold: paths as text, tuples as lists."""
    plain = {Path: str, tuple: list}
    return {
        key: next((to(value) for kind, to in plain.items() if isinstance(value, kind)), value)
        for key, value in flatten(config)
    }
