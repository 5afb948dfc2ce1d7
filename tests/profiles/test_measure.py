"""What the profiler counts, against what can be counted by hand; times are only required to be there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from executor import devices
from executor.layers import cut
from executor.model_file import ModelFile, load
from executor.torch_adapter import halves
from executor.user_code import default_loss, default_optimizer
from profiles.chain import Chain
from profiles.sizes import measure_sizes, measure_static, values_of
from profiles.times import LayerTimer

MODELS = Path(__file__).parent.parent / "executor" / "small_models.py"
FLOAT = 4


def chain_of(model: nn.Module, width: int) -> Chain:
    file = ModelFile(
        path="by hand",
        model=lambda: model,
        batch=lambda n: (torch.randn(n, width), torch.randn(n, width)),
        loss=default_loss,
        optimizer=default_optimizer,
        layers=None,
        batch_size=8,
    )
    return Chain(file, cut(file, model), torch.device("cpu"))


def test_static_bytes() -> None:
    chain = chain_of(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.BatchNorm1d(16), nn.Linear(16, 8)), 8)
    linear, relu, norm, _ = measure_static(chain, devices.Cpu())
    parameters = (8 * 16 + 16) * FLOAT
    assert (linear.parameter_bytes, linear.gradient_bytes) == (parameters, parameters)
    assert linear.optimizer_bytes == 2 * parameters + 2 * FLOAT, "AdamW: two moments, and a step count per parameter"
    assert (relu.parameter_bytes, relu.optimizer_bytes) == (0, 0)
    assert norm.buffer_bytes == 2 * 16 * FLOAT + 8, "running mean and variance, and a count of batches"


def test_saved_bytes_count_every_storage_once_and_no_parameter() -> None:
    """A linear layer saves its input (the ReLU's output, which the ReLU saves too), not its weight."""
    chain = chain_of(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)), 8)
    (first, relu, last, loss), values = measure_sizes(chain, devices.Cpu(), 4)
    assert (first.saved_bytes, first.output_bytes, first.output_saved) == (0, 4 * 16 * FLOAT, False)
    assert (relu.saved_bytes, relu.output_bytes, relu.output_saved) == (0, 4 * 16 * FLOAT, True)
    assert (last.output_bytes, last.output_saved) == (4 * 8 * FLOAT, True), "the loss saves the outputs"
    assert loss.saved_bytes == 0, "the targets are input"
    assert first.forward_peak_bytes == 4 * 16 * FLOAT
    assert first.flop == 2 * 4 * 8 * 16
    assert values["v0"] == (4 * 16 * FLOAT, True)


def test_backward_peaks() -> None:
    """The first backward allocates the gradients; later ones need as much for a moment, to add it."""
    chain = chain_of(nn.Sequential(nn.Linear(64, 64)), 64)
    (linear, _), _ = measure_sizes(chain, devices.Cpu(), 2)
    gradients = (64 * 64 + 64) * FLOAT
    assert gradients <= linear.backward_first_peak_bytes <= gradients + 4 * 2 * 64 * FLOAT
    assert 64 * 64 * FLOAT <= linear.backward_peak_bytes <= gradients + 4 * 2 * 64 * FLOAT


def test_skips_are_values_with_bytes() -> None:
    file = load(f"{MODELS}:skips")
    chain = Chain(file, cut(file, file.build(0)), torch.device("cpu"))
    by_size = {n: measure_sizes(chain, devices.Cpu(), n)[1] for n in (2, 4)}
    values = values_of(chain, by_size)
    skip = next(v for v in values if v.source == 0)
    assert skip.targets == (1, 2)
    assert skip.bytes_at == ((2, 2 * 8 * FLOAT), (4, 4 * 8 * FLOAT))
    assert skip.gradient
    assert not next(v for v in values if v.source == -1).gradient, "the inputs are data"


def test_measuring_changes_nothing() -> None:
    """Weights, batch-norm statistics and gradients are what they were; every time is there."""
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 8))
    chain = chain_of(model, 8)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    measure_sizes(chain, devices.Cpu(), 4)
    timer = LayerTimer(chain, devices.Cpu(), [(1, 2), (1, 4)], lambda done, of: None)
    timer.run(0.0)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    (times,) = timer.layer(0)
    kinds = (times.forward, times.backward, times.backward_weight, times.recompute)
    assert all(t.median_s > 0 for timings in kinds for t in timings)
    assert all(t.low_s <= t.lower_s <= t.median_s <= t.upper_s <= t.high_s for ts in kinds for t in ts)
    assert times.optimizer.median_s > 0
    assert {w.samples for w in timer.whole()} == {2, 4}
    assert timer.noise() >= 0


