"""What is wrong with a model file is said in the user's terms, with their file's line."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from executor import averaging, launch
from executor.agreement import agree
from executor.layers import cut
from executor.model_file import ModelFile, load
from planner.basis.errors import DEVICE, PlanError

GOOD = """
import torch
from torch import nn

def model():
    return nn.Linear(4, 2)

def batch(n):
    return torch.randn(n, 4), torch.randn(n, 2)
"""


def written(folder: Path, more: str) -> str:
    (folder / "model.py").write_text(GOOD + more)
    return str(folder / "model.py")


def tried(path: str) -> None:
    """Do with a model file what a profile does first."""
    file = load(path)
    model = file.build(0)
    layered = cut(file, model)
    agree(file, layered)
    averaging.check(file, model)
    file.optimizer(model.parameters())


def of_forward(*lines: str) -> str:
    """A model whose forward has these lines; it holds a linear layer."""
    body = "".join(f"        {line}\n" for line in lines)
    return (
        "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        f"        self.linear = nn.Linear(4, 2)\n    def forward(self, x):\n{body}"
        "def model(): return Net()\n"
    )


@pytest.mark.parametrize(
    ("more", "what", "why"),
    [
        ("batch_size = 'many'", "batch_size is no positive whole number", "it is 'many'"),
        ("batch_size = 0", "batch_size is no positive whole number", "it is 0"),
        ("def optimizer(p): pass", "does not return an optimizer", "it returns NoneType"),
        ("def optimizer(p): return torch.optim.LBFGS(p)", "computes the loss several times", "closure"),
        ("def loss(o, t): return 1.5", "does not return a loss", "it returns float"),
        ("def loss(o, t): return (o - t) ** 2", "does not return a loss", "a tensor of (2, 2)"),
        ("import sys; sys.exit(3)", "importing it fails", "ends the program with exit code 3"),
        ("class Odd(BaseException): ...\nraise Odd('x')", "importing it fails", "Odd: x"),
        ("def model(:", "importing it fails", "SyntaxError"),
        ("open('data.txt')", "importing it fails", "(looked for from "),
        ("from . import blocks", "importing it fails", "attempted relative import"),
        (
            "import argparse\np = argparse.ArgumentParser()\np.add_argument('data')\np.parse_args()",
            "importing",
            "code 2",
        ),
        ("torch.set_default_device('meta')", "the default device has no data", "no layer can be timed"),
        ("def model():\n    import sys; sys.exit()", "model() fails", "ends the program"),
        ("def model(): return [nn.Linear(4, 2)]", "does not return a torch module", "it returns list"),
        ("loss = nn.MSELoss", "loss is no function", "it is the class MSELoss"),
        ("optimizer = torch.optim.SGD(nn.Linear(4, 2).parameters())", "optimizer is no function", "an object of SGD"),
        ("layers = 3", "layers is no function", "an object of int"),
        ("w = nn.Linear(3, 2)\ndef optimizer(p): return torch.optim.SGD(w.parameters())", "trains others", "of 2 x 3"),
        ("def loss(o, t): return (o > t).sum()", "does not return a loss", "a number of torch.int64"),
        ("def loss(o, t): return (o - t).mean() * 1j", "does not return a loss", "a number of torch.complex64"),
        (
            "def loss(o, t): return (o - t).square().mean().detach()",
            "the loss has no gradient",
            "cuts the gradient off",
        ),
        ("torch.set_grad_enabled(False)", "the loss has no gradient", "turns gradients off"),
        (
            "def model(): return nn.Linear(4, 2).requires_grad_(False)",
            "the loss has no gradient",
            "parameters of the mo",
        ),
        (
            "def model(): return nn.Sequential(nn.ReLU())\ndef loss(o, t): return o.mean()",
            "the loss has no gradient",
            "no parameters",
        ),
        (of_forward("self.linear(x)"), "the model returns no tensor", "it returns nothing"),
        (of_forward("return ['a', 1.5]"), "the model returns no tensor", "it returns list"),
        (
            of_forward("return self.linear(x)[:, 0]"),
            "outputs and targets of these shapes",
            "outputs are 2, targets 2 x 2",
        ),
        (of_forward("import sys; sys.exit(1)"), "the model's forward fails", "ends the program with exit code 1"),
        (
            "def batch(n): return torch.randn(n + 1, 4), torch.randn(n, 2)",
            "does not return 2 samples",
            "input is a tensor of 3 x 4",
        ),
        (
            "def batch(n): return torch.randn(n, 4), torch.randn(n + 1, 2)",
            "does not return 2 samples",
            "target is a tensor of 3 x 2",
        ),
        ("def batch(n): return torch.tensor(1.0), torch.randn(n, 2)", "does not return 2 samples", "of one number"),
        ("def batch(n): return 3, 4", "inputs without a tensor", "the inputs are int"),
        ("def batch(n): return [[1.0] * 4] * n, [[1.0] * 2] * n", "inputs without a tensor", "a list of 2 (list)"),
        (
            "def batch(n): return torch.randn(n, 4).numpy(), torch.randn(n, 2)",
            "numpy's arrays",
            "an input is a ndarray",
        ),
        (
            "def batch(n): return torch.randn(n, 4), torch.randn(n, 2).numpy()",
            "numpy's arrays",
            "a target is a ndarray",
        ),
        ("def batch(n): yield torch.randn(n, 4), torch.randn(n, 2)", "does not return (inputs, targets)", "generator"),
        (
            "def batch(n): return torch.randn(n, 4), 1, 2",
            "does not return (inputs, targets)",
            "a tuple of 3 (Tensor, int)",
        ),
        ("def batch(n): return torch.randn(n, 4), None", "no two tensors to compare", "the targets are nothing"),
        (
            "def batch(n): return torch.randn(n, 4).to_sparse(), torch.randn(n, 2)",
            "cannot be divided",
            "torch.sparse_coo",
        ),
        ("def batch(n): return {1: torch.randn(n, 4)}", "keys are no names", "a key is 1"),
        (
            "import os\ndef batch(n):\n    torch.manual_seed(int.from_bytes(os.urandom(4)))\n"
            "    return torch.randn(n, 4), torch.randn(n, 2)",
            "other samples each time",
            "seeded generators",
        ),
        ("def batch(n): return None", "does not return (inputs, targets)", "it returns nothing"),
        ("def model(): return None", "does not return a torch module", "it returns NoneType"),
        ("def model(): torch.zeros(2) @ torch.zeros(3)", "model() fails", "RuntimeError"),
    ],
)
def test_wrong_model_files(more: str, what: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError) as raised:
        tried(written(tmp_path, more))
    assert what in raised.value.what
    assert why in raised.value.why
    assert raised.value.where.startswith((str(tmp_path / "model.py"), "model.py:"))


@pytest.mark.parametrize(
    "more",
    [
        "def batch(n): return torch.randn(n, 4, requires_grad=True), torch.randn(n, 2)",
        "def batch(n): return [torch.randn(n, 4), torch.randn(n, 2)]",
        "from collections import UserDict\ndef batch(n): return UserDict(input=torch.randn(n, 4))\n"
        "def loss(o, t): return o.square().mean()",
        "import sys, argparse\nassert sys.argv == [__file__]\nargparse.ArgumentParser().parse_args()",
        "import os\nos.chdir('/')\ndef batch(n):\n    os.chdir('/')\n    return torch.randn(n, 4), torch.randn(n, 2)",
        "if __name__ == '__main__': raise ValueError",
        "torch.manual_seed(5)\ntorch.set_num_threads(1)",
        "torch.set_default_dtype(torch.bfloat16)",
        "loss = nn.MSELoss()",
        "optimizer = torch.optim.SGD",
        of_forward("x += 1", "return self.linear(x)"),
    ],
)
def test_what_is_odd_and_still_right(more: str, tmp_path: Path) -> None:
    folder, arguments, threads = os.getcwd(), sys.argv, torch.get_num_threads()
    try:
        tried(written(tmp_path, more))
        assert (os.getcwd(), sys.argv) == (folder, arguments)
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """What a model file changes about torch is its own affair."""
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.set_grad_enabled(True)


def test_a_fault_in_a_library_is_not_given_a_line_of_the_user_s_file(tmp_path: Path) -> None:
    (tmp_path / "beside_a_model.py").write_text("def fails(n=0):\n    raise ArithmeticError('far away')\n")
    path = written(tmp_path, "import beside_a_model\nbatch = lambda n: beside_a_model.fails()\n")
    with pytest.raises(PlanError) as raised:
        load(path).draw(2, 0)
    line = len(GOOD.splitlines()) + 2
    assert raised.value.where == f"{path}:{line}, in <lambda>; inside beside_a_model.py:2, in fails"
    path = written(tmp_path, "import beside_a_model\nbatch = beside_a_model.fails\nimport inspect\n")
    with pytest.raises(PlanError) as raised:
        load(path).draw(2, 0)
    assert raised.value.where == f"{path}; inside beside_a_model.py:2, in fails"


def test_a_library_s_line_stands_beside_the_user_s(tmp_path: Path) -> None:
    path = written(tmp_path, of_forward("return nn.functional.linear(x, self.linear.bias[:, None])"))
    with pytest.raises(PlanError) as raised:
        tried(path)
    line = len(GOOD.splitlines()) + 6
    assert raised.value.where == f"{path}:{line}, in forward"
    path = written(tmp_path, "def model(): return nn.Sequential(nn.Linear(4, 8), nn.Linear(9, 2))")
    with pytest.raises(PlanError) as raised:
        tried(path)
    assert raised.value.where.startswith(f"{path}; inside torch/nn/modules/linear.py:")


def of(folder: Path, more: str) -> ModelFile:
    return load(written(folder, more))


def named(*shapes: tuple[int, ...]) -> list[tuple[str, nn.Parameter]]:
    return [(f"part.{i}", nn.Parameter(torch.ones(shape))) for i, shape in enumerate(shapes)]


def test_an_optimizer_that_asks_for_names_gets_those_of_the_whole_model(tmp_path: Path) -> None:
    text = "def optimizer(named_parameters): return torch.optim.SGD([p for n, p in named_parameters if '1' in n])"
    file = of(tmp_path, text)
    pairs = named((2, 2), (2,), (3,))
    optimizer = file.optimizer_of(pairs)
    assert optimizer is not None
    assert [p is pairs[1][1] for p in optimizer.param_groups[0]["params"]] == [True]


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "RMSprop", "Adagrad", "Adafactor", "NAdam"])
def test_a_part_of_the_model_may_have_none_of_a_group(tmp_path: Path, kind: str) -> None:
    """Every part has all groups, so that a scheduler finds as many everywhere; a step passes over empty ones."""
    text = f"""def optimizer(named_parameters):
    named = list(named_parameters)
    return torch.optim.{kind}([{{"params": [p for _, p in named if p.dim() == n]}} for n in (1, 2)], lr=1e-3)"""
    optimizer = of(tmp_path, text).optimizer_of(pairs := named((2,)))
    assert optimizer is not None
    pairs[0][1].grad = torch.ones(2)
    optimizer.step()
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 0]


def test_a_part_of_the_model_may_have_nothing_that_is_trained(tmp_path: Path) -> None:
    text = "def optimizer(parameters): return torch.optim.SGD([p for p in parameters if p.dim() == 2])"
    file = of(tmp_path, text)
    assert file.optimizer_of(named((2,))) is None
    assert file.optimizer_of([]) is None
    assert file.optimizer_of(named((2, 2))) is not None


def test_what_a_killed_rank_printed_last_is_said_and_its_log_where_it_is_kept(tmp_path: Path) -> None:
    folder = tmp_path / "logs" / "attempt_0" / "1"
    folder.mkdir(parents=True)
    (folder / "stdout.log").write_text("step 3\n")
    (folder / "stderr.log").write_text("".join(f"line {i}\n" for i in range(40)) + "out of memory\n")
    error = launch._failed(1, None, -9, tmp_path / "logs", kept=False)
    assert error.where.splitlines()[0] == "rank 1"
    assert error.where.splitlines()[-1] == "out of memory"
    assert len(error.where.splitlines()) == 13
    assert str(tmp_path) not in error.fix
    assert str(tmp_path / "logs") in launch._failed(1, None, -9, tmp_path / "logs", kept=True).fix
    (folder / "stderr.log").write_text("")
    assert launch.last_words(tmp_path / "logs", 1) == "step 3"


def test_of_two_ranks_the_one_that_failed_first_is_named(tmp_path: Path) -> None:
    """A peer that misses it may have ended before it is seen to have ended itself."""
    for rank, (name, at) in enumerate((("Connection closed by peer", 9), ("the bomb went off", 8), (None, 7))):
        file = tmp_path / "attempt_0" / str(rank) / "error.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"message": {"message": name}}) if name else "{")
        os.utime(file, ns=(at, at))
    assert launch._first_words(tmp_path) == (1, {"message": {"message": "the bomb went off"}})
    assert launch._first_words(tmp_path / "attempt_0" / "2") is None


def test_what_a_model_file_prints_is_no_part_of_an_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loud = "print('import')\ndef model():\n    print('model'); return nn.Linear(4, 2)\n"
    loud += "def batch(n):\n    print('batch'); return torch.randn(n, 4), torch.randn(n, 2)\n"
    loud += (
        "def data():\n    print('data'); return torch.utils.data.TensorDataset(torch.randn(8, 4), torch.randn(8, 2))\n"
    )
    file = load(written(tmp_path, loud))
    file.build(0), file.drawn(2, 0), file.data.source
    out, err = capsys.readouterr()
    assert out == ""
    assert set(err.split()) >= {"import", "model", "batch", "data"}


def test_what_no_memory_holds_is_said_to_be_too_large(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text("from torch import nn\ndef model(): return nn.Linear(10**7, 10**7)\n")
    text = (tmp_path / "m.py").read_text() + "import torch\ndef batch(n): return torch.ones(n, 2), torch.ones(n, 2)\n"
    (tmp_path / "m.py").write_text(text)
    with pytest.raises(PlanError, match="needs more memory than this host gives") as caught:
        load(str(tmp_path / "m.py")).build(0)
    assert caught.value.code == DEVICE
    assert "m.py:2" in caught.value.where
