"""Prefixes on unmodified vLLM: a KV connector that brings them in, and a middleware that gives them names.

A request of a task has placeholder tokens where its prefix stands, and a cache salt that names the prefix by its
content. The connector writes the prefix's keys and values into the blocks of those tokens; vLLM does all the rest, and
shares the blocks between the requests of a task as it shares any cached beginning.

Only ``connector.py`` imports vLLM. Nothing here is imported before it is needed: vLLM calls :func:`register` in each
of its processes, also where no prefix is served.
"""

from __future__ import annotations

CONNECTOR = "ForewordConnector"
CONNECTOR_MODULE = "foreword.serve.vllm.connector"
MIDDLEWARE = "foreword.serve.vllm.middleware.TaskModels"


def register() -> None:
    """Make the connector known to vLLM by its name. vLLM's plugin entry point; may be called several times."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR, CONNECTOR_MODULE, CONNECTOR)
