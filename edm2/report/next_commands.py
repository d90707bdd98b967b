"""The commands that go on from a run: to continue it, to reconstruct a network, to sample, to sweep."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from dnnlib.parse import format_nimg
from edm2.report.figures import METRIC_PREFIX
from edm2.report.record import RunRecord

_NAME = re.compile(r"network-snapshot-(\d+)-(\d+\.\d+)\.(?:pkl|safetensors)")


@dataclass(frozen=True, kw_only=True)
class Command:
    """What to type, and what for."""

    purpose: str
    text: str


def commands_for(record: RunRecord) -> list[Command]:
    """The commands that the run's files allow."""
    found = [*_continue(record)]
    snapshots = [path for path in record.snapshots if _NAME.fullmatch(path.name)]
    if not snapshots:
        return found
    best, why = _best_snapshot(record, snapshots)
    match = _NAME.fullmatch(best.name)
    assert match is not None
    std, indir = match[2], str(record.path)
    sampling = _sampling_words(record)
    found.append(Command(purpose=f"Sample from {why}", text=_join("generate_images.py", f"--net={best}", *sampling)))
    swept = _best_of_sweeps(record)
    outstd = f"{swept:g}" if swept is not None else "0.150" if std != "0.150" else "0.120"
    why = "the best one of the sweep" if swept is not None else "any length will do"
    kimg = max(_NAME.fullmatch(path.name)[1] for path in snapshots)  # type: ignore[index]
    found.append(
        Command(
            purpose=f"Reconstruct another EMA length ({why})",
            text=_join("reconstruct_phema.py", f"--indir={indir}", "--outdir=out", f"--outstd={outstd}"),
        )
    )
    net = f"out/phema-{kimg}-{float(outstd):.3f}.pkl"
    found.append(Command(purpose="Sample from that", text=_join("generate_images.py", f"--net={net}", *sampling)))
    found.append(
        Command(
            purpose="Find the best EMA length (REF: reference statistics, see calculate_metrics.py ref)",
            text=_join(
                "sweep.py", f"--indir={indir}", "--outstd=0.02,0.04,...,0.24", "--metrics=fd_efflite0", "--ref=REF",
                *_picture_words(record), "--num=1000", f"--json={Path(indir, 'sweep.json')}",
            ),
        )
    )  # fmt: skip
    return found


def _continue(record: RunRecord) -> list[Command]:
    command = next((s["command"] for s in reversed(record.sessions) if isinstance(s.get("command"), str)), None)
    finished = record.duration is not None and record.nimg >= record.duration
    if record.checkpoint is None:
        return []
    if command is None:
        words = _join("train_edm2.py", f"--outdir={record.path}")
        return [Command(purpose="Continue: repeat the run's own command", text=f"{words} ...")]
    if not finished:
        return [Command(purpose="Continue: the same command again", text=command)]
    assert record.duration is not None
    longer = f"--duration={format_nimg(2 * record.duration)}"
    pattern = r"--duration(?:=|\s+)\S+"
    text = re.sub(pattern, longer, command) if re.search(pattern, command) else f"{command} {longer}"
    return [Command(purpose="Train on, here for twice as long (the run is finished)", text=text)]


def _best_snapshot(record: RunRecord, snapshots: list[Path]) -> tuple[Path, str]:
    """The snapshot to sample from: the one with the best metric; else that of the sample grids; else the last one."""
    by_name = {path.name: path for path in snapshots}
    for key, name in record.stats.texts.items():
        if key.startswith(f"{METRIC_PREFIX}best_") and name in by_name:
            return by_name[name], f"the snapshot with the best {key.removeprefix(f'{METRIC_PREFIX}best_')}"
    if record.grids:
        std = record.grids[-1].about.get("ema_std")
        own = [p for p in snapshots if isinstance(std, float) and f"-{std:.3f}." in p.name]
        if own:
            return own[-1], "the newest snapshot, as in the sample grids"
    return snapshots[-1], "the newest snapshot"


def _sampling_words(record: RunRecord) -> list[str]:
    """Options of generate_images.py that repeat the sample grids where one command can, else suitable ones."""
    about = record.grids[-1].about if record.grids else {}
    classes, seeds = about.get("classes"), about.get("seeds")
    words = ["--outdir=out/images", "--grid=out/grid.png"]
    pictures = _picture_words(record)
    if pictures:
        return [*words, *pictures, "--seeds=0-15"]
    try:
        flat = [seed for row in seeds for seed in row]  # type: ignore[union-attr]
        all_classes = list(classes) == list(range(about["label_dim"]))  # type: ignore[arg-type]
        words += [f"--seeds={flat[0]}-{flat[-1]}", f"--steps={int(about['steps'])}"]
    except (TypeError, KeyError, IndexError, ValueError):
        return [*words, "--seeds=0-63"]
    return [*words, "--class=all"] if all_classes and flat else words


def _picture_words(record: RunRecord) -> list[str]:
    """Options that a network which is conditioned on pictures needs."""
    condition = record.options.get("condition")
    if not isinstance(condition, str):
        return []
    return ["--source=PICTURES", *(["--masks=MASKS"] if condition.startswith("inpaint") else [])]


def _best_of_sweeps(record: RunRecord) -> float | None:
    from training.metrics.metric_table import METRICS

    for sweep in record.sweeps:
        for name in dict.fromkeys(name for point in sweep.points for name in point.means):
            lower = name not in METRICS or METRICS[name].lower_is_better
            points = [point for point in sweep.points if name in point.means]
            return (min if lower else max)(points, key=lambda point: point.means[name]).std
    return None


def _join(script: str, *words: str) -> str:
    return shlex.join(["python", script, *words])
