"""PrefixMemory-Tuning against a hand-written sum, and as a part beside a prefix."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

import foreword as fw
import zoo
from foreword.memory import SiteMemory

ARCHITECTURES = ("llama", "gpt2", "gemma2", "deepseek", "bert", "t5", "whisper")


def filled(model, config, seed=0):
    """A model with a memory of random numbers attached."""
    tuning = fw.attach(
        model, config, example_inputs=None if model.config.model_type != "whisper" else zoo.inputs("whisper")
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in tuning.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return tuning


@given(st.integers(0, 10**6), st.sampled_from(["elu", "gelu"]), st.booleans(), st.booleans())
def test_recall_is_a_sum_per_head(seed, activation, low_rank, mixed):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    batch, heads, length, dim, value_dim, tasks = 4, 3, 5, 6, 7, 2 if mixed else 1
    query = draw(batch, heads, length, dim)
    matrix, up = (draw(tasks, heads, dim, 2), draw(tasks, heads, 2, value_dim)) if low_rank else (
        draw(tasks, heads, dim, value_dim), None)  # fmt: skip
    rows = torch.tensor([1, 0]) if mixed else None
    got = SiteMemory(matrix, up, activation).recall(query, rows, {})
    phi = {"elu": torch.nn.functional.elu, "gelu": torch.nn.functional.gelu}[activation]
    for b in range(batch):
        task = [1, 1, 0, 0][b] if mixed else 0
        for h in range(heads):
            whole = matrix[task, h] if up is None else matrix[task, h] @ up[task, h]
            for s in range(length):
                torch.testing.assert_close(got[b, s, h], phi(query[b, h, s]) @ whole, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_new_memory_is_the_base_model(name):
    model, arguments = zoo.build(name), zoo.inputs(name)
    base = zoo.logits(model, **arguments)
    for rank in (None, 2):
        tuning = fw.attach(model, fw.MemoryConfig(rank=rank), example_inputs=arguments)
        assert torch.equal(zoo.logits(model, **arguments), base)
        tuning.detach()
    assert torch.equal(zoo.logits(model, **arguments), base)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_parameters_are_counted(name):
    model = zoo.build(name)
    sites = [s for s in fw.sites(model, zoo.inputs(name)) if not s.tower]
    whole = fw.attach(model, fw.MemoryConfig(), example_inputs=zoo.inputs(name))
    assert whole.num_parameters == sum(s.heads * s.key_dim * s.value_dim for s in sites)
    whole.detach()
    low = fw.attach(model, fw.MemoryConfig(rank=3), example_inputs=zoo.inputs(name))
    assert low.num_parameters == sum(s.heads * 3 * (s.key_dim + s.value_dim) for s in sites)


@pytest.mark.parametrize("rank", [None, 2])
def test_every_matrix_learns(rank):
    model = zoo.build("llama")
    tuning = fw.attach(model, fw.MemoryConfig(rank=rank))
    model(input_ids=zoo.ids(), labels=zoo.ids()).loss.backward()
    grads = [p.grad.abs().sum() for p in (tuning.holder.memory.matrix if rank is None else tuning.holder.memory.up)]
    assert len(grads) == 2 and all(g > 0 for g in grads)


@pytest.mark.parametrize("name", ["llama", "neox", "qwen3"])
def test_plain_queries_are_those_before_the_rotation(name):
    """With queries="plain" the memory reads what the model had at position 0 of each query."""
    model = zoo.build(name)
    tuning = fw.attach(model, fw.MemoryConfig(queries="plain"))
    site, seen = tuning.sites[0], {}
    memory = tuning.build_views()[site.name].memory
    from foreword import memory as module

    turned = []
    original = module._turned_back
    module._turned_back = lambda *a: turned.append(original(*a)) or turned[-1]
    try:
        zoo.logits(model, input_ids=zoo.ids(1, 6))
    finally:
        module._turned_back = original
    tuning.detach()

    from foreword.sites import dry_run

    zeros = torch.zeros(1, 6, dtype=torch.long)
    dry_run(model, lambda call, _: seen.setdefault(call.name, call.query),
            {"input_ids": zoo.ids(1, 6), "position_ids": zeros})  # fmt: skip
    assert memory.rotation is not None
    torch.testing.assert_close(turned[0], seen[site.name], atol=1e-5, rtol=1e-4)


def test_plain_queries_need_a_rotation():
    with pytest.raises(fw.ConfigError, match='use queries="rotated"'):
        fw.attach(zoo.build("gpt2"), fw.MemoryConfig(queries="plain"))


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_saved_and_loaded_memories_say_the_same(name, rank, tmp_path):
    model, arguments = zoo.build(name), zoo.inputs(name)
    tuning = filled(model, fw.MemoryConfig(rank=rank, activation="gelu"))
    trained = zoo.logits(model, **arguments)
    prefix = tuning.bake()
    tuning.detach()
    prefix.save(tmp_path / "m")
    loaded = fw.Prefix.load(tmp_path / "m")
    assert loaded == prefix and loaded.longest == 0 and loaded.recall.activation == "gelu"
    again = fw.attach(model, loaded)
    torch.testing.assert_close(zoo.logits(model, **arguments), trained, atol=1e-5, rtol=1e-4)
    again.detach()


def test_prefix_and_memory_together_add_up():
    """Both at once: the attention with the prefix, plus what the memory alone adds to it."""
    model, tokens = zoo.build("llama"), zoo.ids()
    config = [fw.PrefixConfig(length=3, init="random"), fw.MemoryConfig()]
    tuning = filled(model, config)
    both = zoo.logits(model, input_ids=tokens)
    baked = tuning.bake()
    tuning.detach()
    assert baked.longest == 3 and len(baked.memory) == 2
    for order in ([fw.MemoryConfig(), fw.PrefixConfig(length=3, init="random")], config):
        tuning = fw.attach(model, order)
        assert [g["lr"] for g in tuning.parameter_groups()] in ([1e-3, 2e-2], [2e-2, 1e-3])
        tuning.detach()
    tuning = fw.attach(model, baked)
    torch.testing.assert_close(zoo.logits(model, input_ids=tokens), both, atol=1e-5, rtol=1e-4)
    tuning.strength = 0
    base = zoo.logits(model, input_ids=tokens)
    tuning.detach()
    assert torch.equal(base, zoo.logits(model, input_ids=tokens))


def test_strength_scales_a_memory():
    model, tokens = zoo.build("llama"), zoo.ids()
    tuning = filled(model, fw.MemoryConfig())
    tuning.strength = 0.5
    half = zoo.logits(model, input_ids=tokens)
    baked = tuning.bake()
    tuning.detach()
    fw.attach(model, baked)
    torch.testing.assert_close(zoo.logits(model, input_ids=tokens), half, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"activation": "relu"}, "activation='relu'"), ({"queries": "x"}, "queries='x'"), ({"rank": 0}, "rank=0"),
     ({"learning_rate": -1.0}, "learning_rate=-1.0"), ({"sites": "nothing"}, "leaves no site")],
)  # fmt: skip
def test_bad_memories_are_refused(change, said):
    with pytest.raises(fw.ConfigError, match=said):
        fw.attach(zoo.build("llama"), fw.MemoryConfig(**change))


def test_a_rotated_memory_can_not_be_shifted():
    model = zoo.build("llama")
    tuning = filled(model, [fw.PrefixConfig(length=2, init="random"), fw.MemoryConfig()])
    with pytest.raises(fw.MismatchError, match="can't be shifted"):
        tuning.bake().shift(2)


# ------------------------------------------------------------------------------------------ low rank stays low rank


def whole(prefix):
    """The same prefix with its memory multiplied out, as files before ``memory_up`` have it."""
    return replace(prefix, memory={n: m @ prefix.memory_up[n] for n, m in prefix.memory.items()}, memory_up={})


@pytest.mark.parametrize("name", ["llama", "deepseek", "t5"])
def test_a_low_rank_memory_is_saved_as_its_factors(name, tmp_path):
    model, arguments = zoo.build(name), zoo.inputs(name)
    tuning = filled(model, fw.MemoryConfig(rank=3))
    trained = zoo.logits(model, **arguments)
    prefix = tuning.bake()
    expected = sum(s.heads * 3 * (s.key_dim + s.value_dim) for s in prefix.sites)
    assert prefix.num_parameters == tuning.num_parameters == expected and prefix.nbytes == 4 * expected
    tuning.detach()
    prefix.save(tmp_path / "m")
    loaded = fw.Prefix.load(tmp_path / "m")
    assert loaded == prefix and loaded.num_parameters == expected
    for site in prefix.sites:
        assert loaded.memory[site.name].shape == (site.heads, site.key_dim, 3)
        assert torch.equal(loaded.memory_up[site.name], prefix.memory_up[site.name])
    fw.attach(model, loaded)
    assert torch.equal(zoo.logits(model, **arguments), trained)


def test_training_goes_on_with_the_factors():
    model, tokens = zoo.build("llama"), zoo.ids()
    tuning = filled(model, fw.MemoryConfig(rank=2))
    first = tuning.bake()
    tuning.detach()
    tuning = fw.attach(model, first, trainable=True)
    assert tuning.num_parameters == first.num_parameters
    model(input_ids=tokens, labels=tokens).loss.backward()
    with torch.no_grad():
        for parameter in tuning.parameters():
            assert parameter.grad.abs().sum() > 0
            parameter -= 0.1 * parameter.grad
    second = tuning.bake()
    assert second.num_parameters == first.num_parameters and second != first
    assert all(up.shape[1] == 2 for up in second.memory_up.values())


def test_strength_scales_one_factor():
    model, tokens = zoo.build("llama"), zoo.ids()
    tuning = filled(model, fw.MemoryConfig(rank=2))
    plain = tuning.bake()
    tuning.strength = 0.5
    half, baked = zoo.logits(model, input_ids=tokens), tuning.bake()
    tuning.detach()
    for name in plain.memory:
        assert torch.equal(baked.memory[name], 0.5 * plain.memory[name])
        assert torch.equal(baked.memory_up[name], plain.memory_up[name])
    fw.attach(model, baked)
    assert torch.equal(zoo.logits(model, input_ids=tokens), half)


def test_files_of_whole_memories_are_as_before(tmp_path):
    model, tokens = zoo.build("llama"), zoo.ids()
    tuning = filled(model, fw.MemoryConfig(rank=2))
    low = tuning.bake()
    trained = zoo.logits(model, input_ids=tokens)
    tuning.detach()
    prefix = whole(low)
    prefix.save(tmp_path / "m")
    with safe_open(tmp_path / "m" / "prefix.safetensors", framework="pt") as file:
        assert not [n for n in file.keys() if n.endswith("memory_up")]  # noqa: SIM118
    loaded = fw.Prefix.load(tmp_path / "m")
    assert loaded == prefix and loaded.memory_up == {}
    tuning = fw.attach(model, loaded, trainable=True)
    assert tuning.num_parameters == sum(s.heads * s.key_dim * s.value_dim for s in prefix.sites)
    torch.testing.assert_close(zoo.logits(model, input_ids=tokens), trained, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("ranks", "kept"), [((2, 2), 2), ((2, 3), None), ((2, None), None), ((None, 3, 2), None), ((3,), 3)]
)
def test_a_library_mixes_ranks(ranks, kept):
    """Rows of different ranks, whole, plain and none in one batch are each as alone; equal ranks stay factors."""
    model = zoo.build("llama")
    made = {}
    for n, rank in enumerate(ranks):
        tuning = filled(model, fw.MemoryConfig(rank=rank), seed=n)
        made[f"{n}"] = tuning.bake()
        tuning.detach()
    plain = fw.attach(model, fw.PrefixConfig(length=2, init="random"))
    made["plain"] = plain.bake()
    plain.detach()
    tasks = [*made, None, "0"]
    tokens, alone = zoo.ids(len(tasks), 6), {}
    for task, prefix in [*made.items(), (None, None)]:
        tuning = fw.attach(model, prefix) if prefix is not None else None
        alone[task] = zoo.logits(model, input_ids=tokens)
        if tuning is not None:
            tuning.detach()
    library = fw.Library(model)
    for task, prefix in made.items():
        library.add(task, prefix)
    with library.use(tasks):
        mixed = zoo.logits(model, input_ids=tokens)
        memory = library.view(library.sites[0].name).memory
    assert (memory.up.shape[-2] if memory.up is not None else None) == kept
    for row, task in enumerate(tasks):
        torch.testing.assert_close(mixed[row], alone[task][row], atol=2e-5, rtol=1e-4, msg=str(task))


def test_factors_that_do_not_fit_are_refused():
    tuning = filled(zoo.build("llama"), fw.MemoryConfig(rank=2))
    prefix = tuning.bake()
    name = prefix.sites[0].name
    up = prefix.memory_up[name]
    for odd, said in ((up[:, :1], "the memory has shape"), (up[:, :, :-1], "the memory_up has shape"),
                      (up[:-1], "the memory_up has shape"), (up[0], "the memory has shape")):  # fmt: skip
        with pytest.raises(fw.MismatchError, match=said):
            replace(prefix, memory_up={**prefix.memory_up, name: odd})
    with pytest.raises(fw.MismatchError, match="expected both factors"):
        replace(prefix, memory={})


def test_a_memory_that_is_read_in_an_unknown_way_is_refused_when_it_is_loaded(tmp_path):
    import json

    model = zoo.build("llama")
    tuning = fw.attach(model, fw.MemoryConfig())
    tuning.save(tmp_path)
    tuning.detach()
    described = json.loads((tmp_path / "foreword.json").read_text())
    for name in ("activation", "queries"):
        recall = {**described["recall"], name: "swish"}
        (tmp_path / "foreword.json").write_text(json.dumps({**described, "recall": recall}))
        with pytest.raises(fw.PrefixFileError, match=f"memory's {name} is 'swish'"):
            fw.Prefix.load(tmp_path)
