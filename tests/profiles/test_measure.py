"""What the profiler counts, against what can be counted by hand; times are only required to be there."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from executor import devices
from executor.layers import cut
from executor.model_file import ModelFile, load
from executor.torch_adapter import halves
from executor.user_code import default_loss, default_optimizer
from planner.values.profile import LayerSizes
from profiles.chain import Chain
from profiles.kinds import every
from profiles.passes import InPlace
from profiles.sizes import Static, measure_sizes, measure_static
from profiles.times import EXTRA_COST, LayerTimer
from profiles.watch import WHOLE, Budget, Setting, Stopwatch

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
    values = every(chain.layered).values(chain.layered, by_size)
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
    timer = LayerTimer(InPlace(chain, devices.Cpu(), Stopwatch(devices.Cpu())), [1], [2, 4], ignored, every=True)
    timer.run(Budget(1e6), 1e6)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    (times,) = timer.layer(0)
    kinds = (times.forward, times.backward, times.backward_weight, times.recompute)
    assert all(t.median_s > 0 for timings in kinds for t in timings)
    assert all(t.low_s <= t.lower_s <= t.median_s <= t.upper_s <= t.high_s for ts in kinds for t in ts)
    assert times.optimizer.median_s > 0
    assert {w.samples for w in timer.whole(range(3))} == {2, 4}
    assert timer.noise() >= 0
    assert timer.derived == ()


def ignored(done: int, of: int) -> None:
    """Progress that nobody sees."""


class ByHand:
    """Passes on a clock by hand: a pass takes `seconds(samples)` with 2 threads and twice that with one."""

    def __init__(
        self, seconds: Callable[[int], float], interrupt_at: float = float("inf"), needs_data: bool = True
    ) -> None:
        self.chain = chain_of(nn.Sequential(nn.Linear(2, 2)), 2)
        self.watch = Stopwatch(devices.Cpu())
        self.sizes: dict[int, list[LayerSizes]] = {}
        self.values: dict[int, dict[str, tuple[int, bool]]] = {}
        self.now, self.seconds, self.interrupt_at = 0.0, seconds, interrupt_at
        self.needs_data = needs_data
        self.longest, self.passes = 0.0, list[tuple[Setting, bool]]()

    def static(self) -> list[Static]:
        return []

    def _take(self, seconds: float) -> None:
        self.now, self.longest = self.now + seconds, max(self.longest, seconds)
        if self.now > self.interrupt_at:
            raise KeyboardInterrupt

    def count(self, samples: int) -> None:
        self._take(2 * self.seconds(samples))
        self.sizes[samples], self.values[samples] = [], {}

    def reckon(self, samples: int) -> bool:
        if self.needs_data:
            return False
        self._take(0.01)
        self.sizes[samples], self.values[samples] = [], {}
        return True

    def timed(self, setting: Setting, *, extra: bool) -> None:
        threads, samples = setting
        took = self.seconds(samples) * 2 / threads
        self._take(took * (EXTRA_COST if extra else 1))
        self.watch.setting = setting
        kinds = ["forward", "backward", *(["backward_input", "backward_weight", "recompute"] if extra else [])]
        for part in (WHOLE, 0):
            for kind in kinds:
                self.watch.note(part, kind, 0, int(took / 2 * 1e9))
        self.passes.append((setting, extra))


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[LayerTimer, ByHand]]:
    """Runs a timer over 1 to 64 samples, with 2 threads and 1."""

    def run(
        seconds: Callable[[int], float], budget_s: float, sample_s: float = 0.0, **more: Any
    ) -> tuple[LayerTimer, ByHand]:
        passes = ByHand(seconds, **more)
        monkeypatch.setattr("profiles.watch.time.monotonic", lambda: passes.now)
        told: list[int] = []
        timer = LayerTimer(
            passes, [2, 1], [2**i for i in range(7)], lambda done, of: told.append(done), sample_s=sample_s
        )
        timer.run(Budget(budget_s), budget_s)
        assert told == sorted(told)
        return timer, passes

    return run


Timed = Callable[..., tuple[LayerTimer, ByHand]]


@pytest.mark.parametrize("budget_s", [0.0, 0.5, 1.0, 2.0, 5.0, 20.0, 100.0, 1000.0])
@pytest.mark.parametrize("bent", [False, True])
def test_a_budget_is_a_bound(by_hand: Timed, budget_s: float, bent: bool) -> None:
    """It is overdrawn by one pass at most; one pass at the smallest size is done whatever it takes."""
    timer, passes = by_hand(lambda n: 0.02 * n**1.5 if bent else 0.1 + 0.02 * n, budget_s)
    least = 3 * passes.seconds(1)
    assert passes.now <= max(budget_s, least) + passes.longest
    assert timer.rounds >= 1
    assert timer.looked_at[0] == 1
    assert sorted((*timer.looked_at, *timer.between, *timer.left_out)) == timer.sizes
    assert set(passes.sizes) >= {1, 2, *timer.looked_at}, "bytes of one size alone would say nothing about others"
    (two, one) = timer.layer(0)
    assert (two.threads, one.threads) == (2, 1)
    assert one.forward[0].median_s == pytest.approx(2 * two.forward[0].median_s)
    assert all(t.median_s > 0 for times in (one, two) for t in (*times.backward_input, *times.recompute))


def test_a_longer_budget_looks_at_more_sizes(by_hand: Timed) -> None:
    largest = [by_hand(lambda n: 0.02 * n, budget_s)[0].looked_at[-1] for budget_s in (0.1, 1.0, 5.0, 20.0, 1000.0)]
    assert largest == sorted(largest)
    assert (largest[0], largest[-1]) == (1, 64)


def test_sizes_are_chosen_where_curves_bend(by_hand: Timed) -> None:
    """A line needs its ends and its middle; a kink is looked for by halving."""
    timer, _ = by_hand(lambda n: 0.1 + 0.02 * n, 60.0)
    assert timer.looked_at == [1, 2, 16, 64]
    assert timer.between == (4, 8, 32)
    timer, _ = by_hand(lambda n: 0.1 + 0.02 * n + (0.2 * (n - 16) if n > 16 else 0.0), 450.0)
    assert timer.looked_at == [1, 2, 8, 16, 32, 64]
    timer, _ = by_hand(lambda n: 0.1 + 0.02 * n, 1000.0)
    assert timer.looked_at == timer.sizes, "where there is time, none is left out"


def test_what_was_not_run_is_said(by_hand: Timed) -> None:
    timer, passes = by_hand(lambda n: 1.0, 0.0)
    assert passes.passes == [((2, 1), False)]
    threads, halves_ = timer.derived
    assert "1 threads follow from those with 2" in threads
    assert "halves" in halves_
    two = timer.layer(0)[0]
    assert two.backward_input[0].median_s == pytest.approx(0.8 * two.backward[0].median_s)
    assert timer.left_out == (2, 4, 8, 16, 32, 64)


def test_bytes_are_counted_of_sizes_that_there_is_no_time_to_look_at(by_hand: Timed) -> None:
    """A look at 1 takes 14 s, of which counting is 2; half of the budget is for looks."""
    timer, passes = by_hand(lambda n: 1.0 * n, 80.0)
    assert timer.looked_at == [1]
    assert sorted(passes.sizes) == [1, 2, 4]


def test_bytes_of_a_slow_model_are_counted_without_data(by_hand: Timed) -> None:
    """Where a pass takes as long as the budget, one pass and hardly more is run; quick models are counted as ever."""
    timer, passes = by_hand(lambda n: 30.0 * n, 30.0, needs_data=False, sample_s=30.0)
    assert passes.passes == [((2, 1), False)]
    assert passes.now < 30.0 + 1.0
    assert sorted(passes.sizes) == timer.sizes
    assert "bytes of 1, 2, 4, 8, 16, 32, 64 samples were counted without computing: peaks are" in timer.derived[-1]
    timer, _ = by_hand(lambda n: 1.0 * n, 80.0, needs_data=False, sample_s=1.0)
    assert timer.reckoned == [8, 16, 32, 64], "after 1, 2 and 4 with data, as far as a share of the budget reaches"
    assert "peaks follow those of 4" in timer.derived[-1]
    timer, _ = by_hand(lambda n: 0.01 * n, 80.0, needs_data=False, sample_s=0.01)
    assert timer.reckoned == []


def test_sizes_that_memory_does_not_hold_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer of 4 numbers per sample, and a loss of one: there is room for twice what 8 samples take."""
    chain = chain_of(nn.Sequential(nn.Linear(4, 4)), 4)
    passes = InPlace(chain, devices.Cpu(), Stopwatch(devices.Cpu()))
    monkeypatch.setattr("profiles.times.MAX_ROUNDS", 1)
    timer = LayerTimer(passes, [1], [1, 2, 4, 8, 16, 32], ignored, every=True, room_bytes=2 * (8 * 16 + 4))
    timer.run(Budget(1e6), 1e6)
    assert (timer.looked_at, sorted(passes.sizes)) == ([1, 2, 4, 8, 16], [1, 2, 4, 8, 16])
    assert timer.derived == ("32 samples would take more memory than there is",)


