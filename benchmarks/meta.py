"""Does a learned start help? Bank messages, a few intents a task: how soon an unseen task is learned from each start.

The intents of banking77 are shuffled into tasks of four. From the training tasks come three starts of equal cost (as
many examples seen): by Reptile, by first-order MAML, and by training on their mixture, which is the baseline to beat.
Beside them stand a text and random numbers. Each is then trained on tasks whose intents none of them has seen, for 1,
5, 20 and 100 steps of AdamW; measured on other messages of the same task are the negative log-likelihood of the
intent's name in nats a token, and how often writing greedily gives exactly that name. The learning rate is chosen for
each start and number of steps on a task of its own, out of a grid (that of 20 steps serves for 100).

    python benchmarks/meta.py --banking banking77_train.jsonl [--unlike E2E/train.jsonl] [--work FOLDER]

``--unlike`` adds a task of another kind, to see whether a start of one family serves another. With ``--work`` the
starts and runs are kept in a folder, and a benchmark that was broken off goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev

from _measure import keep

TEXT = "A customer of a bank has written a message. Say in a few words what it is about:"
LENGTH = 16
BUDGETS = (1, 5, 20, 100)
RATES = (1e-2, 3e-2, 1e-1)
STARTS = ("random", "text", "joint", "reptile", "fomaml")
Rows = list[dict[str, str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--banking", required=True, help="JSONL with text and label")
    parser.add_argument("--unlike", help="JSONL with input and output (or references), of another kind")
    parser.add_argument("--work", help="folder for starts and runs, to go on from")
    parser.add_argument(
        "--meta-steps", type=int, default=25, help="of Reptile and MAML; the mixture is trained as long"
    )
    parser.add_argument("--inner", type=int, default=4, help="gradients that a task is adapted by in a meta-step")
    parser.add_argument("--tasks", type=int, default=3, help="tasks a meta-step")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--letters", type=int, default=50, help="messages may be so long")
    parser.add_argument("--long", type=int, default=1, help="test tasks that are trained for 100 steps")
    options = parser.parse_args()

    import foreword as fw

    warnings.simplefilter("ignore")
    model, tokenizer = fw.load_model("demo")
    bench = Bench(model, tokenizer, options, Path(options.work or tempfile.mkdtemp()))
    tasks = intents(Path(options.banking), options.letters)
    train, develop, test = tasks[:-5], tasks[-5:-4], tasks[-4:]
    learned = {f"task {i}": bench.encoded(rows) for i, (_, rows) in enumerate(train)}
    bench.learn(learned)

    rates: dict[str, dict[int, float]] = {}
    for start in STARTS:
        tried = {rate: [bench.adapt(start, rows, rate, 20, 0) for _, rows in develop] for rate in RATES}
        for steps in BUDGETS:
            loss = {rate: fmean(r[str(min(steps, 20))]["loss"] for r in runs) for rate, runs in tried.items()}
            rates.setdefault(start, {})[steps] = min(loss, key=lambda rate: loss[rate])
        print(f"{start:8} rates {rates[start]}", flush=True)
    found: dict[str, list[dict]] = {}
    for start in STARTS:
        found[start] = []
        for number, (name, rows) in enumerate(test):
            own = {b: rate for b, rate in rates[start].items() if b <= 20 or number < options.long}
            found[start].append({"task": name, "looks": bench.adapt_all(start, rows, own, 0)})
        print(f"{start:8} {' '.join(said(summary(found[start])[b]) for b in map(str, (0, *BUDGETS)))}", flush=True)
    parts = {"train": train, "develop": develop, "test": test}
    record = {
        "options": {k: v for k, v in vars(options).items() if k not in ("banking", "unlike", "work")},
        "tasks": {part: [name for name, _ in own] for part, own in parts.items()},
        "rates": rates, "summary": {start: summary(runs) for start, runs in found.items()}, "runs": found,
        "paired": {a: paired(found[a], found["joint"]) for a in STARTS if a != "joint"},
    }  # fmt: skip
    if options.unlike:
        rows = unlike(Path(options.unlike))
        record["unlike"] = {s: bench.adapt(s, rows, 3e-2, 5, 0) for s in ("text", "joint", "reptile")}
        for start, looks in record["unlike"].items():
            print(f"unlike   {start:8} {' '.join(said(look) for look in looks.values())}", flush=True)
    print("written:", keep("meta", record))
    draw(record, Path(__file__).parents[1] / "docs" / "images" / "meta.png")


# ------------------------------------------------------------------------------------------ data


def intents(path: Path, letters: int) -> list[tuple[str, Rows]]:
    """Tasks of four intents, 18 short messages of each: the first 12 to learn from, 6 to measure on."""
    by_intent: dict[str, Rows] = defaultdict(list)
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if len(row["text"]) <= letters:
            name = row["label"].replace("_", " ").strip("?").lower()
            by_intent[name].append({"input": row["text"].strip() + "\nAbout:", "output": " " + name})
    names = sorted(n for n, rows in by_intent.items() if len(rows) >= 18)
    random.Random(0).shuffle(names)
    tasks = []
    for i in range(0, len(names) - 3, 4):
        four = [by_intent[n][:18] for n in names[i : i + 4]]
        tasks.append(
            (", ".join(names[i : i + 4]), [r for rs in four for r in rs[:12]] + [r for rs in four for r in rs[12:]])
        )
    return tasks


def unlike(path: Path) -> Rows:
    """Another kind of task, as large: 48 rows to learn from, 24 to measure on."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    random.Random(0).shuffle(rows)
    made = [{"input": r["input"] + "\n", "output": r["output"] if "output" in r else r["references"][0]} for r in rows]
    return [r for r in made if len(r["input"]) + len(r["output"]) < 220][:72]


