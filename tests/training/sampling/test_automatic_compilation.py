"""When sampling compiles by itself: on a GPU, from a number of images on, with a word before it."""

from typing import Any

import pytest
import torch

import generate_images
from torch_utils.distributed import World
from training.sampling import request
from training.sampling.request import COMPILE_FROM, resolve_sampling


def prepared(monkeypatch: pytest.MonkeyPatch, num: int, device: str = "cuda", size: int = 1, **options: Any) -> Any:
    """The `prepare` argument for `num` images, and what the user is told."""
    told: list[str] = []
    monkeypatch.setattr(request, "generate_images", lambda **arguments: arguments["prepare"])
    monkeypatch.setattr(request, "missing_compiler", lambda device: None)
    world = World(rank=0, size=size, device=torch.device(device))
    made = resolve_sampling(net="net.pkl", **options)
    return made.generate(announce=told.append, seeds=range(num), world=world), told


def test_many_images_on_a_gpu_are_compiled_for_and_it_is_said_before(monkeypatch):
    prepare, told = prepared(monkeypatch, COMPILE_FROM)
    assert prepare.compile and len(told) == 1
    assert "5,000 images per process: takes minutes" in told[0] and "--no-compile leaves it out" in told[0]
    assert prepare.settings == {
        "precision": None,
        "compile": False,
    }  # --skip-existing may add seeds


@pytest.mark.parametrize(
    "case",
    [
        {"num": COMPILE_FROM - 1},
        {"num": COMPILE_FROM, "device": "cpu"},
        {"num": COMPILE_FROM, "size": 2},
        {"num": COMPILE_FROM, "compile": False},
    ],
)
def test_elsewhere_they_are_not(monkeypatch, case):
    prepare, told = prepared(monkeypatch, **case)
    assert not prepare.compile and told == []


def test_without_a_compiler_they_are_not(monkeypatch):
    prepare, _ = prepared(monkeypatch, 4)
    monkeypatch.setattr(request, "missing_compiler", lambda device: "no compiler was found")
    world = World(device=torch.device("cuda"))
    assert not resolve_sampling(net="net.pkl").generate(seeds=range(COMPILE_FROM), world=world).compile
    assert not prepare.compile


def test_an_option_forces_it_either_way(monkeypatch):
    prepare, told = prepared(monkeypatch, 1, device="cpu", compile=True)
    assert prepare.compile and told == [] and prepare.settings["compile"] is True
    values = []
    for words in ([], ["--compile"], ["--no-compile"]):
        context = generate_images.cmdline.make_context("generate_images.py", [*words, "--net=net.pkl"])
        values.append(context.params["compile"])
    assert values == [None, True, False]
