"""Layers of a captured model: where its graph is cut, and every piece of it as a module.

The graph is cut at the borders of the model's own modules: between all children of the model, and between the entries
of lists (`nn.Sequential`, `nn.ModuleList`) inside them as long as no more values with gradients pass there than around
the module: a block's residual and its branch are not parted. What follows a child belongs to it. Frozen modules are cut
as they would be unfrozen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx, nn

from executor.capture import Captured
from executor.layer import Layer
from executor.opaque import OPAQUE
from executor.statistics import changed_by, together, written

SAMPLES = "samples"
"""The name under which a layer asks for the batch size."""

LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


@dataclass(eq=False)
class Call:
    """One call of a module: its path in the model, and the steps [start, stop) that run inside it."""

    path: str
    start: int
    stop: int = 0
    calls: list[Call] = field(default_factory=list)


class Cutter:
    """Cuts one captured model."""

    def __init__(self, captured: Captured, model: nn.Module) -> None:
        self.captured, self.model, self.steps = captured, model, captured.steps
        self.place = {node: i for i, node in enumerate(self.steps)}
        self.last = {node: self._last(node) for node in (*captured.inputs, *self.steps)}
        self.end, self.late = self._loss()
        self.whole = together(map(self._changed, self.steps))
        self.count = [0] * (len(self.steps) + 1)
        for node in captured.grown & self.place.keys():
            for cut in range(self.place[node] + 1, self.last[node] + 1):
                self.count[cut] += 1
        behind = {node: len(self.steps) for node in captured.wanted if node in self.last}
        self.last |= behind  # it passes wherever one cuts, and says nothing about where to

    def _changed(self, node: fx.Node) -> list[int]:
        """The identities of what a step changes of the model."""
        if node.target is OPAQUE:
            number: Any = node.args[2]
            return [id(tensor) for tensor in changed_by(self.captured.opaque.calls[number])]
        held = self.captured.held
        return [id(held[target][1]) for target in written(node) if target in held]

    def _last(self, node: fx.Node) -> int:
        """The last step that reads a value; behind all of them for the loss."""
        if node is self.captured.loss:
            return len(self.steps)
        return max((self.place[user] for user in node.users if user in self.place), default=-1)

    def _loss(self) -> tuple[int, tuple[fx.Node, ...]]:
        """Where the loss begins, and which inputs it alone reads.

        A model that has its loss itself computes it behind its last module, from inputs that nobody reads before.
        """
        behind = next((i for i, node in enumerate(self.steps) if not self.captured.calls(node)), len(self.steps))
        own = behind
        while own and len(self.captured.calls(self.steps[own - 1])) == 1:
            own -= 1
        first = {
            node: min((self.place[u] for u in node.users if u in self.place), default=-1)
            for node in self.captured.inputs
        }
        late = tuple(node for node, at in first.items() if at >= own) if own else ()
        begin = min((first[node] for node in late), default=behind)
        trained = self.captured.held.keys() & self.captured.trained
        if any(arg in trained for node in self.steps[begin:behind] for arg in node.all_input_nodes):
            return behind, ()
        return begin, late

    def calls(self) -> Call:
        """Return the model's own call with all calls inside it, as far as the loss."""
        whole = Call("", 0, self.end)
        open_: list[tuple[str, Call]] = []
        for i, node in enumerate(self.steps[: self.end]):
            stack = self.captured.calls(node)[1:]
            same = 0
            while same < min(len(open_), len(stack)) and open_[same][0] == stack[same][0]:
                same += 1
            del open_[same:]
            for call, path in stack[same:]:
                inside = open_[-1][1] if open_ else whole
                inside.calls.append(Call(path, i))
                open_.append((call, inside.calls[-1]))
            for _, inner in open_:
                inner.stop = i + 1
        return whole

    def cuts(self) -> list[tuple[int, str]]:
        """Return where layers begin, and their names: of the first module inside that has parameters."""
        found: dict[int, list[str]] = {}
        for start, path in self._inside(self.calls(), root=True):
            found.setdefault(start, []).append(path)
        places: list[tuple[int, list[str]]] = [(0, [])]
        for at, paths in sorted(found.items()):
            if at and self.possible(at):
                places.append((at, []))
            places[-1][1].extend(reversed(paths))  # the innermost first
        names: dict[str, int] = {}
        return [(at, self._named(paths, names)) for at, paths in places]

    def _named(self, paths: list[str], names: dict[str, int]) -> str:
        def holds(path: str) -> bool:
            return any(True for _ in self.model.get_submodule(path).parameters())

        path = next(filter(holds, paths), next(iter(paths), type(self.model).__name__.lower()))
        names[path] = names.get(path, -1) + 1
        return f"{path}@{names[path]}" if names[path] else path

    def _inside(self, call: Call, *, root: bool = False) -> Iterator[tuple[int, str]]:
        """Yield where the layers inside a call begin: none where it stays whole."""
        context = self._context(call)
        widest = max(self.width(call.start, context), self.width(call.stop, context))

        def narrow(cut: int) -> bool:
            return root or self.width(cut, context) <= widest

        inner = [one for one in call.calls if narrow(one.start)]
        opened = {id(one): list(self._inside(one)) for one in inner if narrow(one.stop)}
        listed = [one for one in call.calls if isinstance(self._parent(one.path), LISTS)]
        chain = len(listed) > 1 and all(narrow(one.start) for one in listed)  # branches of a list are no chain
        if not root and not chain and (listed or not any(opened.values())):
            return
        for one in inner:
            yield one.start, one.path
            yield from opened.get(id(one), ())

    def _context(self, call: Call) -> frozenset[fx.Node]:
        """What several of a call's inner calls read (a mask, an encoder's output): it passes wherever they are cut."""
        readers: dict[fx.Node, set[int]] = {}
        for number, inner in enumerate(call.calls):
            for node in self.steps[inner.start : inner.stop]:
                for arg in node.all_input_nodes:
                    if self.place.get(arg, inner.start) < inner.start:
                        readers.setdefault(arg, set()).add(number)
        return frozenset(node for node, numbers in readers.items() if len(numbers) > 2)

    def width(self, cut: int, context: frozenset[fx.Node] = frozenset()) -> int:
        """Return how many values pass a cut that have gradients, or would unfrozen, what is `context` aside."""
        return self.count[cut] - sum(
            node in self.captured.grown and self.place[node] < cut <= self.last[node] for node in context
        )

    def _parent(self, path: str) -> nn.Module:
        return self.model.get_submodule(path.rpartition(".")[0])

    def possible(self, cut: int) -> bool:
        """Whether stages can meet here: something that layers have made passes, all tensors; one tells the batch size.

        No statistics may be changed on both sides (`executor.statistics`). Where values that pass share memory into
        which is written behind the cut, it must be that of one of them alone.
        """
        if cut in self.whole:
            return False
        passing = self.passing(cut)
        if not self.count[cut] or not all(isinstance(node.meta.get("val"), torch.Tensor) for node in passing):
            return False
        owners = [self.captured.owner.get(node, node) for node in passing]
        later = {owner for node, owner in self.captured.changed.items() if self.place.get(node, -1) >= cut}
        if any(owners.count(owner) > 1 for owner in later):
            return False
        return any(self.batched(node) for node in passing)

    def batched(self, node: fx.Node) -> tuple[int, int] | None:
        """Return which dimension of a value is a multiple of the batch size, and which multiple."""
        batch = self.captured.batch
        value = node.meta.get("val")
        for dim, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            if isinstance(size, torch.SymInt) and batch is not None:
                factor = sympy.simplify(size.node.expr / batch)
                if factor.is_Integer:
                    return dim, int(factor)
        return None

    def passing(self, cut: int) -> list[fx.Node]:
        """Return the values that are made before a cut and read behind it."""
        early = [node for node in self.captured.inputs if node not in self.late]
        return [node for node in (*early, *self.steps[:cut]) if self.last[node] >= cut]

    def layers(self) -> list[Layer]:
        """Return the model's layers; the last one's outputs are what the loss reads."""
        cuts = self.cuts()
        bounds = [*(at for at, _ in cuts), self.end]
        found = []
        for (start, name), stop in zip(cuts, bounds[1:], strict=True):
            nodes = self.steps[start:stop]
            behind = self.passing(stop) or [self.captured.loss]
            made = behind if stop == self.end else [node for node in nodes if self.last[node] >= stop]
            found.append(self._layer(name, nodes, self._read(nodes, made), made))
        return found

    def loss(self) -> Layer:
        """Return the loss as a layer that reads what the last one makes, and then the targets; and what is wanted."""
        loss = self.captured.loss
        targets = (*self.late, *self.captured.targets)
        taken = [*(self.passing(self.end) or [loss]), *targets]
        return self._layer("loss", self.steps[self.end :], taken, [loss, *self.captured.wanted])

    def _read(self, nodes: Iterable[fx.Node], made: list[fx.Node]) -> list[fx.Node]:
        """Return the values of other layers that nodes read, or that pass among what they make."""
        inside = set(nodes)
        read = dict.fromkeys([*(arg for node in nodes for arg in node.all_input_nodes), *made])
        return [node for node in read if node not in inside and (node in self.place or node in self.captured.inputs)]

    def _layer(self, name: str, nodes: Iterable[fx.Node], taken: list[fx.Node], made: list[fx.Node]) -> Layer:
        inside, owner = set(nodes), self.captured.owner
        builder = _Builder(self.captured)
        module = builder.build(nodes, taken, made)
        changed = {of for node, of in self.captured.changed.items() if node in inside}
        return Layer(
            name=name,
            module=module,
            inputs=tuple(node.name for node in taken),
            outputs=tuple(node.name for node in made),
            ambient=tuple(builder.ambient),
            changes=tuple(node.name for node in taken if owner.get(node, node) in changed),
        )

    def ambient(self, names: Iterable[str]) -> fx.GraphModule:
        """Return a module from the batch size to some ambient tensors, by name."""
        by_name = {node.name: node for node in self.captured.ambient}
        builder = _Builder(self.captured, alone=True)
        return builder.build([], [], [by_name[name] for name in names])