# ------------------------------------------------------------------------------------------ runs


class Bench:
    """The model, the starts, and what was run, kept in a folder."""

    def __init__(self, model, tokenizer, options, work: Path) -> None:
        from foreword.data import Collator

        self.model, self.tokenizer, self.options, self.work = model, tokenizer, options, work
        self.collate = Collator.for_tokenizer(tokenizer)
        work.mkdir(parents=True, exist_ok=True)

    def encoded(self, rows: Rows):
        from foreword.data import encode, read_examples

        return encode(read_examples(rows), self.tokenizer, max_length=96)

    def kept(self, name: str, make: Callable[[], dict]) -> dict:
        """What was run under this name, or is now."""
        path = self.work / f"{name}.json"
        if not path.exists():
            made = make()
            path.with_suffix(".part").write_text(json.dumps(made), encoding="utf-8")
            path.with_suffix(".part").rename(path)
        return json.loads(path.read_text(encoding="utf-8"))

    def learn(self, tasks: dict) -> None:
        """The starts that training tasks give."""
        import foreword as fw
        from foreword.train.run import train_prefix

        o = self.options
        text = fw.PrefixConfig(length=LENGTH, init=TEXT)
        plan = {"meta_steps": o.meta_steps, "tasks_per_step": o.tasks, "batch_size": o.batch}
        # FOMAML's last gradient is the query's; its start moves by one step of Adam where Reptile's moves by several.
        for name, inner, rate in (("reptile", o.inner, 1.0), ("fomaml", o.inner - 1, 5e-2)):
            config = fw.MetaConfig(name, **plan, inner_steps=inner, meta_learning_rate=rate, save_every=5)
            resume = (self.work / name).exists()
            result = fw.meta_train(self.model, self.tokenizer, text, tasks, self.work / name, config, resume=resume)
            if result.interrupted:
                raise KeyboardInterrupt
        if not (self.work / "joint" / "foreword.json").exists():
            shutil.rmtree(self.work / "joint.part", ignore_errors=True)  # one that was broken off begins anew
            seen = o.meta_steps * o.tasks * o.inner * o.batch
            arguments = {
                "max_steps": seen // (2 * o.batch), "per_device_train_batch_size": 2 * o.batch, "use_cpu": True,
                "save_strategy": "no", "report_to": "none", "seed": 0,
            }  # fmt: skip
            joint = train_prefix(self.model, self.tokenizer, text, Mixture(tasks), self.work / "joint.part", arguments)
            if joint.interrupted:
                raise KeyboardInterrupt
            (self.work / "joint.part").rename(self.work / "joint")

    def attached(self, start: str, seed: int):
        import foreword as fw

        made = {"random": fw.PrefixConfig(length=LENGTH, init="random", seed=seed),
                "text": fw.PrefixConfig(length=LENGTH, init=TEXT)}  # fmt: skip
        what = made[start] if start in made else fw.Prefix.load(self.work / start)
        return fw.attach(self.model, what, tokenizer=self.tokenizer, trainable=True)

    def adapt_all(self, start: str, rows: Rows, rates: dict[int, float], seed: int) -> dict[str, dict]:
        """The looks after each number of steps, each at its rate; numbers that share a rate share a run."""
        looks = {}
        for rate in dict.fromkeys(rates.values()):
            own = [steps for steps, r in rates.items() if r == rate]
            run = self.adapt(start, rows, rate, max(own), seed)
            looks |= {k: v for k, v in run.items() if int(k) in (0, *own)}
        return dict(sorted(looks.items(), key=lambda item: int(item[0])))

    def adapt(self, start: str, rows: Rows, rate: float, steps: int, seed: int) -> dict[str, dict]:
        """Train on a task's first two thirds; by steps done, what the last third says."""
        name = f"{start}-{hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:8]}-{rate:g}-{steps}-{seed}"
        return self.kept(name, lambda: self._adapt(start, rows, rate, steps, seed))

    def _adapt(self, start: str, rows: Rows, rate: float, steps: int, seed: int) -> dict[str, dict]:
        import torch

        cut = len(rows) * 2 // 3
        train, valid = self.encoded(rows[:cut]), self.encoded(rows[cut:])
        tuning = self.attached(start, seed)
        try:
            optimizer = torch.optim.AdamW(tuning.parameters(), lr=rate, weight_decay=0.0)
            chance, order, looks = random.Random(seed), [], {"0": self.look(valid)}
            for step in range(1, steps + 1):
                if len(order) < self.options.batch:
                    order = chance.sample(range(cut), cut)
                rows_now = [order.pop() for _ in range(self.options.batch)]
                optimizer.zero_grad()
                self.model(**self.collate([train[i] for i in rows_now])).loss.backward()
                torch.nn.utils.clip_grad_norm_(list(tuning.parameters()), 1.0)
                optimizer.step()
                if step in BUDGETS:
                    looks[str(step)] = self.look(valid)
            return looks
        finally:
            tuning.detach()

    def look(self, valid) -> dict[str, float]:
        """Nats a token, and the share of rows whose every token is the likeliest: those are written exactly."""
        import torch

        total, tokens, exact = 0.0, 0, 0
        with torch.no_grad():
            for i in range(0, len(valid), 12):
                batch = self.collate([valid[j] for j in range(i, min(i + 12, len(valid)))])
                labels = batch.pop("labels")[:, 1:]
                logits = self.model(**batch).logits[:, :-1]
                told = labels != -100
                total += float(torch.nn.functional.cross_entropy(logits[told], labels[told], reduction="sum"))
                tokens += int(told.sum())
                exact += int(((logits.argmax(-1) == labels) | ~told).all(-1).sum())
        return {"loss": total / tokens, "exact": exact / len(valid)}


