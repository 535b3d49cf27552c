"""vLLM's engine in this process."""

from __future__ import annotations

import gc
import json
import os

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

from contextlib import contextmanager

PLACE = 0  # <pad>


def options(shelf, **more):
    return {"prefixes": str(shelf), "placeholder": PLACE, "placeholder_text": "<pad>", **more}


@contextmanager
def engine(folder, shelf, *, by_module=False, events=None, blocks=64, extra=None, **more):
    """``vllm.LLM`` with the connector, small. ``by_module``: by its module's path, not as a plugin."""
    from vllm import LLM
    from vllm.config import KVTransferConfig
    from vllm.distributed import cleanup_dist_env_and_memory

    more = {"max_model_len": 256, "block_size": 32, "max_num_seqs": 16, **more}
    transfer = KVTransferConfig(
        kv_connector="ForewordConnector", kv_role="kv_consumer",
        kv_connector_extra_config=options(shelf, events=str(events or ""), **(extra or {})),
        **({"kv_connector_module_path": "foreword.serve.vllm.connector"} if by_module else {}),
    )  # fmt: skip
    made = LLM(
        model=str(folder), dtype="float32", enforce_eager=True, kv_transfer_config=transfer, seed=0,
        num_gpu_blocks_override=blocks, disable_log_stats=True, **more,
    )  # fmt: skip
    try:
        yield made
    finally:
        del made
        gc.collect()
        cleanup_dist_env_and_memory()


def greedy(made, prompts, tokens, **more):
    """Token ids of the answers, ends ignored."""
    from vllm import SamplingParams

    wanted = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, **more)
    return [list(o.outputs[0].token_ids) for o in made.generate(prompts, wanted, use_tqdm=False)]


def lines(events):
    """Of the connector's file of events."""
    return [json.loads(line) for line in events.read_text().splitlines()] if events.exists() else []
