"""What all tests share: no network, one thread, hypothesis without deadlines."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Also of what the tests start: as many busy threads as processors, in two processes at once, are many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what runs in the background deaf to Ctrl-C, and what the tests start would be deaf as well.
    signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile(
    "foreword",
    deadline=None,
    derandomize=bool(os.environ.get("CI")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("foreword")


# What starts processes, a browser or long searches, which --quick leaves to `make test`.
LONG = ("compare", "compression", "test_onnx", "test_playground", "test_tune", "test_budget")


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="each test once, on its first model, and none that is slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--quick"):
        return
    seen, kept, left = set(), [], []
    for item in items:
        test = (item.path, getattr(item, "cls", None), getattr(item, "originalname", item.name))
        long = test in seen or item.get_closest_marker("slow") or item.get_closest_marker("real")
        long = long or any(part.startswith(LONG) for part in item.path.relative_to(config.rootpath).parts)
        (left if long else kept).append(item)
        seen |= set() if long else {test}
    config.hook.pytest_deselected(items=left)
    items[:] = kept


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def tokenizer():
    import zoo

    return zoo.tokenizer()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A model hub on this machine, which huggingface_hub then talks to."""
    import huggingface_hub
    from huggingface_hub import constants

    import hubs

    with hubs.running() as (held, address):
        for name, value in {
            "ENDPOINT": address, "HUGGINGFACE_CO_URL_TEMPLATE": address + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "none"), "HF_STORED_TOKENS_PATH": str(tmp_path / "none"),
        }.items():  # fmt: skip
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", hubs.TOKEN)
        huggingface_hub.close_session()
        yield held
    huggingface_hub.close_session()
