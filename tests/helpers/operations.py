"""The commands that write files, each as small as it can be."""

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.documented_files import folder_of_images, vae
from tests.helpers.documented_run import run_script
from tests.helpers.paths import GOLDEN_DIR
from tests.helpers.tiny import write_dataset


@dataclass(frozen=True, kw_only=True)
class Operation:
    """A command that is run in the parent of the folder `out`, which it writes to; {inputs} is a folder it reads.

    `needs`: names in INPUTS. `existing`: content of `out` at the start. `again`: exit codes of the command where its
    result exists already.
    """

    script: str
    args: tuple[str, ...]
    needs: tuple[str, ...] = ()
    existing: str = ""
    ranks: int = 1
    again: tuple[int, ...] = (0,)


_NETWORK = ("--preset=edm2-img64-s", "--device=cpu", "--channels=4", "--channel-mult=1", "--num-blocks=1", "--rampup=0")
_RUN = ("--outdir=out", "--data={inputs}/data.zip", *_NETWORK, "--dropout=0.2")
_FEW = ("--batch=4", "--duration=16", "--status=4", "--checkpoint=8", "--snapshot=8")
_MANY = (
    "--batch=512",
    "--duration=3072",
    "--status=512",
    "--checkpoint=1024",
    "--snapshot=1024",
    "--keep-checkpoints=1",
)
_METRICS = ("--metrics=fd_efflite0", "--metrics-ref={inputs}/ref.safetensors", "--metrics-num=4", "--metrics-steps=2")
_MEASURE = ("--metrics=fd_efflite0", "--ref={inputs}/ref.safetensors", "--num=4", "--steps=2", "--device=cpu")
_SNAPSHOTS = GOLDEN_DIR / "snapshots"


def _train(*more: str, ranks: int = 1, needs: tuple[str, ...] = ("data.zip",)) -> Operation:
    return Operation(script="train_edm2.py", args=(*_RUN, *more), ranks=ranks, needs=needs)


def _tool(*args: str, needs: tuple[str, ...], again: tuple[int, ...] = (0,)) -> Operation:
    return Operation(script="dataset_tool.py", args=args, needs=needs, again=again)


OPERATIONS = {
    "train": _train(*_FEW),
    "train with everything": _train(
        *_FEW,
        *("--samples=1", "--samples-steps=2", "--format=both", "--log=tensorboard", "--ls=auto", *_METRICS),
        needs=("data.zip", "ref.safetensors"),
    ),
    "train, a new name for each checkpoint": _train(*_MANY),
    "train in the foreground": _train(*_FEW, "--background-saves=False", "--format=safetensors"),
    "train on two processes": _train(*_FEW, ranks=2),
    "train on two processes, sharded": _train(*_FEW, "--shard=True", "--keep-checkpoints=1", ranks=2),
    "train on two processes, sharded, a new name for each checkpoint": _train(*_MANY, "--shard=True", ranks=2),
    "convert": _tool(
        *("convert", "--source={inputs}/images", "--dest=out/data.zip", "--workers=1", "--skip-existing"),
        needs=("images",),
    ),
    "convert over an older file": Operation(
        script="dataset_tool.py",
        args=("convert", "--source={inputs}/images", "--dest=out/data.zip", "--workers=1", "--overwrite"),
        needs=("images", "data.zip"),
        existing="data.zip",
    ),
    "convert to a folder": _tool(
        "convert", "--source={inputs}/images", "--dest=out/data", "--workers=1", needs=("images",), again=(2,)
    ),
    "convert to shards": _tool(
        *("convert", "--source={inputs}/images", "--dest=out/data.zip", "--workers=1", "--shards=3", "--skip-existing"),
        needs=("images",),
    ),
    "encode": _tool(
        *("encode", "--source={inputs}/data.zip", "--dest=out/latents.zip", "--model-url={inputs}/vae", "--device=cpu"),
        *("--skip-existing", "--shards=2"),
        needs=("data.zip", "vae"),
    ),
    "reconstruct": Operation(
        script="reconstruct_phema.py",
        args=("--indir={inputs}/run", "--outdir=out", "--outstd=0.06,0.12", "--format=both", "--skip"),
        needs=("run",),
    ),
    "generate": Operation(
        script="generate_images.py",
        args=(
            *("--net={inputs}/net.pkl", "--outdir=out", "--seeds=0-5", "--batch=2", "--steps=2", "--device=cpu"),
            *("--skip-existing", "--subdirs", "--grid=out/grid.png"),
        ),
        needs=("net.pkl",),
    ),
    "generate on two processes": Operation(
        script="generate_images.py",
        args=(
            *("--net={inputs}/net.pkl", "--outdir=out", "--seeds=0-5", "--batch=2", "--steps=2", "--device=cpu"),
            "--skip-existing",
        ),
        needs=("net.pkl",),
        ranks=2,
    ),
    "sweep": Operation(
        script="sweep.py",
        args=("--indir={inputs}/run", "--outstd=0.06,0.12", "--json=out/sweep.json", *_MEASURE),
        needs=("run", "ref.safetensors"),
    ),
    "metrics ref": Operation(
        script="calculate_metrics.py",
        args=(
            *("ref", "--data={inputs}/data.zip", "--dest=out/ref.safetensors", "--metrics=fd_efflite0"),
            *("--features=4", "--workers=0", "--device=cpu", "--skip-existing"),
        ),
        needs=("data.zip",),
    ),
    "metrics gen": Operation(
        script="calculate_metrics.py",
        args=("gen", "--net={inputs}/net.pkl", "--json=out/result.json", *_MEASURE, "--skip-existing"),
        needs=("net.pkl", "ref.safetensors"),
    ),
    "share a folder": Operation(
        script="convert_snapshot.py",
        args=("{inputs}/net.pkl", "--out=out/model", "--to=folder", "--license=apache-2.0"),
        needs=("net.pkl",),
        again=(2,),
    ),
    "convert snapshots": Operation(
        script="convert_snapshot.py", args=("{inputs}/net.pkl", "--outdir=out"), needs=("net.pkl",)
    ),
}


def _reference(path: Path) -> None:
    _run_here(OPERATIONS["metrics ref"], path.parent)
    (path.parent / "out" / path.name).rename(path)
    (path.parent / "out").rmdir()


def _run_folder(path: Path) -> None:
    _run_here(_train(*_MANY), path.parent)
    (path.parent / "out").rename(path)


def _run_here(operation: Operation, inputs: Path) -> None:
    for need in operation.needs:
        make_input(inputs, need)
    with contextlib.chdir(inputs):
        run_script(operation.script, [arg.format(inputs=inputs) for arg in operation.args])


INPUTS: dict[str, Callable[[Path], object]] = {
    "data.zip": lambda path: write_dataset(path, num=6, size=4),
    "images": folder_of_images,
    "vae": vae,
    "net.pkl": lambda path: shutil.copy(_SNAPSHOTS / "rgb-cond.pkl", path),
    "ref.safetensors": _reference,
    "run": _run_folder,
}


def make_input(inputs: Path, name: str) -> None:
    """Make one of INPUTS in the folder `inputs`, unless it exists."""
    if not (inputs / name).exists():
        INPUTS[name](inputs / name)