def test_bytes_of_two_sizes_are_counted_of_a_model_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = ByHand(lambda n: 1.0)
    monkeypatch.setattr("profiles.watch.time.monotonic", lambda: passes.now)
    timer = LayerTimer(passes, [1], [1], ignored)
    timer.run(Budget(100.0), 100.0)
    assert (sorted(passes.sizes), timer.looked_at) == ([1, 2], [1])


def test_an_interrupted_timer_has_what_it_measured(by_hand: Timed) -> None:
    timer, passes = by_hand(lambda n: 0.02 * n, 1000.0, interrupt_at=30.0)
    assert timer.interrupted
    assert timer.rounds == min(
        sum(setting == other for other, _ in passes.passes) for setting in {setting for setting, _ in passes.passes}
    )
    with pytest.raises(KeyboardInterrupt):
        by_hand(lambda n: 1.0, 1000.0, interrupt_at=1.0)


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
        first, second, _ = halves([output], [torch.ones_like(output)], [x], list(layer.parameters()))
        first()
        assert layer.weight.grad is None
        second()
        if not output._is_view():
            assert all(
                torch.equal(a, b)
                for a, b in zip(expected, [x.grad, layer.weight.grad, layer.bias.grad], strict=True)  # type: ignore[arg-type]
            )


def test_halves_of_what_is_used_again_give_its_gradients() -> None:
    """Layers with others between their calls, a weight of two layers with their own biases, an output that is read."""
    block = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))
    first_bias, bias, weight = (nn.Parameter(torch.randn(*shape)) for shape in ((4,), (4,), (4, 4)))

    def shared(x: torch.Tensor) -> list[torch.Tensor]:
        return [nn.functional.linear(nn.functional.linear(x, weight, first_bias).tanh(), weight, bias)]

    def passed_on(x: torch.Tensor) -> list[torch.Tensor]:
        made = block[0](x)
        return [block[2](made), made]

    for forward, parameters in (
        (lambda x: [block(block(x))], [*block.parameters()]),
        (shared, [first_bias, bias, weight]),
        (passed_on, [*block.parameters()]),
    ):
        x = torch.randn(3, 4, requires_grad=True)
        wanted = [x, *parameters]
        expected = torch.autograd.grad(sum(one.sum() for one in forward(x)), wanted)  # type: ignore[arg-type]
        for tensor in wanted:
            tensor.grad = None
        outputs = forward(x)
        first, second, _ = halves(outputs, [torch.ones_like(one) for one in outputs], [x], list(parameters))
        first()
        assert all(parameter.grad is None for parameter in parameters)
        second()
        for tensor, gradient in zip(wanted, expected, strict=True):
            torch.testing.assert_close(tensor.grad, gradient)


def test_waiting_for_a_core_is_noticed() -> None:
    """Who sleeps has no core, as who is kept from it."""
    watch = Stopwatch(devices.Cpu())
    assert (watch.waiting, watch.cores((2, 1))) == (0.0, 2)
    watch.setting = 2, 1
    with watch.around(0, "forward"):
        time.sleep(0.05)
    assert watch.waiting > 0.5
    assert watch.cores((2, 1)) < 0.5
    assert watch.cores((1, 1)) == 1


def test_one_thread_is_tried_where_two_have_waited_for_each_other(by_hand: Timed) -> None:
    """In proportion a pass of one thread would take 4 s of 3; what two of them have computed says that it is short."""
    timer, _ = by_hand(lambda n: 2.0 if n == 1 else 1e9, 3.0)
    assert {threads for threads, _ in timer.measured} == {2}
    timer.watch.watched[2, 1] = [2.0, 0.1]
    assert timer._expected((1, 1), extra=False) == pytest.approx(0.1)
    assert timer._expected((2, 2), extra=False) == pytest.approx(4.0)
