"""The Dockerfile and the documented docker command have what training in a container needs, as far as text shows it."""

import re

import pytest

from tests.helpers.paths import ROOT

TEXT = (ROOT / "Dockerfile").read_text(encoding="utf-8")
COMMANDS = [line for line in TEXT.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
ENV = dict(pair.split("=", 1) for line in COMMANDS if line.startswith("ENV ") for pair in line.split()[1:])


def docker_runs(text: str) -> list[str]:
    return re.findall(r"docker run\b[^\n]*", text)


def test_a_c_compiler_is_installed_and_tried_while_the_image_is_built():
    installs = [line for line in COMMANDS if "apt-get install" in line]
    assert installs and {"gcc", "libc6-dev"} <= set(installs[0].split())
    assert "python3-dev" in installs[0]
    tried = [
        line for line in COMMANDS if line.startswith("RUN ") and "Python.h" in line and "gcc -fsyntax-only" in line
    ]
    assert tried and "torch._inductor" in tried[0]


def test_the_compiler_finds_a_name_for_a_user_id_without_one():
    assert ENV["USER"] and ENV["LOGNAME"]
    assert ENV["HOME"] == "/scratch"


def test_the_environment_holds_no_secret():
    assert not [name for name in ENV if re.search(r"TOKEN|SECRET|PASSWORD|API_KEY", name)]
    assert "--build-arg" not in " ".join(COMMANDS)


@pytest.mark.parametrize("name", ["README.md", "Dockerfile"])
def test_documented_containers_share_the_memory_of_the_host(name: str):
    runs = docker_runs((ROOT / name).read_text(encoding="utf-8"))
    assert runs
    for command in runs:
        assert "--ipc=host" in command and "--gpus" in command, command
