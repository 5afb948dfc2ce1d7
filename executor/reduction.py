"""The gradients of a stage that several ranks hold: kept in flat buckets, reduced where the program says so."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.distributed as dist

from planner.basis.errors import RUN_FAILED, PlanError


def reduce_mean(flat: torch.Tensor, group: dist.ProcessGroup | None = None) -> None:
    """Replace a tensor by its mean over a group's ranks: what a run does with a bucket, and what the profiler times.

    Divided first, as DDP does, so that the sum of many halves does not overflow.
    """
    flat.div_(dist.get_world_size(group))
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
    take part is agreed on in the first reduction: those with a gradient on any rank, with zeros where a rank has none;
    what nobody uses keeps no gradient, as in one process, and is not updated. Every step has to use the same ones: an
    optimizer treats zeros otherwise than no gradient. `names` are those of the parameters in the model, by identity.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        group: dist.ProcessGroup,
        bucket_bytes: int,
        where: str,
        names: Mapping[int, str] | None = None,
    ) -> None:
        self.parameters, self.group, self.bucket_bytes, self.where = tuple(parameters), group, bucket_bytes, where
        self.names = names or {}
        self.unused = self.parameters
        self.flats: list[torch.Tensor] = []
        self.reached: set[int] = set()
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(self._note)

    def _note(self, parameter: torch.Tensor) -> None:
        self.reached.add(id(parameter))

    def reduce(self) -> None:
        """Reduce all gradients to their means, bucket by bucket.

        Raises `PlanError` (exit 6), with its name, when a parameter has a gradient in some steps only.
        """
        if not self.parameters:
            return
        first = not self.flats
        if first:
            self._agree()
        late = [parameter for parameter in self.unused if parameter.grad is not None]
        if late:
            raise self._refused(late[0], "had no gradient in the first step and has one now")
        for flat in self.flats:
            reduce_mean(flat, self.group)
        used = (p for p in self.parameters if p.grad is not None and id(p) not in self.reached)
        missing = None if first else next((p for p in used if not p.grad.any()), None)  # type: ignore[union-attr]
        if missing is not None:
            raise self._refused(missing, "had a gradient in the first step and has none now, on no replica")
        self.reached.clear()

    def _refused(self, parameter: torch.nn.Parameter, what: str) -> PlanError:
        return PlanError(
            what=f"the parameter {self.names.get(id(parameter), '')} {what}".replace("  ", " "),
            where=self.where,
            why="replicas agree in their first step on the gradients that they reduce, and a parameter without one is "
            "not updated: with other steps they would train another model than one process does",
            fix="use every parameter in every step, freeze it (requires_grad = False), or plan without replicas",
            code=RUN_FAILED,
        )

    def clear(self) -> None:
        """Set all gradients to zero; they stay where they are."""
        for flat in self.flats:
            flat.zero_()

    def _agree(self) -> None:
        used = torch.tensor([p.grad is not None for p in self.parameters], dtype=torch.uint8)
        used = used.to(self.parameters[0].device)
        dist.all_reduce(used, op=dist.ReduceOp.MAX, group=self.group)
        taking = used.tolist()
        self.unused = tuple(p for p, takes in zip(self.parameters, taking, strict=True) if not takes)
        mine = [p for p, takes in zip(self.parameters, taking, strict=True) if takes]
        self.flats = [_bucket(group) for group in _filled(reversed(mine), self.bucket_bytes)]


class Shared:
    """Parameters that several stages of one pipeline hold, on one of their ranks: `named` by their names in the model.

    All ranks of the group hold the same names; they start from the first one's values, and add up their gradients.
    """

    def __init__(self, named: dict[str, torch.nn.Parameter], group: dist.ProcessGroup) -> None:
        self.parameters = [named[name] for name in sorted(named)]
        self.group = group
        for parameter in self.parameters:
            dist.broadcast(parameter.detach(), group_src=0, group=group)

    def add_up(self) -> None:
        """Replace the gradients by their sums over the stages; what has none adds zeros."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad, group=self.group)


def _filled(parameters: Iterable[torch.nn.Parameter], bucket_bytes: int) -> Iterator[list[torch.nn.Parameter]]:
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


def _bucket(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    """Return a tensor of which the parameters' gradients are parts from now on."""
    flat = torch.zeros(sum(p.numel() for p in parameters), dtype=parameters[0].dtype, device=parameters[0].device)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        own = part.view_as(parameter)
        if parameter.grad is not None:
            own.copy_(parameter.grad)
        parameter.grad = own
    return flat