@pytest.mark.parametrize(
    ("budget_s", "sizes"), [(0.0, 3), (1.0, 3), (2.0, 3), (4.0, 4), (10.0, 5), (20.0, 6), (200.0, 6)]
)
def test_a_budget_is_kept(monkeypatch: pytest.MonkeyPatch, budget_s: float, sizes: int) -> None:
    """On a clock by hand: a pass takes 0.02 s per sample, and 0.1 s with what only some plans need.

    The first looks at 1, 2 and 4 samples, 0.12 s each per sample, are taken in any case: 0.84 s. That at 8 ends at 1.8,
    at 16 at 3.72, at 32 at 7.56 s: each within half of the budget, or not taken. A second pass of each takes a sixth.
    """
    now, measured = 0.0, tuple(2**i for i in range(sizes))
    passes: list[tuple[int, bool]] = []

    def passed(self: LayerTimer, setting: tuple[int, int], *, extra: bool = False) -> None:
        nonlocal now
        now += setting[1] * (0.1 if extra else 0.02)
        passes.append((setting[1], extra))

    monkeypatch.setattr(LayerTimer, "_pass", passed)
    monkeypatch.setattr("profiles.times.time.monotonic", lambda: now)
    settings = [(1, 2**i) for i in range(6)]
    told: list[int] = []
    timer = LayerTimer(
        chain_of(nn.Sequential(nn.Linear(2, 2)), 2), devices.Cpu(), settings, lambda done, of: told.append(done)
    )
    timer.run(budget_s)
    assert tuple(samples for _, samples in timer.settings) == measured
    assert now <= max(budget_s, 0.84 * 7 / 6) + 1e-9
    assert all(passes.count((n, True)) >= 1 and passes.count((n, False)) >= 2 for n in measured), "one warms up"
    assert told == sorted(told)
    assert not {samples for samples, _ in passes} - set(measured), "nothing is spent on what is left out"


def test_chain_computes_the_gradients_of_the_model() -> None:
    """The seams change nothing: forward and backward through them give the gradients of the whole."""
    file = load(f"{MODELS}:skips")
    model = file.build(0)
    chain = Chain(file, cut(file, model), torch.device("cpu"))
    inputs, targets = chain.draw(4)

    def plain(part: int, kind: str) -> torch.no_grad:
        return torch.enable_grad()  # type: ignore[return-value]

    chain.backward(chain.forward(inputs, targets, plain), plain)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    file.loss(model(*inputs), targets).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], parameter.grad)


def test_a_profile_needs_three_sizes() -> None:
    from planner.basis.errors import PlanError
    from profiles.measure import measure

    with pytest.raises(PlanError, match="three"):
        measure(str(MODELS), device="cpu", sizes=[1, 2], budget_s=1, progress=lambda what, done, of: None)


def test_halves_of_a_backward_give_its_gradients() -> None:
    """As the executor's stages run them, apart: together they are the backward, with views and without."""
    for make in (lambda x: x * 2, lambda x: (x * 2).view(-1, 2, 3)):
        layer = nn.Linear(4, 6)
        x = torch.randn(3, 4, requires_grad=True)

        def forward(x: torch.Tensor = x, layer: nn.Module = layer, make: object = make) -> torch.Tensor:
            return make(torch.relu(layer(x)))  # type: ignore[operator]

        forward().backward(torch.ones_like(forward()))
        expected = [x.grad, layer.weight.grad, layer.bias.grad]
        x.grad = layer.weight.grad = layer.bias.grad = None
        output = forward()
        first, second = halves([output], [torch.ones_like(output)], [x], list(layer.parameters()))
        first()
        assert layer.weight.grad is None
        second()
        if not output._is_view():
            assert all(
                torch.equal(a, b)
                for a, b in zip(expected, [x.grad, layer.weight.grad, layer.bias.grad], strict=True)  # type: ignore[arg-type]
            )
