"""Budget: the files that tasks are mapped from, and tasks in use by many at once."""

from __future__ import annotations

import asyncio
import gc
import threading
from pathlib import Path

import pytest
import torch
from budgets import answer, tiers
from small_tasks import TOKEN, make

import foreword as fw
import zoo
from foreword.serve.tiers.files import Files

# ---------------------------------------------------------------- files


def resident(tensor):
    """Bytes of a tensor that are in this process's memory, in whole pages."""
    page = 4096
    first, last = tensor.data_ptr() // page + 1, (tensor.data_ptr() + tensor.nbytes) // page - 1
    with Path("/proc/self/pagemap").open("rb") as file:
        file.seek(first * 8)
        entries = file.read((last - first) * 8)
    return sum(int.from_bytes(entries[i : i + 8], "little") >> 63 for i in range(0, len(entries), 8)) * page


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="needs Linux's page map")
def test_mapped_files_take_no_memory_until_they_are_read(tmp_path):
    files = Files(tmp_path)
    mapped = files.write({"a": torch.randn(1 << 20), "none": torch.empty(0, 3)})
    tensor = mapped.tensors["a"]
    assert resident(tensor) == 0
    total = float(tensor.sum())
    assert resident(tensor) > 3 << 20
    mapped.let_go()
    assert resident(tensor) == 0 and float(tensor.sum()) == total
    files.remove(mapped)
    assert files.nbytes == 0 and float(tensor.sum()) == total  # whoever has it can read it still
    assert mapped.tensors["none"].shape == (0, 3)
    folder = files._folder
    files.close()
    assert not folder.exists() and not list(tmp_path.iterdir())


def test_the_folder_goes_with_the_library(library, tmp_path):
    held = library(4, cpu=0, folder=tmp_path / "deep" / "er")
    for seed in range(3):
        held.add(f"t{seed}", make(4, seed))
    files = list((tmp_path / "deep" / "er").rglob("*.safetensors"))
    assert len(files) == 2 and held.usage.tiers["file"].nbytes == 8 * TOKEN
    held.remove("t1")
    assert sum(f.exists() for f in files) == 1
    folder = files[0].parent
    held.holdings.close()
    del held
    gc.collect()
    assert not folder.exists()


def test_a_disk_that_is_full_loses_nothing(library, monkeypatch):
    held = library(8, cpu=0)
    held.add("a", make(4, 0))
    held.add("b", make(4, 1))
    before = {n: answer(held, n) for n in "ab"}

    def full(self, tensors):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Files, "write", full)
        with pytest.raises(fw.BudgetError, match="no file can be written"):
            held.add("c", make(4, 2))
        with pytest.raises(fw.BudgetError):
            held.add("c", make(4, 2), priority=1)
        assert held.names == ["a", "b"] and all(torch.equal(answer(held, n), before[n]) for n in "ab")
    held.add("c", make(4, 2), priority=1)
    assert tiers(held)["c"] == "device" and list(tiers(held).values()).count("file") == 1


def test_an_unwritable_folder(library, tmp_path):
    (tmp_path / "file").write_text("")
    held = library(4, cpu=0, folder=tmp_path / "file")
    held.add("a", make(4))
    with pytest.raises(fw.BudgetError, match="no file can be written"):
        held.add("b", make(4))


# ---------------------------------------------------------------- use, by many at once


def test_what_is_in_use_is_not_touched(library):
    held = library(8)
    for seed, name in enumerate("abc"):
        held.add(name, make(4, seed))
    with held.use("a"), held.use("b"):
        with pytest.raises(fw.BudgetError, match="tasks in use"), held.use("c"):
            pass
        assert tiers(held) == {"a": "device", "b": "device", "c": "cpu"}
    answer(held, "c")


def test_a_removed_or_replaced_task_counts_while_it_is_used(library):
    held = library(8, when_full="refuse")
    held.add("a", make(4, 0))
    want = answer(held, "a")
    with held.use("a"):
        held.remove("a")
        assert held.usage.leaving == 1 and held.usage.tiers["device"].nbytes == 4 * TOKEN
        with pytest.raises(fw.BudgetError):
            held.add("b", make(5, 1))
        held.add("a", make(4, 2))
        assert torch.equal(zoo.logits(held.model, input_ids=zoo.ids(1, 5)), want)
    assert held.usage.leaving == 0 and held.usage.tiers["device"].nbytes == 4 * TOKEN
    assert not torch.equal(answer(held, "a"), want)


def test_mixed_rows_count_the_copies_that_they_read(library):
    held = library(40)
    for seed, name in enumerate("abc"):
        held.add(name, make(4, seed))
    with held.use(["a", "b", None]):
        zoo.logits(held.model, input_ids=zoo.ids(3, 5))
        views = held._choice.get().views.values()
        copies = sum(t.nbytes for v in views for t in (v.keys, v.values, v.visible, v.bias) if t is not None)
        assert copies <= held.usage.caches < 2 * copies
    assert held.usage.caches == 0
    tight = library(9)
    for seed, name in enumerate("ab"):
        tight.add(name, make(4, seed))
    answer(tight, "a")  # one task for all rows is read where it is
    with pytest.raises(fw.BudgetError, match=r"what its rows read|what requests read"), tight.use(["a", "b"]):
        pass
    assert tight.usage.caches == 0 and all(u.users == 0 for u in tight.usage.tasks.values())


def test_threads_that_crowd_each_other_out_read_their_own(library):
    held = library(8)
    names = [f"t{i}" for i in range(6)]
    for seed, name in enumerate(names):
        held.add(name, make(4, seed))
    want, wrong, refused = {n: answer(held, n) for n in names}, [], [0]

    def work(name):
        for _ in range(15):
            try:
                if not torch.equal(answer(held, name), want[name]):
                    wrong.append(name)
            except fw.BudgetError:
                refused[0] += 1
            if held.usage.tiers["device"].nbytes > 8 * TOKEN:
                wrong.append("over")

    threads = [threading.Thread(target=work, args=(n,)) for n in names]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong and held.names == names and all(u.users == 0 for u in held.usage.tasks.values())
    assert all(torch.equal(answer(held, n), want[n]) for n in names)


def test_asyncio_tasks_that_crowd_each_other_out(library):
    held = library(12)
    for seed, name in enumerate("abc"):
        held.add(name, make(4, seed))
    held.add("d", make(4, 7))
    want = {n: answer(held, n) for n in "abcd"}

    async def work(name):
        for _ in range(4):
            try:
                with held.use(name):
                    await asyncio.sleep(0)
                    assert torch.equal(zoo.logits(held.model, input_ids=zoo.ids(1, 5)), want[name])
            except fw.BudgetError:
                assert sum(u.users for u in held.usage.tasks.values()) == 3
            await asyncio.sleep(0)

    async def main():
        await asyncio.gather(*map(work, "abcd"))

    asyncio.run(main())
    assert all(u.users == 0 for u in held.usage.tasks.values())
