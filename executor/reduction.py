"""The gradients of a stage that several ranks hold: kept in flat buckets, reduced where the program says so."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist


def add_up(flat: torch.Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Replace a tensor by its sum over a group's ranks: what a run does with a bucket, and what the profiler times.

    Each rank's losses are parts of the whole step's mean, so a sum of gradients is that of one process, and overflows
    where that would.
    """
    dist.all_reduce(flat, group=group)


def start_alike(module: torch.nn.Module, group: dist.ProcessGroup) -> None:
    """Give a stage on all ranks of a group the parameters and buffers of the first, as DDP does.

    A model that draws its weights from a generator that nobody seeds is another one in every process.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        dist.broadcast(tensor.detach(), group_src=0, group=group)


class Buckets:
    """The gradients of one stage on one of the ranks that hold it.

    A parameter's gradient is a view of its bucket, so that nothing is copied: backwards add to it. Which parameters
    take part is agreed on in the first reduction: those with a gradient on any rank, with zeros where a rank has none.

        first bucket   gradients ... | a number for each parameter: has it a gradient here?

    The numbers are reduced with the gradients, so that all ranks know of each step what nobody uses: that has no
    gradient, as in one process, because an optimizer treats zeros otherwise (decay, momentum). What is used later than
    in the first step gets a bucket then.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], group: dist.ProcessGroup, bucket_bytes: int) -> None:
        self.parameters, self.group, self.bucket_bytes = tuple(parameters), group, bucket_bytes
        self.outside = self.parameters
        self.flats: list[torch.Tensor] = []
        self.views: dict[torch.nn.Parameter, torch.Tensor] = {}
        self.reached: set[int] = set()
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(self._note)

    def _note(self, parameter: torch.Tensor) -> None:
        self.reached.add(id(parameter))

    def added(self, work: Callable[[], object]) -> None:
        """Do work that adds to gradients behind autograd's back: notice to which."""
        before = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        work()
        for parameter, gradient in zip(self.parameters, before, strict=True):
            if parameter.grad is not None:
                self._note(parameter)
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else gradient.add_(parameter.grad)

    def reduce(self) -> None:
        """Add up all gradients over the ranks, bucket by bucket; what has none on any rank has none then."""
        if not self.parameters:
            return
        here = [id(parameter) in self.reached for parameter in self.parameters]
        self.reached.clear()
        if not self.flats:
            used = torch.tensor(here, dtype=torch.uint8, device=self.parameters[0].device)
            dist.all_reduce(used, op=dist.ReduceOp.MAX, group=self.group)
            self._take(used.tolist(), numbers=len(here))
        numbers = self.flats[0][-len(here) :]
        if all(here):
            numbers.fill_(1.0)
        else:
            numbers.copy_(torch.tensor(here, dtype=numbers.dtype))
        for flat in self.flats:
            add_up(flat, self.group)
        if all(here) and not self.outside:
            return  # whatever others have: nobody waits for the device to say the numbers
        anywhere = (numbers > 0).tolist()
        for flat in self._take(anywhere):
            add_up(flat, self.group)
        for parameter, used_somewhere in zip(self.parameters, anywhere, strict=True):
            if not used_somewhere:
                parameter.grad = None

    def clear(self) -> None:
        """Set all gradients to zero, in their places."""
        for flat in self.flats:
            flat.zero_()
        for parameter in self.parameters:
            parameter.grad = self.views.get(parameter)

    def _take(self, used: list[bool], numbers: int = 0) -> list[torch.Tensor]:
        """Make buckets of those that are used and have none, the first of all with room for numbers."""
        outside, wanted = set(self.outside), dict(zip(self.parameters, used, strict=True))
        groups = list(filled((p for p in reversed(self.parameters) if p in outside and wanted[p]), self.bucket_bytes))
        self.outside = tuple(p for p in self.outside if not wanted[p])
        if numbers and not groups:
            groups = [[]]
        kind = self.parameters[0]
        made = [bucket(own, numbers if own is groups[0] else 0, kind) for own in groups]
        for flat, views in made:
            self.flats.append(flat)
            self.views |= views
        return [flat for flat, _ in made]


class Shared:
    """Parameters that several stages of one pipeline hold: on one of their ranks, of which `held` has each own stage's.

    All stages hold the same names; they start from the first one's values, and add up their gradients. `group` joins
    the ranks where there are several: of each stage as many as `holders`, which have added up theirs.
    """

    def __init__(
        self,
        held: Sequence[Mapping[str, torch.nn.Parameter]],
        group: dist.ProcessGroup | None,
        holders: Sequence[int],
    ) -> None:
        self.copies = [[own[name] for own in held] for name in sorted(held[0])]
        self.group, self.holders = group, holders
        for first, *others in self.copies:
            if group is not None:
                dist.broadcast(first.detach(), group_src=0, group=group)
            for other in others:
                other.detach().copy_(first.detach())

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """All copies on this rank."""
        return [parameter for copies in self.copies for parameter in copies]

    def add_up(self) -> None:
        """Replace the gradients by their sums over the stages; what has none adds zeros."""
        for copies in self.copies:
            for parameter in copies:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            first, *others = (parameter.grad for parameter in copies if parameter.grad is not None)
            for gradient, count in zip((first, *others), self.holders, strict=True):
                if count > 1:
                    gradient.div_(count)
            for other in others:
                first.add_(other)
            if self.group is not None:
                dist.all_reduce(first, group=self.group)
            for other in others:
                other.copy_(first)


def filled(parameters: Iterable[torch.nn.Parameter], bucket_bytes: int) -> Iterator[list[torch.nn.Parameter]]:
    """Group parameters until each group has `bucket_bytes` (0: all of them) of one dtype, in the order given."""
    filled: list[torch.nn.Parameter] = []
    for parameter in parameters:
        full = bucket_bytes and sum(p.nbytes for p in filled) >= bucket_bytes
        if filled and (full or parameter.dtype != filled[0].dtype):
            yield filled
            filled = []
        filled.append(parameter)
    if filled:
        yield filled


def bucket(
    parameters: list[torch.nn.Parameter], more: int, like: torch.Tensor | None = None
) -> tuple[torch.Tensor, dict[torch.nn.Parameter, torch.Tensor]]:
    """Return a tensor of which the parameters' gradients are parts from now on, with room for some `more` numbers."""
    like = parameters[0] if parameters or like is None else like
    sizes = [p.numel() for p in parameters]
    flat = torch.zeros(sum(sizes) + more, dtype=like.dtype, device=like.device)
    views = {}
    for parameter, part in zip(parameters, flat[: sum(sizes)].split(sizes) if sizes else (), strict=True):
        own = part.view_as(parameter)
        if parameter.grad is not None:
            own.copy_(parameter.grad)
        parameter.grad = views[parameter] = own
    return flat, views
