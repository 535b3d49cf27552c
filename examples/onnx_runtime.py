"""The demo model and two prefixes on ONNX Runtime, checked to write what transformers writes.

    pip install -c constraints.txt -e ".[demo,export]"
    python examples/onnx_runtime.py [FOLDER]

The export of the model's 30 layers takes some minutes the first time; with a FOLDER it is kept.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import foreword as fw
from foreword.exchange.onnx import OnnxModel, export_base, write_past

TEXTS = {
    "critic": "You are a film critic who loved the film. Write one warm sentence about it.",
    "gardener": "You are a patient gardener. Answer in one sentence.",
}
NEW = 32


def main(folder: Path) -> None:
    """Export, write with both, and compare."""
    model, tokenizer = fw.load_model("demo")
    export_base(model, folder)
    runs = OnnxModel.load(folder)
    for name, text in TEXTS.items():
        prefix = fw.Prefix.from_text(model, tokenizer, text)
        path = write_past(prefix, folder / f"{name}.safetensors")
        inputs = tokenizer("Question: what makes you happy?\nAnswer:", return_tensors="pt")
        tuning = fw.attach(model, prefix)
        want = model.generate(**inputs, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
        tuning.detach()
        got = runs.generate(inputs["input_ids"].numpy(), NEW, path)
        same = (got[0] == want[0, inputs["input_ids"].shape[1] :].numpy()).sum()
        print(f"{name}: {same} of {NEW} tokens are transformers'")
        print(f"  {tokenizer.decode(got[0])!r}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder))
