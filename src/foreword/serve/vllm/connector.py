"""The KV connector: vLLM's calls, handed on to the planner (scheduler) and the store (workers).

Blocks are written through the attention backend's own ``do_kv_cache_update`` and never by indexing the cache, whose
layout inside a block is the backend's. Found by running and tested with vLLM 0.32.0.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.logger import init_logger

from foreword.errors import ForewordError
from foreword.serve.shelf import Shelf
from foreword.serve.vllm.engine import check_config, check_layers, options_of, shape_of
from foreword.serve.vllm.plan import Load, Planner
from foreword.serve.vllm.rows import Rows, heads_of, layer_number
from foreword.serve.vllm.store import Store

logger = init_logger("vllm.foreword")


@dataclass
class Loads(KVConnectorMetadata):
    """What the scheduler tells the workers about a step."""

    loads: list[Load] = field(default_factory=list)


class ForewordConnector(KVConnectorBase_V1):
    """Prefixes come from a folder into the blocks of the requests that name them."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        check_config(vllm_config)
        groups = kv_cache_config.kv_cache_groups if kv_cache_config is not None else []
        check_layers(len(groups), {}, vllm_config.model_config.max_model_len)
        self._options = options_of(vllm_config)
        self._events = Path(self._options.events) if self._options.events else None
        # Read late: the platform may change it after this.
        self._planner = Planner(self._options.placeholder, lambda: vllm_config.cache_config.block_size)
        self._layers: dict[str, tuple[int, Any]] = {}
        self._store: Store | None = None
        self._failed: set[int] = set()
        self._over: list[tuple[Rows, Load, torch.Tensor]] = []

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        return bool(extra_config.get("prompt_logprobs", False))

    @property
    def requires_kv_delivery(self) -> bool:
        return False

    # ------------------------------------------------------------------ the scheduler's process

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._planner.matched(request, num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        ids = blocks.get_block_ids()[0]
        self._planner.allocated(request, ids, num_external_tokens)
        self._note("allocated", request=request.request_id, salt=request.cache_salt, blocks=list(ids),
                   external=num_external_tokens, preempted=request.num_preemptions)  # fmt: skip

    def build_connector_meta(self, scheduler_output: Any) -> Loads:
        cached = scheduler_output.scheduled_cached_reqs
        computed = {r.req_id: r.num_computed_tokens for r in scheduler_output.scheduled_new_reqs}
        computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        assert self._kv_cache_manager is not None
        manager = self._kv_cache_manager
        scheduled = scheduler_output.num_scheduled_tokens
        return Loads(self._planner.planned(scheduled, computed, lambda r: manager.get_block_ids(r)[0]))

    def request_finished(self, request: Any, block_ids: Sequence[int]) -> tuple[bool, dict[str, Any] | None]:
        self._planner.finished(request.request_id)
        return False, None

    # ------------------------------------------------------------------ the workers' processes

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        found = self._vllm_config.compilation_config.static_forward_context
        self._layers = {name: (layer_number(name), found[name]) for name in kv_caches}
        windows = {n: getattr(layer, "sliding_window", None) for n, (_, layer) in self._layers.items()}
        check_layers(1, windows, self._vllm_config.model_config.max_model_len)
        config = self._vllm_config
        ranks, rank = config.parallel_config.tensor_parallel_size, get_tensor_model_parallel_rank()
        heads = heads_of(shape_of(config).kv_heads, rank, ranks)
        numbers = [number for number, _ in self._layers.values()]
        dtype = config.model_config.dtype
        self._store = Store(Shelf(self._options.prefixes), lambda rows: rows.part(numbers, heads, dtype),
                            self._options.prefix_bytes)  # fmt: skip
        self._note("ready", layers=len(numbers), rank=rank, ranks=ranks)

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        """Before a step. (``start_load_kv`` may come after it, where the scheduler saw nothing to load.)"""
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, Loads)
        found = self._found(connector_metadata.loads, over=True)
        self._over = [(rows, load, self._slots(load)) for load, rows in found]

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        orders = self._get_connector_metadata()
        assert isinstance(orders, Loads)
        for load, rows in self._found(orders.loads, over=False):
            slots = self._slots(load)
            for name in self._layers:
                self._write(name, rows, load, slots)

    def _found(self, loads: Sequence[Load], *, over: bool) -> Iterator[tuple[Load, Rows]]:
        """Those whose prefix is there; the others' blocks are reported as failed."""
        for load in loads:
            if load.over != over:
                continue
            rows = self._rows(load)
            if rows is None:
                self._failed.update(load.blocks)
                self._note("failed", request=load.request_id, blocks=load.blocks)
                continue
            self._note("over" if over else "loaded", request=load.request_id, salt=str(load.salt), start=load.start,
                       stop=load.stop, blocks=load.blocks)  # fmt: skip
            yield load, rows

    def _slots(self, load: Load) -> torch.Tensor:
        device = next(iter(self._layers.values()))[1].kv_cache.device
        return torch.tensor(load.slots, dtype=torch.int64, device=device)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Inside a layer's attention, after this step's keys and values were written and before they are read."""
        for rows, load, slots in self._over:
            self._write(layer_name, rows, load, slots)

    def get_block_ids_with_load_errors(self) -> set[int]:
        failed, self._failed = self._failed, set()
        return failed

    def save_kv_layer(self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        return

    def wait_for_save(self) -> None:
        return

    def _rows(self, load: Load) -> Rows | None:
        """Of a load's prefix; None, and a line in the log, where it can't be had."""
        if load.salt is None:
            logger.error("request %s: no salt of foreword's, no placeholders, or no text after them", load.request_id)
            return None
        assert self._store is not None
        try:
            return self._store.get(load.salt)
        except (ForewordError, OSError) as exc:
            logger.error("request %s: %s", load.request_id, exc)
            return None

    def _write(self, name: str, rows: Rows, load: Load, slots: torch.Tensor) -> None:
        number, layer = self._layers[name]
        keys, values = (
            group[number][load.start : load.stop].to(layer.kv_cache.device, non_blocking=True)
            for group in (rows.keys, rows.values)
        )
        layer.impl.do_kv_cache_update(layer, keys, values, layer.kv_cache, slots)

    def _note(self, event: str, **fields: Any) -> None:
        if self._events is not None:
            with self._events.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"time": time.time(), "event": event, **fields}) + "\n")
