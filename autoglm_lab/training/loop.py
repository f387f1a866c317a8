"""transformers' Trainer over a `Step` of ours: its optimiser, schedule, order of the data, checkpoints and resuming."""
# The Trainer is partly annotated.
# mypy: disable-error-code="misc, no-untyped-call"

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from autoglm_lab.errors import TrainingError
from autoglm_lab.training.adapters import flush
from autoglm_lab.training.course import Schedule
from autoglm_lab.training.examples import Example
from autoglm_lab.training.running_mean import RunningMean

WEIGHTS = "learnt.safetensors"
MEAN = "mean.safetensors"
_STATE = ("trainer_state.json", "optimizer.pt", "scheduler.pt", WEIGHTS)


class Learnt(nn.Module):
    """The parameters that learn, and nothing else: what the Trainer moves, optimises and saves is only this.

    Args:
        parameters: by their names in the model.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self.named = dict(parameters)
        for name, parameter in parameters.items():
            self.register_parameter(name.replace(".", "/"), parameter)

    def write(self, path: Path) -> None:
        save_file({name: value.detach().cpu().contiguous() for name, value in self.named.items()}, path)

    def read(self, path: Path) -> None:
        """Raises `TrainingError` where the file holds other parameters."""
        found = load_file(path)
        if set(found) != set(self.named) or any(found[n].shape != self.named[n].shape for n in found):
            raise TrainingError(f"'{path.parent}' is a checkpoint of another training: resume with the same settings")
        with torch.no_grad():
            for name, value in found.items():
                self.named[name].copy_(value)


class Loop(Trainer):  # type: ignore[no-any-unimported, unused-ignore]
    """Args:
    learnt: what learns.
    run: forward and backward over the dialogues of one step; their mean loss.
    stored: told what the gradients and the optimiser's states take, in bytes, after each step.
    mean: of what learns, if one is kept; it is in the checkpoints too.
    """

    def __init__(
        self,
        learnt: Learnt,
        arguments: TrainingArguments,
        examples: Sequence[Example],
        run: Callable[[Sequence[Example]], Tensor],
        *,
        optimizer: tuple[Any, dict[str, Any]] | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        stored: Callable[[int, int], None] = lambda _gradients, _states: None,
        mean: RunningMean | None = None,
    ) -> None:
        self._run, self._stored, self._learnt, self._mean = run, stored, learnt, mean
        self._staging: Path | None = None
        super().__init__(
            learnt,
            arguments,
            data_collator=_as_they_are,
            train_dataset=list(examples),  # type: ignore[arg-type, unused-ignore]
            callbacks=[*callbacks, *([_Update(mean)] if mean is not None else [])],
            optimizer_cls_and_kwargs=optimizer,
        )
        for shown in ("PrinterCallback", "ProgressCallback", "NotebookProgressCallback"):
            for callback in [one for one in self.callback_handler.callbacks if type(one).__name__ == shown]:
                self.remove_callback(callback)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """As the Trainer's, in micro-batches of ours."""
        del model, num_items_in_batch
        with self.compute_loss_context_manager():
            loss = self._run(inputs)
        gradients = sum(p.grad.nbytes for p in self._learnt.parameters() if p.grad is not None)
        self._stored(gradients, self.state_bytes())
        return loss

    def state_bytes(self) -> int:
        """Bytes of the optimiser's states."""
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        if optimizer is None:
            return 0
        values = [value for one in optimizer.state.values() for value in one.values() if isinstance(value, Tensor)]
        return sum(value.nbytes if type(value) is Tensor else _inner_bytes(value) for value in values)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Matrices; biases and the scales of norms do not decay."""
        return [name for name, parameter in model.named_parameters() if parameter.dim() > 1]

    def floating_point_ops(self, inputs: Any) -> int:
        del inputs
        return 0

    def _get_num_items_in_batch(self, batch_samples: Any, device: Any) -> None:
        del batch_samples, device

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else str(super()._get_output_dir(trial))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Into a folder beside the others, which gets its name when every file is on disk."""
        out = Path(str(self.args.output_dir))
        name = f"checkpoint-{self.state.global_step}"
        staging = self._staging = out / f".writing-{self.state.global_step}"
        shutil.rmtree(staging, ignore_errors=True)
        try:
            super()._save_checkpoint(model, trial)
            flush(staging / name)
            shutil.rmtree(out / name, ignore_errors=True)
            (staging / name).replace(out / name)
        finally:
            self._staging = None
            shutil.rmtree(staging, ignore_errors=True)
        for old in checkpoints(out)[: -(self.args.save_total_limit or 2)]:
            shutil.rmtree(old, ignore_errors=True)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        del state_dict
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        self._learnt.write(folder / WEIGHTS)
        if self._mean is not None:
            self._mean.write(folder / MEAN)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        del model
        self._learnt.read(Path(resume_from_checkpoint) / WEIGHTS)
        if self._mean is not None:
            self._mean.read(Path(resume_from_checkpoint) / MEAN)


class _Update(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Takes each step into a mean."""

    def __init__(self, mean: RunningMean) -> None:
        self._mean = mean

    def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> Any:
        del args, named
        self._mean.update(state.global_step)
        return control


def _as_they_are(examples: list[Any]) -> Any:
    return examples


def checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if all((path / name).is_file() for name in _STATE)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint in a folder."""
    return next(reversed(checkpoints(folder)), None)


def arguments(
    out: Path,
    device: torch.device,
    *,
    batch: int,
    steps: int,
    rate: float,
    warm_up: int,
    schedule: Schedule,
    weight_decay: float,
    save_every: int,
    seed: int,
) -> TrainingArguments:
    """What the Trainer is told: one optimiser step for each batch of ``batch`` dialogues."""
    made = TrainingArguments(
        output_dir=str(out),
        per_device_train_batch_size=batch,
        max_steps=steps,
        learning_rate=rate,
        lr_scheduler_type="cosine" if schedule == "cosine" else "constant_with_warmup",
        warmup_steps=warm_up,
        weight_decay=weight_decay,
        max_grad_norm=1.0,
        logging_steps=1,
        logging_strategy="no",
        save_strategy="steps",
        save_steps=save_every,
        save_total_limit=2,
        report_to=[],
        remove_unused_columns=False,
        use_cpu=device.type == "cpu",
        seed=seed,
        data_seed=seed,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        dataloader_drop_last=False,
    )
    made._n_gpu = min(1, made.n_gpu)  # noqa: SLF001 - else every GPU of the machine would get a copy of the model
    return made


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without what the Trainer says about a model that is not one of its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def optimizer_of(name: str, rate: float) -> tuple[Any, dict[str, Any]] | None:
    """The optimiser's class and settings, which the Trainer takes as they are; None: the Trainer's own AdamW.

    Raises:
        TrainingError: torchao, which has the 8-bit one, is not there.
    """
    if name == "adamw":
        return None
    try:
        from torchao.optim import AdamW8bit  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        raise TrainingError("training.optimizer='adamw-8bit' needs torchao: pip install torchao") from None
    return AdamW8bit, {"lr": rate}


def _inner_bytes(value: Any) -> int:
    """Bytes of a tensor that is made of others, as 8-bit states are."""
    names, _ = value.__tensor_flatten__() if hasattr(value, "__tensor_flatten__") else ((), None)
    return sum(int(getattr(value, name).nbytes) for name in names)
