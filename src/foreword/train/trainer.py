"""PrefixTrainer: a ``transformers.Trainer`` whose checkpoints are prefixes.

Everything that Trainer does stays: schedules, accumulation, mixed precision, DDP through accelerate, callbacks. What
differs: only the prefix is saved (a few MB, with what is needed to resume exactly), and a loss or gradient that
leaves the finite stops the run with the last good prefix saved.
"""

from __future__ import annotations

import warnings
from collections import deque
from inspect import signature
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, Trainer, TrainingArguments, set_seed

from foreword._boundary import told
from foreword._offloaded import is_offloaded
from foreword._under_way import BOUNDARY
from foreword.data.encoded import form_of
from foreword.data.mixture import TaskMixture
from foreword.errors import ConfigError, PrefixFileError
from foreword.orthogonal import penalty
from foreword.quantized import adapters_are_on
from foreword.train import tasks
from foreword.train._generating import Generating
from foreword.train._watched import LAST_GOOD, Watched
from foreword.train.arguments import PrefixTrainingArguments
from foreword.train.checkpoints import (
    STATE,
    WATCH,
    last_checkpoint,
    load_training_state,
    require_whole,
    resume_point,
)
from foreword.train.checks import NO_FSDP, NO_PUSH, check_arguments, default_collator, one_device, trainable_tuning
from foreword.train.curves import draw_curves
from foreword.train.optimizing import check_own_optimizer, divide, rates_by_group, settle_learning_rate
from foreword.train.rollback import EVENT as ROLLED_BACK
from foreword.train.rollback import RollBack
from foreword.train.stages import LayerByLayer
from foreword.train.watch import risen_loss

__all__ = ["LAST_GOOD", "STATE", "WATCH", "PrefixTrainer", "last_checkpoint", "load_training_state"]

_GIVEN = ("condition", "task", BOUNDARY)


