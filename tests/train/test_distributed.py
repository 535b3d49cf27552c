"""Two processes on the CPU with gloo do what one does with the whole batch."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import test_tasks
import tiny
import torch

import foreword as fw
import zoo

SCRIPTS = Path(__file__).parent / "scripts"
CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate"


def torchrun(script, *arguments, config=None):
    """Two processes, by torchrun or by accelerate with one of the examples' configurations (which are for GPUs)."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = ["torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    if config is not None:
        here = ["--num_machines", "1", "--num_processes", "2", "--mixed_precision", "no"]
        where = ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
        command = ["accelerate.commands.launch", "--config_file", str(CONFIGS / config), *here, *where]
    done = subprocess.run(
        [sys.executable, "-m", *command, str(SCRIPTS / script), *map(str, arguments)],
        env=tiny.ENVIRONMENT,
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_ddp_averages_to_the_gradients_of_the_whole_batch(tmp_path):
    torchrun("ddp_gradients.py", tmp_path, "direct", "mlp", "low-rank")
    ids = zoo.ids(8, 7)
    for reparam in ("direct", "mlp", "low-rank"):
        model, tuning = tiny.tuned(reparam=reparam, hidden=16, gate="head")
        model.train()(input_ids=ids, labels=ids).loss.backward()
        found = [torch.load(tmp_path / f"{reparam}-{rank}.pt", weights_only=True) for rank in (0, 1)]
        assert found[0].keys() == found[1].keys() == dict(tuning.named_parameters()).keys()
        for name, parameter in tuning.named_parameters():
            for of_rank in found:
                torch.testing.assert_close(of_rank[name], parameter.grad, atol=1e-6, rtol=1e-4)
        assert max(p.grad.abs().max() for p in tuning.parameters()) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("config", [None, "ddp.yaml"])
def test_two_processes_train_the_prefix_of_one_with_the_doubled_batch(config, tmp_path):
    out = tmp_path / "run"
    torchrun("ddp_trainer.py", out, tmp_path, config=config)
    ranks = [json.loads((tmp_path / f"rank-{i}.json").read_text()) for i in (0, 1)]
    assert [r["world"] for r in ranks] == [2, 2]
    model, tuning = tiny.tuned(gate="head")
    one = tiny.trainer(model, tmp_path / "one", per_device_train_batch_size=8)
    start = tuning.bake()
    one.train()
    want, twice = tuning.bake(), [fw.Prefix.load(tmp_path / f"prefix-{i}") for i in (0, 1)]
    assert twice[0] == twice[1]
    for site in want.keys:
        for mine, theirs in ((want.keys, twice[0].keys), (want.values, twice[0].values), (want.bias, twice[0].bias)):
            torch.testing.assert_close(theirs[site], mine[site], atol=1e-5, rtol=1e-4)
        assert not torch.allclose(want.keys[site], start.keys[site], atol=1e-3)
    assert list(ranks[0]["losses"].values()) == pytest.approx(list(tiny.losses(one).values()), abs=1e-4)
    ours = {"prefix.safetensors", "foreword.json", "training_state.safetensors", "training_args.json", "optimizer.pt"}
    names = [{Path(p).name.lstrip(".") for p in r["written"]} for r in ranks]
    assert names[0] & {"foreword.json", "training_args.json", "trainer_state.json"} and not names[1] & ours
    assert names[1] <= {"rng_state_1.pth"}, names[1]
    assert fw.Prefix.load(out / "checkpoint-6").keys.keys() == want.keys.keys()


@pytest.mark.slow
@pytest.mark.parametrize("case", ["one by one", "accumulate", "roll back"])
def test_numbers_that_are_not_finite_in_one_process_are_met_by_all(case, tmp_path):
    """Only process 1 has the bad row: both stop at its step with the same words, or both go back. None waits."""
    out = tmp_path / "run"
    torchrun("ddp_diverge.py", out, tmp_path, case)
    first, second = (json.loads((tmp_path / f"rank-{i}.json").read_text()) for i in (0, 1))
    assert first == second
    prefixes = [fw.Prefix.load(tmp_path / f"prefix-{i}") for i in (0, 1)]
    assert prefixes[0] == prefixes[1]
    if case == "roll back":
        assert first["ended"] == "well" and first["step"] == tiny.STEPS
        (event,) = first["events"]
        assert event["step"] == 4 and event["because"] == "the loss is nan in process 1"
        assert all(torch.isfinite(t).all() for t in prefixes[0].keys.values())
        return
    step = 3 if case == "accumulate" else 5
    start = f"training diverged at step {step}: the loss is nan in process 1 on the batch of shape (4, "
    assert first["ended"].startswith(start) and first["step"] == step - 1 and not first["events"]
    assert f"The last good prefix is in {out / 'last-good'}." in first["ended"]
    assert fw.Prefix.load(out / "last-good") == prefixes[0] != tiny.tuned()[1].bake()


@pytest.mark.slow
def test_ctrl_c_in_one_process_stops_all_at_the_same_step(tmp_path):
    torchrun("ddp_diverge.py", tmp_path / "run", tmp_path, "ctrl-c")
    first, second = (json.loads((tmp_path / f"rank-{i}.json").read_text()) for i in (0, 1))
    assert first == second == {"ended": "well", "step": 3, "events": [], "asked": True}


@pytest.mark.slow
def test_two_processes_train_the_tasks_of_one_with_the_doubled_batch_and_resume(tmp_path):
    """Each takes its part of the mixture's order, also when they resume in a later epoch."""
    out = tmp_path / "run"
    model, tuning = test_tasks.tuned(common=1)
    seen = test_tasks.Seen(model)
    options = {"per_device_train_batch_size": 4, "max_steps": 7, "orthogonality": 1.0, "save_strategy": "no"}
    data, valid = test_tasks.mixture(), test_tasks.mixture((3, 4, 2))
    one = tiny.trainer(model, tmp_path / "one", data, valid=valid, eval_strategy="steps", eval_steps=7, **options)
    one.train()
    for checkpoint, steps in ((None, 7), (out / "checkpoint-5", 2)):  # 4 steps an epoch
        torchrun("ddp_tasks.py", out, tmp_path, *([checkpoint] if checkpoint else []))
        ranks = [json.loads((tmp_path / f"rank-{i}.json").read_text()) for i in (0, 1)]
        assert [r["world"] for r in ranks] == [2, 2] and [len(r["rows"]) for r in ranks] == [steps, steps]
        both = [[tuple(row) for r in ranks for row in r["rows"][step]] for step in range(steps)]
        assert both == [list(batch) for batch in seen.rows[-steps:]]
        assert list(ranks[0]["losses"].values()) == pytest.approx(list(tiny.losses(one).values()), abs=1e-4)
        last, alone = ranks[0]["last"], {k: v for e in one.state.log_history for k, v in e.items()}
        assert ranks[1]["last"] == last and last["orthogonality"] == pytest.approx(alone["orthogonality"], rel=1e-3)
        means = [last[f"eval_{task}_loss"] for task in test_tasks.TASKS]  # of batches, which are others here
        assert last["eval_loss"] == pytest.approx(sum(means) / 3)
        assert last["eval_loss"] == pytest.approx(alone["eval_loss"], rel=0.1)
        for task in test_tasks.TASKS:
            want = tuning.bake(task=task)
            twice = [fw.Prefix.load(tmp_path / f"prefixes-{i}" / task) for i in (0, 1)]
            assert twice[0] == twice[1]
            for site in want.keys:
                torch.testing.assert_close(twice[0].keys[site], want.keys[site], atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(twice[0].values[site], want.values[site], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_two_processes_share_the_teacher_and_distil_the_prefix_of_one(tmp_path, monkeypatch):
    import test_distill

    from foreword.train import _teacher

    torchrun("ddp_distill.py", tmp_path / "two", tmp_path)
    ranks = [json.loads((tmp_path / f"rank-{i}.json").read_text()) for i in (0, 1)]
    names = [f"{n:06}.safetensors" for n in range(5)]
    assert [r["written"] for r in ranks] == [[*names[0::2], names[0]], [*names[1::2], names[1]]]  # train, valid
    monkeypatch.setattr(_teacher, "SHARD", 4)
    one = test_distill.run(
        zoo.build("llama"), tmp_path / "one", data=test_distill.examples(18), valid=test_distill.examples(5),
        arguments={"per_device_train_batch_size": 6},
    )  # fmt: skip
    twice = [fw.Prefix.load(tmp_path / f"prefix-{i}") for i in (0, 1)]
    assert twice[0] == twice[1] == fw.Prefix.load(tmp_path / "two")
    assert ranks[0]["losses"] == pytest.approx(test_distill.losses(one), abs=1e-4)
    for site in one.prefix.keys:
        torch.testing.assert_close(twice[0].values[site], one.prefix.values[site], atol=1e-4, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("config", [None, "fsdp2.yaml"])
def test_a_base_sharded_by_fsdp2_trains_the_prefix_of_one_process(config, tmp_path):
    pytest.importorskip("transformers.distributed", reason="this transformers does not shard while loading")
    folder, out = tmp_path / "model", tmp_path / "run"
    zoo.build("llama").save_pretrained(folder)
    torchrun("fsdp_trainer.py", folder, out, tmp_path, config=config)
    ranks = [json.loads((tmp_path / f"rank-{i}.json").read_text()) for i in (0, 1)]
    model, tuning = tiny.tuned(gate="head", seed=0)
    one = tiny.trainer(model, tmp_path / "one", per_device_train_batch_size=8)
    start = tuning.bake()
    one.train()
    want, twice = tuning.bake(), [fw.Prefix.load(tmp_path / f"prefix-{i}") for i in (0, 1)]
    whole = sum(p.numel() for p in model.parameters()) - tuning.num_parameters
    for rank in ranks:
        assert rank["world"] == 2 and rank["plain"] and rank["sharded"] >= 20 and rank["known"] == 8
        assert "sharded by FSDP2" in rank["prompt"]
        assert rank["local"] < 0.51 * whole and rank["graded after detaching"] >= 20
        assert rank["graded"] and all(n.startswith("foreword.") for n in rank["graded"])
    assert list(ranks[0]["losses"].values()) == pytest.approx(list(tiny.losses(one).values()), abs=1e-4)
    saved = fw.Prefix.load(out / "checkpoint-6")
    for site in want.keys:
        for theirs in (*twice, saved):
            torch.testing.assert_close(theirs.keys[site], want.keys[site], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(theirs.bias[site], want.bias[site], atol=1e-5, rtol=1e-4)
        assert not torch.allclose(want.keys[site], start.keys[site], atol=1e-3)
    assert not list((out / "checkpoint-6").glob("model*")) and not list((out / "checkpoint-6").glob("*pytorch_model*"))
    # Made on a sharded base, it knows the base that it fits, and another that it does not.
    fw.attach(zoo.build("llama"), saved).detach()
    with pytest.raises(fw.MismatchError):
        fw.attach(zoo.build("llama", seed=1), saved)


def test_accelerate_reads_the_example_configurations():
    """DeepSpeed isn't run here: its files are what accelerate takes, and the prefix's parameters are left whole."""
    from accelerate.commands.config import config_args

    kinds = {}
    for path in CONFIGS.glob("*.yaml"):
        found = config_args.load_config_from_file(str(path))
        kinds[path.stem] = str(found.distributed_type.value)
        assert found.num_processes % found.num_machines == 0
    assert kinds == {"ddp": "MULTI_GPU", "fsdp2": "MULTI_GPU", "deepspeed_zero3": "DEEPSPEED"}
    named = config_args.load_config_from_file(str(CONFIGS / "deepspeed_zero3.yaml")).deepspeed_config
    settings = json.loads((CONFIGS.parents[1] / named["deepspeed_config_file"]).read_text())["zero_optimization"]
    assert settings["stage"] == 3
    whole = settings["stage3_param_persistence_threshold"]
    assert whole > 200 * 8 * 128  # 200 virtual tokens of Llama-2-70B: its largest parameter
