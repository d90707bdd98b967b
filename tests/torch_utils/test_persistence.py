"""Persistent classes: ordinary classes whose pickles carry their source, and are rebuilt without running it."""

import copy
import io
import multiprocessing
import pickle
import pickletools
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dnnlib.errors import ConfigError
from tests.helpers.paths import ROOT
from torch_utils import persistence


@persistence.persistent_class
class Scale(nn.Module):
    """A layer with one parameter and one buffer."""

    def __init__(self, width: int, offsets: list[float], *, factor: float = 2) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full([width], float(factor)))
        self.register_buffer("offset", torch.tensor(offsets))
        offsets.append(-1.0)  # a constructor that changes its argument

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight + self.offset


class Plain(Scale):
    """A subclass without the decorator."""


@persistence.persistent_class
class Renamed(Scale):
    """A subclass with it, and with another constructor."""

    def __init__(self, width: int) -> None:
        super().__init__(width, [0.0], factor=3)


def describe(layer: nn.Module) -> dict[str, Any]:
    """The one argument with which a pickle calls `_reconstruct_persistent_obj`."""
    reduced: Any = layer.__reduce_ex__(4)
    assert reduced[0] is persistence._reconstruct_persistent_obj and len(reduced) == 2
    return reduced[1][0]


def send_back(layer: nn.Module, connection: Any) -> None:
    """Run in the spawned worker."""
    connection.send((type(layer).__name__, layer(torch.ones(2)).tolist(), layer))
    connection.recv()  # tensors travel through this process's memory: stay until they have arrived


def test_the_class_stays_an_ordinary_class() -> None:
    layer = Scale(2, [1.0])
    assert type(layer) is Scale and isinstance(layer, nn.Module) and Scale.__mro__[1] is nn.Module
    assert Scale.__doc__ == "A layer with one parameter and one buffer."
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(torch.ones(2)), layer(torch.ones(2)))


def test_constructor_arguments_are_recorded_as_they_were_given() -> None:
    layer = Scale(2, [1.0], factor=5)
    assert layer._init_args == (2, [1.0]) and layer._init_kwargs == {"factor": 5}
    layer.init_args[1].append(7.0)
    assert layer.init_args == (2, [1.0]) and layer.init_kwargs.factor == 5


def test_the_outermost_constructor_is_the_one_recorded() -> None:
    assert Renamed(4)._init_args == (4,) and Renamed(4)._init_kwargs == {}


def test_is_persistent_knows_classes_and_instances() -> None:
    assert persistence.is_persistent(Scale) and persistence.is_persistent(Scale(1, [0.0]))
    assert not any(persistence.is_persistent(other) for other in (Plain, Plain(1, [0.0]), [1], 3))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
@pytest.mark.parametrize("make", [lambda: Scale(2, [1.0]), lambda: Plain(2, [1.0]), lambda: Renamed(2)])
def test_copies_are_equal_and_independent(make: Any, duplicate: Any) -> None:
    layer = nn.Sequential(make())
    twin = duplicate(layer)
    assert type(twin[0]) is type(layer[0]) and twin[0]._init_args == layer[0]._init_args
    assert torch.equal(twin(torch.ones(2)), layer(torch.ones(2)))
    with torch.no_grad():
        twin[0].weight.zero_()
    assert layer[0].weight.all()


def test_a_spawned_worker_gets_the_layer_and_returns_it() -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=send_back, args=(Scale(2, [1.0]), theirs))
    process.start()
    assert ours.poll(60)
    name, values, layer = ours.recv()
    ours.send("done")
    process.join(60)
    assert (name, values, type(layer)) == ("Scale", [3.0, 3.0], Scale)


def test_a_pickle_has_the_published_layout() -> None:
    data = pickle.dumps(Renamed(2), protocol=4)
    globals_ = [arg for opcode, arg, _ in pickletools.genops(data) if opcode.name == "SHORT_BINUNICODE"]
    assert globals_[:2] == ["torch_utils.persistence", "_reconstruct_persistent_obj"]
    meta = describe(Renamed(2))
    assert {key: meta[key] for key in ("type", "version", "class_name")} == {
        "type": "class", "version": 6, "class_name": "Renamed",
    }  # fmt: skip
    assert set(meta) == {"type", "version", "module_src", "class_name", "state"}
    assert meta["module_src"] == Path(__file__).read_text(encoding="utf-8")


def test_source_from_elsewhere_is_refused_and_not_run(tmp_path: Path) -> None:
    meta = describe(Scale(1, [0.0]))
    marker = tmp_path / "ran"
    source = f"open({str(marker)!r}, 'w')"
    for change in ({"module_src": source}, {"class_name": "Other"}, {"version": 7}, {"type": "x"}):
        with pytest.raises(ConfigError):
            persistence._reconstruct_persistent_obj(meta | change)
    assert not marker.exists()


def test_a_class_without_a_source_file_says_so_only_when_pickled() -> None:
    program = """
        import pickle
        from torch_utils.persistence import persistent_class
        @persistent_class
        class Here: pass
        try: pickle.dumps(Here())
        except pickle.PicklingError as error: print(error)
    """
    run = [sys.executable, "-"]
    root = ROOT
    done = subprocess.run(
        run, input=textwrap.dedent(program), cwd=root, text=True, capture_output=True, check=True, timeout=120
    )
    assert done.stdout.strip() == "class Here has no source file; define it in a module"


def test_a_local_class_cannot_be_pickled() -> None:
    @persistence.persistent_class
    class Local:
        pass

    with pytest.raises(pickle.PicklingError, match="not found as"):
        pickle.dump(Local(), io.BytesIO())