class PrefixTrainer(Watched, Generating, Trainer):
    """Trains the prefix that is attached to a model.

    Args:
        model: a model with a trainable prefix on it (``fw.attach(model, fw.PrefixConfig(...))``).
        args: :class:`PrefixTrainingArguments`, or plain ``TrainingArguments``.
        kwargs: as for ``transformers.Trainer``; data sets may be a ``TaskMixture``. Without a ``data_collator``,
            encoded data are padded by foreword's. ``model_init`` returns a model with a prefix on it.

    Raises:
        AttachError: no trainable prefix is attached, the model is wrapped (``torch.compile``, ``DataParallel``), or was
            offloaded after it was attached.
        ConfigError: an argument that can't be followed, with the reason (``push_to_hub``, ``fsdp``, …); accelerate was
            asked to shard the model, or an offloaded one is to be trained in several processes;
            the tasks of prefix and data differ, or a penalty between tasks has no two of them.
    """

    def __init__(
        self, model: PreTrainedModel | None = None, args: TrainingArguments | None = None, **kwargs: Any
    ) -> None:
        given = dict(kwargs)
        args = args if args is not None else PrefixTrainingArguments(output_dir="runs/prefix")
        if (make := given.pop("model_init", None)) is not None:
            model = _from_init(model, make, args, given)
        self.tuning = tuning = trainable_tuning(model, "what model_init returned" if make is not None else "")
        model = tuning.model
        tuning.metadata |= form_of(given.get("train_dataset"))
        check_arguments(args, model)
        given = tasks.prepared(tuning, args, given)
        self._asked_rate = args.learning_rate
        own = given.get("optimizer_cls_and_kwargs") or (given.get("optimizers") or (None,))[0]
        settle_learning_rate(args, tuning, own=own is not None)
        if given.get("data_collator") is None:
            sets = (given.get("train_dataset"), given.get("eval_dataset"))
            given["data_collator"] = default_collator(model, given.get("processing_class"), sets)
        if one_device(args):
            warnings.warn(
                "PrefixTrainer uses one GPU in one process; launch the script with torchrun or accelerate to use all",
                stacklevel=2,
            )
        self._overlaps: deque[Tensor] = deque(maxlen=1000)  # of tasks, since the last line of the log
        self._begin_watch(args)
        with adapters_are_on(model):
            super().__init__(model, args, **given)
        self.model_init = make
        self._settle_generation()
        if self.optimizer is not None:
            check_own_optimizer(self.optimizer, tuning)
        if self.is_fsdp_enabled:
            raise ConfigError(NO_FSDP)
        if is_offloaded(model):
            if self.args.world_size > 1:
                raise ConfigError(
                    "weights that are kept elsewhere (offloaded) can't be brought in by several processes at once; "
                    "train in one process, or shard the base with FSDP2 (docs/distributed.md)"
                )
            self.accelerator.device_placement = False  # its hooks place it

    def call_model_init(self, trial: Any = None) -> Any:
        """The model that ``model_init`` makes, with what is attached to it."""
        model = super().call_model_init(trial)
        self.tuning = trainable_tuning(model, "what model_init returned")
        self.tuning.metadata |= form_of(self.train_dataset)
        self.args.learning_rate = self._asked_rate
        settle_learning_rate(self.args, self.tuning, own=True)
        return model

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Not where hooks bring the weights in: they know the device."""
        if not is_offloaded(model):
            super()._move_model_to_device(model, device)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's, with one group of parameters for each method that is trained, at its learning rate."""
        if self.optimizer is None:
            rate = (self.optimizer_cls_and_kwargs or ((), {}))[1].get("lr", self.args.learning_rate)
            divide(super().create_optimizer(*args, **kwargs), self.tuning.parameter_groups(rate))
        return self.optimizer

    def _set_signature_columns_if_needed(self) -> None:
        """Keep what a prefix is given row by row, which the model's own signature doesn't name."""
        super()._set_signature_columns_if_needed()
        columns = cast(list[str], self._signature_columns)
        columns += [name for name in _GIVEN if name not in columns]

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule of the stages where there are any (``LayerByLayer``), else the arguments'."""
        optimizer = optimizer or self.optimizer
        if (stages := self._callback(LayerByLayer)) is not None:
            stages.check_schedule(self.args, self.lr_scheduler)
            factor = stages.learning_rate_factor(float(optimizer.param_groups[0]["lr"]))
            self.lr_scheduler = LambdaLR(cast(Optimizer, optimizer), factor)
            self._created_lr_scheduler = True
            return self.lr_scheduler
        with rates_by_group(self.args, optimizer):
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
        with told(labels=inputs.get("labels")):  # Trainer keeps them from the model where it computes the loss itself
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

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: what is uploaded is a prefix with its own card.

        Raises:
            ConfigError: always, with what to call instead.
        """
        raise ConfigError(NO_PUSH)

    def _record(self) -> dict[str, Any]:
        """What the prefix's file says of its training."""
        record: dict[str, Any] = {"steps": self.state.global_step, "learning_rate": self._rate}
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
            seen = self._watch.tensors()
            if (recovery := self._callback(RollBack)) is not None:
                seen |= recovery.tensors()
            save_file({k: t.cpu().contiguous() for k, t in seen.items()}, Path(output_dir) / WATCH)

    def _save_rng_state(self, output_dir: str) -> None:
        """Each process its own; ``trainer_state.json``, which says that a checkpoint is whole, comes after all."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and (path := Path(checkpoint) / WATCH).is_file():
            seen = load_file(path)
            self._watch.load(seen)
            if (recovery := self._callback(RollBack)) is not None:
                recovery.load(seen)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """The scale of fp16's loss, where there is still one: a run may go on in bf16 or in 32 bits."""
        if self.accelerator.scaler is not None:
            super()._load_scaler(checkpoint)

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
        if risen := risen_loss(self.state.log_history):
            warnings.warn(f"{risen}; try a third of the learning rate (it was {self._rate:g})", stacklevel=2)
        if self.args.should_save and self.state.log_history:
            folder = Path(self.args.output_dir or ".")
            draw_curves({folder.name: self.state.log_history}, folder / "curve.png")
        return result


def _from_init(model: Any, make: Any, args: TrainingArguments, given: dict[str, Any]) -> Any:
    """The first model of a ``model_init``; each training run makes another.

    Raises:
        ConfigError: a model is given as well, or an optimizer, which would train this model's prefix for ever.
    """
    if model is not None:
        raise ConfigError("PrefixTrainer was given a model and model_init; give it one of them")
    if any(part is not None for part in given.get("optimizers") or ()):
        raise ConfigError(
            "model_init makes a new model with each train(), and the optimizer that was given holds the parameters of "
            "another; leave it out, or give optimizer_cls_and_kwargs=(class, {...})"
        )
    set_seed(args.seed)
    return make() if not signature(make).parameters else make(None)
