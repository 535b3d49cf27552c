"""Half precision by autocast: the matrix products are narrow, what is trained stays in 32 bits."""

from __future__ import annotations

import pytest
import tiny
import torch

import zoo


def test_bf16_through_the_trainer_trains_a_prefix_in_float32(tmp_path):
    losses = {}
    for narrow in (False, True):
        torch.manual_seed(0)
        model, tuning = tiny.tuned()
        before, seen = tiny.base_weights(model), set()
        model.model.layers[0].mlp.up_proj.register_forward_hook(lambda m, a, out, seen=seen: seen.add(out.dtype))
        made = tiny.trainer(model, tmp_path / str(narrow), bf16=narrow, max_steps=20, learning_rate=0.05)
        made.train()
        losses[narrow] = list(tiny.losses(made).values())
        assert seen == {torch.bfloat16 if narrow else torch.float32}
        assert all(p.dtype == torch.float32 for p in tuning.parameters())
        states = made.optimizer.state.values()
        assert {s["exp_avg"].dtype for s in states} == {torch.float32}
        tiny.assert_base_unchanged(model, before)
    assert losses[True] == pytest.approx(losses[False], abs=0.1) and losses[True] != losses[False]
    assert losses[True][-1] < losses[True][0] - 0.2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reparam", ["direct", "mlp"])
def test_gradients_under_autocast_are_float32_and_those_of_full_precision(dtype, reparam):
    found = []
    for narrow in (False, True):
        model, tuning = tiny.tuned(reparam=reparam, hidden=16)
        ids = zoo.ids(4, 9)
        with torch.autocast("cpu", dtype, enabled=narrow):
            loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in tuning.parameters())
        found.append(torch.cat([p.grad.flatten() for p in tuning.parameters()]))
    error = (found[1] - found[0]).norm() / found[0].norm()
    assert 1e-5 < error < (0.1 if dtype is torch.bfloat16 else 0.02)
