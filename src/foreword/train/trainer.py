"""PrefixTrainer: a ``transformers.Trainer`` whose checkpoints are prefixes.

Everything that Trainer does stays: schedules, accumulation, mixed precision, DDP through accelerate, callbacks. What
differs: only the prefix is saved (a few MB, with what is needed to resume exactly), and a loss or gradient that
leaves the finite stops the run with the last good prefix saved.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections import deque
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, Trainer, TrainingArguments

from foreword._offloaded import is_offloaded, to_the_end
from foreword.config import PrefixConfig
from foreword.data.encoded import form_of
from foreword.data.mixture import TaskMixture
from foreword.errors import AttachError, ConfigError, DivergedError, PrefixFileError
from foreword.methods import usual_learning_rate
from foreword.orthogonal import penalty
from foreword.quantized import adapters_are_on
from foreword.train import tasks
from foreword.train.arguments import PrefixTrainingArguments
from foreword.train.checkpoints import (
    STATE,
    WATCH,
    last_checkpoint,
    load_training_state,
    require_whole,
    resume_point,
)
from foreword.train.curves import draw_curves
from foreword.train.rollback import EVENT as ROLLED_BACK
from foreword.train.rollback import RollBack
from foreword.train.stages import LayerByLayer
from foreword.tuning import Tuning, tuning_of

__all__ = ["LAST_GOOD", "STATE", "WATCH", "PrefixTrainer", "last_checkpoint", "load_training_state"]

LAST_GOOD = "last-good"
_GIVEN = ("condition", "task")


class PrefixTrainer(Trainer):
    """Trains the prefix that is attached to a model.

    Args:
        model: a model with a trainable prefix on it (``fw.attach(model, fw.PrefixConfig(...))``).
        args: :class:`PrefixTrainingArguments`, or plain ``TrainingArguments``.
        kwargs: as for ``transformers.Trainer``; data sets may be a ``TaskMixture``.

    Raises:
        AttachError: no trainable prefix is attached, or the model was offloaded after it was attached.
        ConfigError: accelerate was asked to shard the model, or an offloaded one is to be trained in several processes;
            the tasks of prefix and data differ, or a penalty between tasks has no two of them.
    """

    def __init__(self, model: PreTrainedModel, args: TrainingArguments | None = None, **kwargs: Any) -> None:
        tuning = tuning_of(model)
        if tuning is None or not tuning.trainable:
            raise AttachError(
                "PrefixTrainer trains a prefix, and this model has no trainable one; attach one first: "
                "fw.attach(model, fw.PrefixConfig(length=20), tokenizer=tokenizer), or go on with a saved one: "
                "fw.attach(model, prefix, trainable=True)"
            )
        if any(p.is_meta for p in tuning.parameters()):
            raise AttachError(
                "the prefix has no numbers of its own: the model was offloaded with the prefix on it; detach, offload "
                "the model, and attach then"
            )
        self.tuning = tuning
        tuning.metadata |= form_of(kwargs.get("train_dataset"))
        args = args if args is not None else PrefixTrainingArguments(output_dir="runs/prefix")
        kwargs = tasks.prepared(tuning, args, kwargs)
        _settle_learning_rate(args, tuning)
        self._norms: deque[float] = deque(maxlen=50)
        self._overlaps: deque[Tensor] = deque(maxlen=1000)  # of tasks, since the last line of the log
        self._good: list[Tensor] = []
        with adapters_are_on(model):
            super().__init__(model, args, **kwargs)
        if self.is_fsdp_enabled:
            raise ConfigError(
                "accelerate's FSDP would shard the prefix with the base model, and its checkpoints hold the base; load "
                "the base sharded instead and launch as for DDP: from_pretrained(..., distributed_config="
                "DistributedConfig(fsdp_size=N)), with save_only_model=True in the arguments (docs/distributed.md)"
            )
        if is_offloaded(model):
            if self.args.world_size > 1:
                raise ConfigError(
                    "weights that are kept elsewhere (offloaded) can't be brought in by several processes at once; "
                    "train in one process, or shard the base with FSDP2 (docs/distributed.md)"
                )
            self.args._n_gpu = 1
            self.accelerator.device_placement = False  # its hooks place it

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Not where hooks bring the weights in: they know the device."""
        if not is_offloaded(model):
            super()._move_model_to_device(model, device)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """One group of parameters for each method that is trained, each with its learning rate."""
        if self.optimizer is None:
            chosen, options = self.get_optimizer_cls_and_kwargs(self.args, cast(PreTrainedModel, self.model))
            options.pop("lr", None)
            groups = self.tuning.parameter_groups(self.args.learning_rate)
            self.optimizer = chosen(groups, weight_decay=self.args.weight_decay, **options)
        return self.optimizer

    def _set_signature_columns_if_needed(self) -> None:
        """Keep what a prefix is given row by row, which the model's own signature doesn't name."""
        super()._set_signature_columns_if_needed()
        columns = cast(list[str], self._signature_columns)
        columns += [name for name in _GIVEN if name not in columns]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule of the stages where there are any (``LayerByLayer``), else the arguments'."""
        stages = next((c for c in self.callback_handler.callbacks if isinstance(c, LayerByLayer)), None)
        if stages is not None and self.lr_scheduler is None:
            factor = stages.learning_rate_factor(self.args.learning_rate)
            self.lr_scheduler = LambdaLR(cast(Optimizer, optimizer or self.optimizer), factor)
            self._created_lr_scheduler = True
            return self.lr_scheduler
        return super().create_scheduler(num_training_steps, optimizer)

    # ---------------------------------------------------------------- several tasks

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """A mixture's own order, else Trainer's."""
        data = train_dataset if train_dataset is not None else self.train_dataset
        if isinstance(data, TaskMixture):
            return tasks.MixtureSampler(data, self.args.seed if self.args.data_seed is None else self.args.data_seed)
        return super()._get_train_sampler(train_dataset)

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Trainer's loss; in training, with the penalty on what tasks share where one is asked for."""
        found: Any = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        strength = tasks.orthogonality(self.args)
        if not strength or not model.training:
            return found
        shared = penalty(self.tuning.encoder, len(self.tuning.tasks))
        self._overlaps.append(shared.detach())
        # A loss over the tokens of all accumulated batches is not divided by their number any more.
        counted = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        scaled = counted and num_items_in_batch is not None
        added = strength * shared / (self.current_gradient_accumulation_steps if scaled else 1)
        return (found[0] + added, *found[1:]) if return_outputs else found + added

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """With the mean penalty since the last line, before its strength: ``orthogonality``."""
        if "loss" in logs and self._overlaps:
            logs["orthogonality"] = float(torch.stack([*self._overlaps]).mean())
            self._overlaps.clear()
        super().log(logs, *args, **kwargs)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Trainer's; of several data sets (by task), the mean of their losses is ``eval_loss``."""
        eval_dataset = eval_dataset.parts if isinstance(eval_dataset, TaskMixture) else eval_dataset
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        data = eval_dataset if eval_dataset is not None else self.eval_dataset
        if isinstance(data, dict) and (mean := tasks.mean_loss(metrics, metric_key_prefix, data)):
            metrics.update(mean)
            self.log(dict(mean))
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, mean)
        return metrics

    # ---------------------------------------------------------------- watching for divergence

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        with to_the_end(model):
            loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        # One process sees its own rows only, and one that stopped or went back alone would leave the others waiting.
        each = loss.detach().float().reshape(1)
        each = self.accelerator.gather(each) if self.args.world_size > 1 else each
        if not torch.isfinite(each).all():
            first = int((~torch.isfinite(each)).nonzero()[0])
            what = f"the loss is {float(each[first])}" + (f" in process {first}" if len(each) > 1 else "")
            if self._rolled_back(what):
                return torch.zeros_like(loss)
            self._stop(what, gather_object([self._batch(inputs)])[first])
        if self._recovery is not None and (what := self._recovery.rising(float(each.mean()))):
            self._rolled_back(what)  # past its times the run goes on: the loss is a number still
        self._good = [p.detach().clone() for p in self.tuning.parameters()]
        return loss

    @property
    def _recovery(self) -> RollBack | None:
        return next((c for c in self.callback_handler.callbacks if isinstance(c, RollBack)), None)

    def _rolled_back(self, what: str) -> bool:
        """Whether a :class:`RollBack` took the run back to where it was well."""
        recovery = self._recovery
        return recovery is not None and recovery.recover(self.state, self.optimizer, self.lr_scheduler, what)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        result = super()._clip_grad_norm(model)
        if what := self._wrong_with(float(result)):
            if self._rolled_back(what):
                return torch.zeros_like(result)
            self._stop(what)
        self._norms.append(float(result))
        return result

    def _wrong_with(self, norm: float) -> str:
        """What a gradient's norm says of divergence; empty: nothing."""
        if not math.isfinite(norm):
            return f"the gradient's norm is {norm}"
        factor = getattr(self.args, "explode_factor", 1000.0)
        usual = statistics.median(self._norms) if len(self._norms) >= 10 else math.inf
        if norm > factor * usual:
            return f"the gradient's norm is {norm:.3g}, {factor:g} times the usual {usual:.3g}"
        return ""

    def _stop(self, what: str, batch: str = "") -> None:
        """Save the last good prefix and raise, in every process."""
        saved = ""
        if self._good:
            with torch.no_grad():
                for parameter, good in zip(self.tuning.parameters(), self._good, strict=True):
                    parameter.copy_(good)
            folder = Path(self.args.output_dir or ".") / LAST_GOOD
            if self.args.should_save:
                self.tuning.save(folder)
            self.accelerator.wait_for_everyone()  # the end of one process is the end of all
            saved = f" The last good prefix is in {folder}."
        batch = f" on the batch {batch}" if batch else ""
        raise DivergedError(
            f"training diverged at step {self.state.global_step + 1}: {what}{batch}.{saved} Try a third of the "
            f"learning rate (it was {self.args.learning_rate:g}), more warm-up or init from a text; look at the batch"
        )

    def _batch(self, inputs: dict[str, Any]) -> str:
        ids = inputs.get("input_ids")
        if ids is None:
            return ", ".join(f"{k} {tuple(v.shape)}" for k, v in inputs.items() if isinstance(v, Tensor))
        decode = getattr(self.processing_class, "decode", None)
        start = decode(ids[0][:24]) if decode is not None else ids[0][:24].tolist()
        return f"of shape {tuple(ids.shape)} that begins {start!r}"

    # ---------------------------------------------------------------- saving and resuming

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Write the prefix as it stands, and what training it goes on from."""
        if not self.args.should_save:
            return
        folder = Path(output_dir if output_dir is not None else self.args.output_dir or ".")
        self.tuning.metadata["training"] = self._record()
        self.tuning.save(folder)
        temporary = folder / f".{STATE}"
        save_file({k: v.detach().cpu().contiguous() for k, v in self.tuning.holder.state_dict().items()}, temporary)
        temporary.replace(folder / STATE)
        (folder / "training_args.json").write_text(self.args.to_json_string() + "\n", encoding="utf-8")

    def _record(self) -> dict[str, Any]:
        """What the prefix's file says of its training."""
        record: dict[str, Any] = {"steps": self.state.global_step, "learning_rate": self.args.learning_rate}
        for entry in reversed(self.state.log_history):
            for name in ("loss", "eval_loss"):
                if name in entry and name not in record:
                    record[name] = entry[name]
        if rolled_back := [e for e in self.state.log_history if ROLLED_BACK in e]:
            record[ROLLED_BACK] = rolled_back
        return record

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """With what the watch over divergence has seen, so that a run that goes on decides as if it had not stopped."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            seen = {"norms": torch.tensor(list(self._norms), dtype=torch.float64)}
            if self._recovery is not None:
                seen |= self._recovery.tensors()
            save_file({k: t.cpu().contiguous() for k, t in seen.items()}, Path(output_dir) / WATCH)

    def _save_rng_state(self, output_dir: str) -> None:
        """Each process its own; ``trainer_state.json``, which says that a checkpoint is whole, comes after all."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (path := Path(checkpoint) / WATCH).is_file():
            seen = load_file(path)
            self._norms.extend(seen.pop("norms").tolist())
            if self._recovery is not None:
                self._recovery.load(seen)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_training_state(self.tuning, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self.state.best_model_checkpoint is None:
            raise PrefixFileError("no checkpoint was the best one: nothing was evaluated before a checkpoint was saved")
        load_training_state(self.tuning, Path(self.state.best_model_checkpoint))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As usual, but a run that was killed after its last checkpoint takes no step beyond its last."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)
        else:
            self.control.should_training_stop = True

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, and draw the loss curve (``curve.png``).

        ``resume_from_checkpoint=True`` goes on from the last whole checkpoint, if there is one; one that was cut
        short (killed in the middle of a save), or has lost a file, is passed over.

        Raises:
            PrefixFileError: the checkpoint that is named, or all that were written to their end, lack something.
        """
        if resume_from_checkpoint is True:
            last = resume_point(Path(self.args.output_dir or "."))
            resume_from_checkpoint = str(last) if last is not None else None
        elif resume_from_checkpoint:
            require_whole(Path(resume_from_checkpoint))
        self._overlaps.clear()  # an estimate of the memory has run the loss
        result = super().train(resume_from_checkpoint, *args, **kwargs)
        if self.args.should_save and self.state.log_history:
            folder = Path(self.args.output_dir or ".")
            draw_curves({folder.name: self.state.log_history}, folder / "curve.png")
        return result


def _settle_learning_rate(args: TrainingArguments, tuning: Tuning) -> None:
    first = tuning.configs[0] if tuning.configs else None
    usual = usual_learning_rate(first) if first is not None else tuning.parameter_groups()[0]["lr"]
    if args.learning_rate is None:
        args.learning_rate = (first.learning_rate if first is not None else None) or usual
    elif args.learning_rate <= usual / 100:
        what = "a prefix" if isinstance(first, PrefixConfig | None) else "this"
        name = f"reparam={first.reparam!r}" if isinstance(first, PrefixConfig) else getattr(first, "method", "keys")
        warnings.warn(
            f"learning_rate={args.learning_rate:g} hardly moves {what}; {usual:g} is usual for {name}", stacklevel=3
        )
