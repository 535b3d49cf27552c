"""A document as a prefix: how likely are the answers to held-out questions, with what before them?

The Apache licence (this project's LICENSE, 2,224 tokens) is distilled into SmolLM2-135M on questions that the model
makes itself and on passages of the text. Judged by the 32 questions and answers of distill_questions.jsonl, which were
written by hand: the negative log-likelihood of the answers, in nats a token, with nothing before the question, with the
first tokens of the licence, with the cartridge of the same size, and with all of the licence. One seed.

    python benchmarks/distill.py [--steps 64] [--lengths 64 256] [--work DIR] [--only contexts form lengths …]

Another text: --document FILE --held-out FILE.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from _measure import keep

ROOT = Path(__file__).parents[1]
GROUPS = ("contexts", "form", "lengths", "data", "objective")
IMAGE = ROOT / "docs" / "images" / "distill.png"
HELD_OUT = Path(__file__).with_name("distill_questions.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--document", type=Path, default=ROOT / "LICENSE")
    parser.add_argument("--held-out", type=Path, default=HELD_OUT, help="JSONL of question and answer")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lengths", type=int, nargs="*", default=[64, 256])
    parser.add_argument("--count", type=int, default=96, help="questions that the model makes")
    parser.add_argument("--passages", type=int, default=96)
    parser.add_argument("--work", type=Path, help="a folder for the runs, to go on with after an interruption")
    parser.add_argument("--only", nargs="*", choices=GROUPS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = options.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        Bench(options, work).run()


class Bench:
    """The document, its questions, and what has been measured."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        import foreword as fw
        from foreword.train.questions import context

        self.options, self.work = options, work
        self.model, self.tokenizer = fw.load_model("demo")
        self.text = context(options.document.read_text(encoding="utf-8"))
        lines = options.held_out.read_text(encoding="utf-8").splitlines()
        self.held_out = [(r["question"], r["answer"]) for r in map(json.loads, lines)]
        kept = work / "rows.json"
        self.rows: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.exists() else {}
        self.name = ""

    def run(self) -> None:
        """All of it. Each row is kept in ``work``, and so is what an interrupted run was at."""
        from foreword import Prefix

        read, only = partial(Prefix.from_text, self.model, self.tokenizer, self.text), self.options.only or GROUPS
        longest, both = max(self.options.lengths), ("questions", "passages")
        if "contexts" in only:
            self.row("nothing", lambda: self.judged(None))
            for length in self.options.lengths:
                self.row(f"first {length} tokens", lambda n=length: self.judged(read(length=n)))
            self.row("all of the text", lambda: self.judged(read()))
        if "form" in only:
            self.row("nothing, chat template", lambda: self.judged(None, chat=True))
            self.row("all of the text, chat template", lambda: self.judged(read(), chat=True))
        if "lengths" in only:
            for length in self.options.lengths:
                self.row(f"cartridge of {length}", lambda n=length: self.distilled(n, both))
        if "data" in only:
            for kind in both:
                self.row(f"cartridge of {longest}, {kind} only", lambda k=kind: self.distilled(longest, (k,)))
        if "objective" in only:
            name = f"next-token training, {longest} tokens"
            self.row(name, lambda: self.distilled(longest, both, teacher=False))
        self.report()

    def row(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """Measure it, unless it was."""
        if name not in self.rows:
            self.name = name
            self.rows[name] = measure()
            (self.work / "rows.json").write_text(json.dumps(self.rows))
        found = self.rows[name]
        print(f"{name:40} {found['nll']:.3f}  {found['bytes']:,} bytes", flush=True)

    def judged(self, prefix: Any, chat: bool = False) -> dict[str, Any]:
        """The held-out answers with a prefix before their questions."""
        import foreword as fw
        from foreword.evaluate.perplexity import text_nll
        from foreword.train.questions import asked

        tuning = fw.attach(self.model, prefix) if prefix is not None else None
        began = time.perf_counter()
        try:
            prompts = [asked(self.tokenizer, q, chat) for q, _ in self.held_out]
            answers = [a if chat else f" {a}" for _, a in self.held_out]
            nlls = text_nll(self.model, self.tokenizer, answers, prompts=prompts)
        finally:
            if tuning is not None:
                tuning.detach()
        size = (prefix.longest, prefix.nbytes) if prefix is not None else (0, 0)
        spent = time.perf_counter() - began
        return {"nll": statistics.mean(nlls), "tokens": size[0], "bytes": size[1], "seconds": spent, "each": nlls}

    def distilled(self, length: int, kinds: tuple[str, ...], *, teacher: bool = True) -> dict[str, Any]:
        """A run, from the text's first tokens, and what the answers come to with it."""
        import foreword as fw
        from foreword.train.distill import begun
        from foreword.train.run import train_prefix
        from foreword.train.trainer import last_checkpoint

        out = self.work / self.name.replace(",", "").replace(" ", "-")
        config = fw.PrefixConfig(length=length, init=self.text, freeze_first=True)
        arguments = {
            "max_steps": self.options.steps, "per_device_train_batch_size": self.options.batch, "seed": 0,
            "use_cpu": True, "report_to": "none", "save_steps": 16, "logging_steps": 8,
        }  # fmt: skip
        dataset, began = self.examples(kinds), time.perf_counter()
        common = (config, dataset, out, arguments)
        if teacher:
            result = fw.distill(self.model, self.tokenizer, self.text, *common, resume=begun(out))
        else:
            result = train_prefix(self.model, self.tokenizer, *common, resume=last_checkpoint(out) is not None)
        spent, history = time.perf_counter() - began, [(e["step"], e["loss"]) for e in result.history if "loss" in e]
        about = {"examples": len(dataset), "history": history, "trained_seconds": spent}
        return {**about, **self.judged(result.prefix)}

    def examples(self, kinds: tuple[str, ...]) -> Any:
        """Questions of the model's own and passages, encoded."""
        from foreword.data import encode
        from foreword.train.questions import examples_of, passages
        from foreword.train.self_study import Writing, self_study

        path, rows = self.work / "questions.jsonl", []
        if "questions" in kinds:
            rows += self_study(
                self.model, self.tokenizer, self.text, path, self.options.count, resume=path.exists(),
                how=Writing(question=32, answer=40),
            )  # fmt: skip
        if "passages" in kinds:
            rows += passages(self.text, self.options.passages, words=(8, 24))
        return encode(examples_of(rows, self.tokenizer), self.tokenizer, max_length=96)

    def report(self) -> None:
        """The results' file and picture."""
        kept = {k: v for k, v in vars(self.options).items() if k in ("steps", "batch", "lengths", "count", "passages")}
        own = self.options.document == ROOT / "LICENSE"
        record = {"options": kept, "questions": len(self.held_out), "rows": self.rows}
        print("written:", keep("distill" if own else "distill_other", record))
        if own and self.rows.keys() >= {"nothing", "all of the text"}:
            print("written:", draw(self.rows))


def draw(rows: dict[str, dict[str, Any]]) -> Path:
    """Negative log-likelihood of the answers over bytes of keys and values."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for start, label, colour in (("first", "the text's first tokens", "C0"), ("cartridge", "cartridge", "C2")):
        own = sorted((r["tokens"], r["nll"]) for n, r in rows.items() if n.startswith(start) and "," not in n)
        axes.plot(*zip(*own, strict=True), marker="o", color=colour, label=label)
        for tokens, nll in own:
            axes.annotate(f"{nll:.2f}", (tokens, nll), textcoords="offset points", xytext=(6, 5))
    for name, style in (("nothing", ":"), ("all of the text", "--")):
        row = rows[name]
        axes.axhline(row["nll"], linestyle=style, color="0.3")
        axes.annotate(
            f"{name}: {row['nll']:.2f}", (1, row["nll"]), xycoords=("axes fraction", "data"), ha="right", va="bottom"
        )
    axes.set_xscale("log", base=2)
    axes.set_xlabel("virtual tokens before the question")
    axes.set_ylabel("held-out answers: nats a token")
    axes.grid(alpha=0.3)
    axes.legend()
    IMAGE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGE, dpi=120)
    return IMAGE


if __name__ == "__main__":
    main()
