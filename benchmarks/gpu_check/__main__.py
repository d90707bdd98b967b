"""Check this machine's GPUs and print a table; the exit code is the number of failures.

    python -m benchmarks.gpu_check --minutes=8 --out=gpu.json
    python -m benchmarks.gpu_check --table=gpu.json     # Markdown for benchmarks/README.md and docs

Under torchrun the first process checks, the GPUs of its own machine, and the others end at once.
"""

import datetime
import multiprocessing
import os
import sys
from collections.abc import MutableMapping

import click

from benchmarks.gpu_check.records import Check, Report, Result, Setting, read_report, write_report
from benchmarks.gpu_check.runner import run_checks
from benchmarks.gpu_check.tables import markdown, one_result, text_table
from dnnlib.cli import SOURCE, main
from dnnlib.errors import ConfigError

_OF_TORCHRUN = ("RANK", "LOCAL_", "WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_", "OMP_NUM_THREADS")


def chosen(checks: list[Check], only: str | None) -> list[Check]:
    """Return the checks that `only` names, A0,B1 for example; all of them for None."""
    if only is None:
        return checks
    names = {name.strip().upper() for name in only.split(",")}
    if unknown := sorted(names - {check.name for check in checks}):
        raise ConfigError(f"unknown check {unknown[0]!r}; choose from {', '.join(check.name for check in checks)}")
    return [check for check in checks if check.name in names]


def leave_torchrun(environ: MutableMapping[str, str]) -> None:
    """Drop the variables of torchrun: the checks are single processes, or start torchrun themselves."""
    if "TORCHELASTIC_RUN_ID" in environ:
        for name in [name for name in environ if name.startswith(_OF_TORCHRUN)]:
            del environ[name]


def run_all(checks: list[Check], setting: Setting, *, minutes: float, out: str | None, machine: str) -> Report:
    """Run `checks` and print their results; the report so far is in the file `out` after each of them."""
    results: list[Result] = []
    report = Report(date=str(datetime.date.today()), machine=machine, results=())
    for result in run_checks(checks, setting, minutes=minutes):
        click.echo(one_result(result))
        results.append(result)
        report = Report(date=report.date, machine=machine, results=tuple(results))
        if out is not None:
            write_report(report, out)
    click.echo(f"\n{machine}, {report.date}\n{text_table(report)}")
    return report


@click.command()
@click.option("--minutes", default=8.0, show_default=True, help="Time for all checks; with more, each may take longer")
@click.option("--out", metavar="FILE", type=SOURCE, help="Write the report as JSON, after each check")
@click.option("--only", metavar="LIST", help="Run these checks only, for example A0,B1")
@click.option("--table", metavar="FILE", type=SOURCE, help="Print a report as Markdown, and check nothing")
def gpu_check(minutes: float, out: str | None, only: str | None, table: str | None) -> int:
    """Check that training and sampling are right and fast on the GPUs of this machine."""
    if table is not None:
        click.echo(markdown(read_report(table)))
        return 0
    if os.environ.get("RANK", "0") != "0":
        return 0
    leave_torchrun(os.environ)
    # Asking CUDA the usual way would make it unusable in the processes of the checks, which are forked.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    import torch  # here, because a table needs none of it

    if not torch.cuda.is_available():
        raise ConfigError(f"no CUDA GPU to check: PyTorch {torch.__version__} sees none here")
    from benchmarks.gpu_check.checks import CHECKS

    count = torch.cuda.device_count()
    machine = f"{count} x {torch.cuda.get_device_name(0)}, PyTorch {torch.__version__}"
    if "forkserver" in multiprocessing.get_all_start_methods():
        multiprocessing.set_forkserver_preload(["benchmarks.gpu_check.checks"])
    report = run_all(chosen(CHECKS, only), Setting(gpus=count), minutes=minutes, out=out, machine=machine)
    if multiprocessing.active_children():  # in a driver that hangs: Python would wait for them
        sys.stdout.flush()
        os._exit(report.num_failures)
    return report.num_failures


if __name__ == "__main__":
    main(gpu_check)
