"""The guide's own entry: a checkpoint -> a model on the ranks there are -> a checkpoint.

    bridge = ossature.AutoBridge.from_hf_pretrained("openai/gpt-oss-20b")
    provider = bridge.to_provider()
    provider.tp, provider.ep = 2, 4
    model = provider.provide_distributed_model()
    bridge.export_ckpt("runs/mine", "exported")

A thin cover over the public functions, for those who come from NVIDIA-NeMo/Megatron-Bridge: its
names and keywords are accepted beside ours.
"""

from __future__ import annotations

import atexit
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ossature.config import ParallelConfig
from ossature.recipes import AXES

if TYPE_CHECKING:
    from ossature.convert.transfer import Report
    from ossature.model.config import ModelConfig
    from ossature.model.transformer import Transformer

OURS = ("pp", "dp_replicate", "dp_shard", "cp", "tp", "ep", "etp")


class AutoBridge:
    """A checkpoint in any format that a model can be made of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def from_hf_pretrained(cls, path: str | Path, *, trust_remote_code: bool = False) -> AutoBridge:
        """Of a local folder, in any format, or of an id on the Hugging Face hub (downloaded).

        Args:
            trust_remote_code: accepted and not needed: no code is ever taken from a checkpoint.
        """
        from ossature.convert.folder import resolve

        if Path(path).is_dir():
            return cls(resolve(path))
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )

        patterns = ["*.safetensors", "*.json", "*.jinja"]
        try:
            return cls(Path(snapshot_download(str(path), allow_patterns=patterns)))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{path}: no such folder, and not to be had: {reason}") from None

    @property
    def config(self) -> ModelConfig:
        from ossature.convert.folder import open_source

        return open_source(self.folder).config

    def to_provider(self, *, load_weights: bool = True) -> Provider:
        """What makes the model, once its layout is set.

        Args:
            load_weights: must be True; random weights are drawn by `ossature train` without init.
        """
        if not load_weights:
            raise ValueError("load_weights must be True: `ossature train` draws random weights")
        return Provider(self)

    to_megatron_provider = to_provider

    @staticmethod
    def export_ckpt(
        native_path: str | Path | None = None,
        hf_path: str | Path | None = None,
        *,
        megatron_path: str | Path | None = None,
        format: str = "bf16",
        show_progress: bool = False,
    ) -> Report:
        """Write a run, or one of its checkpoints, as a folder that transformers loads.

        Args:
            megatron_path: the guide's name for `native_path`.
            format: "bf16" or "mxfp4".
            show_progress: accepted; `ossature convert` shows it.
        """
        from ossature.convert.folder import open_source, write_folder

        source = native_path or megatron_path
        if source is None or hf_path is None or (native_path and megatron_path):
            raise ValueError("export_ckpt: give native_path (or megatron_path) and hf_path")
        return write_folder(open_source(source), hf_path, format)  # type: ignore[arg-type]

    @staticmethod
    def import_ckpt(
        hf_path: str | Path,
        native_path: str | Path | None = None,
        *,
        megatron_path: str | Path | None = None,
    ) -> Report:
        """Write a published folder as a native one."""
        from ossature.convert.folder import open_source, write_folder

        target = native_path or megatron_path
        if target is None:
            raise ValueError("import_ckpt: give native_path (or megatron_path)")
        return write_folder(open_source(hf_path), target, "native")


class Provider:
    """Makes the model of a bridge on the ranks of this launch.

    The axes of `parallel` are attributes: tp, pp, cp, ep, etp, dp_shard, dp_replicate, and the
    guide's names for them (tensor_model_parallel_size ...).  Another attribute is an error.
    """

    def __init__(self, bridge: AutoBridge) -> None:
        axes = ParallelConfig()
        given = {axis: getattr(axes, axis) for axis in OURS}
        self.__dict__.update(given, bridge=bridge, dtype=torch.bfloat16, sequence_parallel=None)

    def __setattr__(self, name: str, value: Any) -> None:
        name = AXES.get(name, name)
        if name not in (*OURS, "dtype", "sequence_parallel"):
            raise AttributeError(f"a provider has no {name}: set {', '.join(OURS)} or dtype")
        self.__dict__[name] = value

    def __getattr__(self, name: str) -> Any:
        if name in AXES:
            return self.__dict__[AXES[name]]
        raise AttributeError(f"a provider has no {name}")

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(**{axis: self.__dict__[axis] for axis in OURS})

    def finalize(self) -> ParallelConfig:
        """Check the layout against the model and the ranks; `provide_distributed_model` does too.

        Raises:
            ValueError: an axis does not divide what it splits, with both numbers.
        """
        from ossature.parallel import mesh
        from ossature.parallel.environment import environment

        axes = self.parallel
        if axes.tp > 1 and self.__dict__["sequence_parallel"] is False:
            raise ValueError(
                f"sequence_parallel must be True when tp is {axes.tp}: it is on with tp"
            )
        world = dist.get_world_size() if dist.is_initialized() else environment().world
        mesh.sizes(axes, world)
        mesh.check_model(axes, self.bridge.config, seq_len=2 * axes.cp * axes.tp)
        return axes

    def provide_distributed_model(self, wrap_with_ddp: bool = False) -> Transformer:
        """The model, each rank with its part; all ranks make this call.

        Args:
            wrap_with_ddp: must be False: gradients are reduced by FSDP, in `ossature train`.
        """
        from ossature.convert.open import open_model
        from ossature.parallel.environment import environment
        from ossature.parallel.launch import Ranks, launched

        if wrap_with_ddp:
            raise ValueError("wrap_with_ddp must be False: FSDP reduces gradients by itself")
        self.finalize()
        stack = ExitStack()
        if environment().world == 1 and not dist.is_initialized():
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            ranks = Ranks(rank=0, local_rank=0, world=1, device=device)
        else:
            ranks = stack.enter_context(launched())
            atexit.register(stack.close)  # the model talks to other ranks as long as it lives
        return open_model(self.bridge.folder, self.parallel, self.dtype, ranks)