def size_of(batch: Any, expression: Any) -> Callable[[int], Any]:
    """Return the function from the batch size to a number that follows from it."""
    of = sympy.lambdify([batch], expression, "math")
    whole = bool(getattr(expression, "is_integer", False))

    def size(samples: int) -> Any:
        return int(of(samples)) if whole else of(samples)

    size.__doc__ = f"{_SIZE}{expression}"
    return size


_SIZE = "From the batch size: "


def expression_of(function: Any) -> str:
    """Return what a function from the batch size computes, as text; "" for any other."""
    words = getattr(function, "__doc__", None) or ""
    return words if words.startswith(_SIZE) else ""


class _Builder:
    """Copies nodes into a graph of their own. `ambient` are the names of what it asks for; `alone` it makes them."""

    def __init__(self, captured: Captured, *, alone: bool = False) -> None:
        self.captured, self.alone = captured, alone
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, Any] = {}
        self.attributes: dict[str, Any] = {}
        self.ambient: list[str] = []

    def build(self, nodes: Iterable[fx.Node], taken: list[fx.Node], made: list[fx.Node]) -> fx.GraphModule:
        """Return the module from `taken`, and from what is `ambient` besides, to `made`."""
        for node in taken:
            self.copies[node] = self.graph.placeholder(node.name)
        if not self.alone:
            reads = dict.fromkeys(arg for node in (*nodes,) for arg in node.all_input_nodes)
            reads |= dict.fromkeys(made)
            self.ambient = [arg.name for arg in reads if arg in self.captured.ambient]
            for arg in reads:
                if arg in self.captured.ambient:
                    self.copies[arg] = self.graph.placeholder(arg.name)
            if any(self._varies(arg) for arg in reads):
                self.ambient.append(SAMPLES)
        else:
            self.ambient.append(SAMPLES)
        if SAMPLES in self.ambient:
            self.samples = self.graph.placeholder(SAMPLES)
        for node in nodes:
            if node.target is OPAQUE:
                self.copies[node] = self._call(node)
            else:
                self.copies[node] = self.graph.node_copy(node, self._copied)
        results = tuple(self._copied(node) for node in made)
        self.graph.output(results if len(results) != 1 else results[0])
        return fx.GraphModule(_root(self.attributes), self.graph)

    def _varies(self, node: fx.Node) -> bool:
        size = self.captured.sizes.get(node)
        return size is not None and bool(sympy.sympify(size).free_symbols)

    def _copied(self, node: fx.Node) -> Any:
        if node in self.copies:
            return self.copies[node]
        if node in self.captured.held:
            name, tensor = self.captured.held[node]
            self.copies[node] = self._attribute(name.replace(".", "_"), tensor)
        elif node.op == "get_attr":
            target = str(node.target)
            self.copies[node] = self._attribute(target.replace(".", "_"), getattr(self.captured.modules, target))
        elif node in self.captured.sizes:
            number = self.captured.sizes[node]
            if self._varies(node):
                size = size_of(self.captured.batch, number)
                self.copies[node] = self.graph.call_function(size, (self.samples,))
            else:
                self.copies[node] = number if isinstance(number, (bool, int, float)) else _plain(number)
        elif node in self.captured.ambient:
            self.copies[node] = self.graph.node_copy(node, self._copied)
        else:
            raise AssertionError(f"{node} is read where it is not made")
        return self.copies[node]

    def _call(self, node: fx.Node) -> fx.Node:
        """The call of what stays whole."""
        tensors: Any
        numbers: Any
        number: Any
        tensors, numbers, number, _ = node.args
        name = f"opaque_{number}"
        self.attributes[name] = self.captured.opaque.calls[number]
        given = [[self._copied(arg) if isinstance(arg, fx.Node) else arg for arg in of] for of in (tensors, numbers)]
        return self.graph.call_module(name, (given[0], given[1]) if numbers else (given[0],))

    def _attribute(self, name: str, value: Any) -> fx.Node:
        while name in self.attributes and self.attributes[name] is not value:
            name += "_"
        self.attributes[name] = value
        return self.graph.get_attr(name)


def _root(attributes: dict[str, Any]) -> nn.Module:
    root = nn.Module()
    for name, value in attributes.items():
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
            root.register_buffer(name, value)
        else:
            setattr(root, name, value)
    return root


def _plain(number: Any) -> Any:
    return bool(number) if number in (sympy.true, sympy.false) else int(number) if number.is_Integer else float(number)