class Mixture:
    """The examples of all tasks as one set."""

    def __init__(self, tasks: dict) -> None:
        self.rows = [d[i] for d in tasks.values() for i in range(len(d))]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.rows[index]


# ------------------------------------------------------------------------------------------ results


def summary(runs: list[dict]) -> dict[str, dict[str, float]]:
    """Means over tasks, by steps."""
    found = {}
    for steps in map(str, (0, *BUDGETS)):
        looks = [r["looks"][steps] for r in runs if steps in r["looks"]]
        found[steps] = {k: fmean(look[k] for look in looks) for k in ("loss", "exact")} | {"runs": len(looks)}
    return found


def paired(own: list[dict], other: list[dict]) -> dict[str, dict[str, float | None]]:
    """How much lower the loss is than another start's on the same task, and the error of that mean."""
    found = {}
    for steps in map(str, BUDGETS):
        gains = [b["looks"][steps]["loss"] - a["looks"][steps]["loss"]
                 for a, b in zip(own, other, strict=True) if steps in a["looks"]]  # fmt: skip
        error = stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else None
        found[steps] = {"gain": fmean(gains), "error": error}
    return found


def said(look: dict) -> str:
    return f"{look['loss']:.3f} ({look['exact']:.0%})"


def draw(record: dict, path: Path) -> None:
    """Loss and exact names over steps, a line for each start."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (what, title) in zip(
        figure.subplots(1, 2), (("loss", "loss on unseen messages (nats a token)"), ("exact", "intent named exactly")),
        strict=True,
    ):  # fmt: skip
        for start in STARTS:
            looks = record["summary"][start]
            values = [looks[str(b)][what] for b in (0, *BUDGETS)]
            axes.plot(range(len(values)), values, marker="o", markersize=4, label=start)
        axes.set_xticks(range(len(BUDGETS) + 1), [str(b) for b in (0, *BUDGETS)])
        axes.set_xlabel("steps on the new task")
        axes.set_ylabel(title)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.axes[0].set_yscale("log")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
