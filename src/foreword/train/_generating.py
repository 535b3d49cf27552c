"""The part of PrefixTrainer that evaluates: by writing (``predict_with_generate``), or in half precision."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from torch import nn
from transformers import GenerationConfig, Seq2SeqTrainer, Trainer

from foreword._under_way import BOUNDARY
from foreword.tuning import Tuning

_GIVEN = ("condition", "task")


class Generating(Trainer):
    """A Trainer that evaluates as ``Seq2SeqTrainer`` does where the arguments ask for it.

    ``generation_max_length``, ``generation_num_beams`` and ``generation_config`` of the arguments are followed too.
    """

    tuning: Tuning
    _gen_kwargs: dict[str, Any]
    _pad_tensors_to_max_len = Seq2SeqTrainer._pad_tensors_to_max_len

    @property
    def _generates(self) -> bool:
        return bool(getattr(self.args, "predict_with_generate", False))

    def _settle_generation(self) -> None:
        """What the arguments say of writing."""
        if not self._generates:
            return
        args: Any = self.args
        wanted = {"max_length": args.generation_max_length, "num_beams": args.generation_num_beams}
        self._gen_kwargs = {name: value for name, value in wanted.items() if value is not None}
        self.gather_function = self.accelerator.gather
        if args.generation_config is not None:
            config: GenerationConfig = Seq2SeqTrainer.load_generation_config(args.generation_config)
            self.tuning.model.generation_config = config

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's; ``bf16_full_eval`` and ``fp16_full_eval`` round the base, and what was trained stays as it is."""
        rounded = (self.args.bf16_full_eval or self.args.fp16_full_eval) and not self.is_in_train
        trained = [(p, p.detach().clone()) for p in self.tuning.parameters()] if rounded else []
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            for parameter, number in trained:
                parameter.data = number.to(parameter.device)
            if trained:
                self.tuning._passes.forget()

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None, **options: Any
    ) -> Any:
        if not self._generates or prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        given = {name: inputs[name] for name in _GIVEN if name in inputs}
        dropped = {*given, BOUNDARY}  # generate begins where the prompt ends
        with self.tuning.given(**self._prepare_inputs(given)) if given else nullcontext():  # not generate's arguments
            return Seq2SeqTrainer.prediction_step(
                self,  # type: ignore[arg-type]
                model,
                {name: value for name, value in inputs.items() if name not in dropped},
                prediction_loss_only,
                ignore_keys,
                **options,
            )
