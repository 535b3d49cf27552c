"""A library with a thousand tasks against one with ten: bytes, loading, finding, switching; and its tiers.

``many``   all on the device: bytes against their exact sum, seconds to load, to find and to switch to a task, as ratios
           to ten tasks in the same run.
``tiers``  the same tasks within a budget that has room for a part of them on the device and in CPU memory, the rest in
           mapped files: bytes of each tier, what a switch costs by where the task is, and that answers are the same
           to the bit when it has gone and come back.

    python benchmarks/library.py [--tasks 1000] [--length 20] [--rounds 7] [--no-keep]
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from _measure import hold_memory, keep, plainly, take_turns
from serving import random_prefix

FEW = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--length", type=int, default=20, help="virtual tokens of a task")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--switches", type=int, default=2000, help="in a round")
    parser.add_argument("--no-keep", action="store_true", help="print only")
    options = parser.parse_args()
    hold_memory()
    import foreword as fw

    model, _ = fw.load_model(options.model)
    with tempfile.TemporaryDirectory() as folder:
        made = random_prefix(model, fw.sites(model), options.length)
        path = made.save(Path(folder) / "task")
        record = {"many": many(model, path, options), "tiers": tiers(model, path, options)}
    for name, own in record.items():
        for key, value in own.items():
            print(f"{name}: {key}: {value:.4g}" if isinstance(value, float) else f"{name}: {key}: {value}", flush=True)
    if not options.no_keep:
        print("written:", keep("library", {"options": vars(options), **record}))


@contextmanager
def loaded(model, path, tasks, budget=None):
    """A library with so many tasks, each read from its file, and the seconds of each."""
    import foreword as fw

    held, seconds = fw.Library(model, budget=budget), []
    try:
        for number in range(tasks):
            began = time.perf_counter()
            held.add(f"task{number:04d}", fw.Prefix.load(path))
            seconds.append(time.perf_counter() - began)
        yield held, seconds
    finally:
        held.detach()
        gc.collect()


def switching(held, names, count):
    """Enter and leave a block for each of many names, in an order of chance."""
    chosen = random.Random(0).choices(names, k=count)

    def run():
        for name in chosen:
            with held.use(name):
                pass

    return run


def many(model, path, options):
    """A thousand tasks on the device."""
    count, found = options.switches, {}
    seconds, times = {}, {}
    for tasks in (FEW, options.tasks, FEW, options.tasks):  # a model carries one library at a time: they take turns
        with loaded(model, path, tasks) as (held, each):
            seconds.setdefault(tasks, []).append(statistics.median(each))
            chosen = random.Random(1).choices(held.names, k=count)
            variants = {
                "switch": plainly(switching(held, held.names, count)),
                "lookup": plainly(lambda held=held, chosen=chosen: [held[n] for n in chosen]),
            }
            for name, own in take_turns(variants, rounds=options.rounds).items():
                times.setdefault((tasks, name), []).extend(own)
            use = held.usage
            if tasks == options.tasks:
                found["bytes"] = use.tiers["device"].nbytes
                found["bytes of their tensors' memory"] = sum(memory_of(held).values())
                found["bytes expected, tasks * length * heads * dims * itemsize"] = tasks * exact(model, options.length)
    for name in ("switch", "lookup"):
        few, most = (statistics.median(times[t, name]) / count for t in (FEW, options.tasks))
        found |= {
            f"seconds of a {name}, {options.tasks} tasks": most,
            f"{name}: {options.tasks} tasks / {FEW}": most / few,
        }
    few, most = (statistics.median(seconds[t]) for t in (FEW, options.tasks))
    return found | {"seconds to load a task": most, f"loading a task: {options.tasks} tasks / {FEW}": most / few}


def exact(model, length):
    """Bytes of one task's keys and values."""
    import foreword as fw

    return sum(s.parameters(length) for s in fw.sites(model)) * model.dtype.itemsize


def memory_of(held):
    """Bytes by storage, so that what is shared counts once and what is only a part counts whole."""
    return {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for name in held.names for group in (held[name].keys, held[name].values) for t in group.values()
    }  # fmt: skip


def tiers(model, path, options):
    """A tenth on the device, three tenths in CPU memory, the rest in files."""
    import foreword as fw

    one = exact(model, options.length)
    device, cpu = options.tasks // 10, 3 * options.tasks // 10
    budget = fw.Budget(device * one, cpu * one, "move")
    with loaded(model, path, options.tasks, budget) as (held, each):
        use = held.usage
        where = {tier: [n for n, t in use.tasks.items() if t.tier == tier] for tier in use.tiers}
        found = {f"tasks in {tier}": len(names) for tier, names in where.items()}
        found |= {f"bytes in {tier} / exact": u.nbytes / max(1, u.tasks * one) for tier, u in use.tiers.items()}
        found["seconds to load a task"] = statistics.median(each)
        first = where["device"][0]
        before = {n: t.clone() for n, t in held[first].keys.items()}
        times = {}
        for tier in ("device", "cpu", "file"):
            names = [
                n
                for n, t in held.usage.tasks.items()
                if (t.tier == tier and (tier == "device") == (t.device_bytes > 0))
            ]
            for name in names[: min(50, len(names))]:
                began = time.perf_counter()
                with held.use(name):
                    pass
                times.setdefault(tier, []).append(time.perf_counter() - began)
        found |= {f"seconds of a switch to a task in {tier}": statistics.median(own) for tier, own in times.items()}
        for name in held.names:  # all come and go
            with held.use(name):
                pass
        after = held[first].keys
        found["equal to the bit after going and coming back"] = all(bool((after[n] == before[n]).all()) for n in before)
        use = held.usage
        found["most bytes on the device / budget"] = use.tiers["device"].most / (device * one)
        found["moves"] = use.counts.moves_down + use.counts.moves_up
    return found


if __name__ == "__main__":
    main()
