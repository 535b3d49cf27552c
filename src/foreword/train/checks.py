"""What PrefixTrainer refuses before a run begins, with what to do instead; and the batches that it makes by itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.utils.data import ConcatDataset, Subset
from transformers import TrainingArguments

from foreword._wrapped import unwrapped
from foreword.data import Collator, EncodedDataset, TaskMixture
from foreword.errors import AttachError, ConfigError
from foreword.tuning import Tuning, tuning_of

NO_FSDP = (
    "accelerate's FSDP would shard the prefix with the base model, and its checkpoints hold the base; load "
    "the base sharded instead and launch as for DDP: from_pretrained(..., distributed_config="
    "DistributedConfig(fsdp_size=N)), with save_only_model=True in the arguments (docs/distributed.md)"
)
NO_PUSH = (
    "Trainer would upload checkpoints with the card of a whole model; upload the prefix when it is trained: "
    "tuning.bake().push_to_hub('OWNER/NAME'), `foreword push`"
)


def trainable_tuning(model: Any, made: str = "") -> Tuning:
    """What is attached to a model and can be trained.

    Args:
        made: where the model is from, for the message.

    Raises:
        AttachError: nothing, or the model was offloaded after attaching.
        ConfigError: this is no model, or one in a wrapper.
    """
    tuning = tuning_of(unwrapped(model))
    if tuning is None or not tuning.trainable:
        raise AttachError(
            f"PrefixTrainer trains a prefix, and {made or 'this model'} has no trainable one; attach one first: "
            "fw.attach(model, fw.PrefixConfig(length=20), tokenizer=tokenizer), or go on with a saved one: "
            "fw.attach(model, prefix, trainable=True)"
        )
    if any(p.is_meta for p in tuning.parameters()):
        raise AttachError(
            "the prefix has no numbers of its own: the model was offloaded with the prefix on it; detach, offload "
            "the model, and attach then"
        )
    return tuning


def check_arguments(args: TrainingArguments, model: Any) -> None:
    """Refuse the arguments that Trainer would follow, and that would be wrong for a prefix.

    Raises:
        ConfigError: such an argument.
    """
    if args.push_to_hub:
        raise ConfigError(f"push_to_hub=True is not for PrefixTrainer: {NO_PUSH}")
    if args.fsdp:
        raise ConfigError(NO_FSDP)
    parallel = getattr(args, "parallelism_config", None)
    for what in ("cp", "sp"):
        if getattr(parallel, f"{what}_enabled", False):
            raise ConfigError(
                f"parallelism_config divides each sequence among processes ({what}), and each part would have the "
                "prefix before it; train with data parallelism (torchrun, accelerate launch), or shard the base with "
                "FSDP2 (docs/distributed.md)"
            )
    if getattr(args, "predict_with_generate", False) and not model.config.is_encoder_decoder:
        raise ConfigError(
            f"predict_with_generate=True continues input_ids, and those of {type(model).__name__} hold the answer "
            "already; it is for encoder-decoder models. Score what the prefix writes with `foreword eval` "
            "(foreword.evaluate)"
        )


def default_collator(model: Any, processing_class: Any, data: Iterable[Any]) -> Collator | None:
    """Batches for data that foreword encoded; None for other data, which Trainer's own way suits.

    The padding token is that of ``processing_class`` (the end token where it has none), else the model's.

    Raises:
        ConfigError: neither has one.
    """
    if not any(_encoded(d) for d in data):
        return None
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    config = model.config.get_text_config()
    named = [getattr(of, name, None) for of in (tokenizer, config, model.config)
             for name in ("pad_token_id", "eos_token_id")]  # fmt: skip
    pad = next((i for i in (p[0] if isinstance(p, list) and p else p for p in named) if isinstance(i, int)), None)
    if pad is None or pad < 0:
        raise ConfigError(
            "batches are padded, and neither processing_class nor the model's configuration has a padding or an end "
            "token; give PrefixTrainer data_collator=foreword.data.Collator(pad_token_id)"
        )
    return Collator(pad, seq2seq=model.config.is_encoder_decoder)


def _encoded(data: Any) -> bool:
    if isinstance(data, dict):
        return any(map(_encoded, data.values()))
    if isinstance(data, Subset):
        return _encoded(data.dataset)
    if isinstance(data, ConcatDataset):
        return any(map(_encoded, data.datasets))
    return isinstance(data, EncodedDataset | TaskMixture)


def one_device(args: TrainingArguments) -> bool:
    """Have a run in one process use one GPU, as ``nn.DataParallel`` would copy a model without what is attached.

    Returns whether there are more, which stay idle.
    """
    if args.n_gpu <= 1:
        return False
    args._n_gpu = 1
    return True
