"""The average of the weights against its closed form."""

import pytest
import torch
from torch import nn

from pipeline.ema import Ema


def test_the_average_is_the_weighted_sum_of_all_weights():
    """With decays d_1, d_2, ...: the start weighs their product, and weights k what follows k."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)).double()
    history = [[p.detach().clone() for p in model.parameters()]]
    ema = Ema(model, 0.5)
    for _ in range(12):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        model.train()(torch.randn(4, 5, dtype=torch.float64))  # moves the statistics
        ema.update(model)
        history.append([p.detach().clone() for p in model.parameters()])
    decays = [min(0.5, (1 + n) / (10 + n)) for n in range(1, 13)]
    assert decays[0] < 0.2 < 0.5 == decays[-1]
    shares = [
        (1 - decays[k - 1] if k else 1.0) * float(torch.tensor(decays[k:]).double().prod())
        for k in range(13)
    ]
    assert sum(shares) == pytest.approx(1)
    for i, mine in enumerate(ema.module.parameters()):
        expected = sum(share * weights[i] for share, weights in zip(shares, history, strict=True))
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-7)
    for own, other in zip(ema.module.buffers(), model.buffers(), strict=True):
        assert torch.equal(own, other)
    assert not any(p.requires_grad for p in ema.module.parameters())


def test_it_goes_on_where_it_was():
    torch.manual_seed(1)
    model = nn.Linear(4, 2)
    whole = Ema(model, 0.9)
    weights = [torch.randn_like(model.weight) for _ in range(6)]
    part = whole
    for step, value in enumerate(weights):
        model.weight.data.copy_(value)
        if step == 3:
            part = Ema(nn.Linear(4, 2), 0.9)
            part.restore(whole.module.state_dict(), whole.updates)
        whole.update(model)
        if part is not whole:
            part.update(model)
    assert torch.equal(part.module.weight, whole.module.weight)
