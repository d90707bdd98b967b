# make env     a virtual environment in .venv with what the tests ran with
# make check   lint, format, types and the documentation's links
# make docs    the documentation as a site, in out/site; make docs SERVE=1 shows it in a browser while you write
# make test    env, check, then the whole suite
# make faults  the long fault suite: every command killed at each of its file-system calls, and a hundred kills and
#              other faults of longer runs, with counts; about an hour
# make gpu     checks a machine with an NVIDIA GPU in about eight minutes (docs/gpu.md); report in out/gpu.json
# make demo    images of the shipped network, then of one trained here in about two minutes, in out/demo
# make clean   removes what the above made, .venv included
#
# PYTHON=python3.12      which Python makes the environment (3.11 or newer)
# PIP_ARGS="..."         more options for pip, e.g. the --extra-index-url of PyTorch's CPU builds (see pytorch.org),
#                        which saves a download of several gigabytes on a Linux machine without a GPU
# GPU_ARGS="..."         more options for make gpu, e.g. --minutes=30 or --only=A0,B1
# PYTEST_ARGS="..."      more options for pytest, e.g. -k sampler

PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
GPU_ARGS ?=

BIN := .venv/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
RUN := $(BIN)/python
ACTIVATE := $(if $(filter Windows_NT,$(OS)),.venv\Scripts\activate,source $(BIN)/activate)
DEMO := out/demo

# The theme tells of its successor at every build.
export NO_MKDOCS_2_WARNING := 1

.PHONY: help env check docs test faults gpu demo clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \{0,1\}//p' Makefile

env: .venv/.stamp
ifneq ($(filter env,$(MAKECMDGOALS)),)
	@echo 'To use it, type: $(ACTIVATE)'
endif

# The stamp is written last, so that an interrupted installation is taken up again.
.venv/.stamp: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make env: no $(PYTHON) here; install Python 3.11 or newer, or name one: make env PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "make env: $(PYTHON) is Python %d.%d, and 3.11 or newer is needed; name one: make env PYTHON=python3.11" % v[:2])'
	@$(RUN) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo "Making .venv"; $(PYTHON) -m venv --clear .venv; }
	@echo "Installing what constraints.txt lists into .venv"
	@$(RUN) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --constraint constraints.txt --editable '.[dev]'
	@touch $@

check: env
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m mkdocs build --strict

docs: env
	$(RUN) -m mkdocs $(if $(SERVE),serve,build --strict)
	@echo "out/site/index.html"

# One worker more than cores, since many tests wait for processes; tests/conftest.py holds each to one thread.
WORKERS = $(shell $(RUN) -c "import os; print(min(8, os.cpu_count() + 1))")
test: check
	$(RUN) -m pytest --quiet -rs --numprocesses=$(WORKERS) --dist=worksteal $(PYTEST_ARGS)

# One at a time: the moments of the kills are meant for a run that has the machine to itself.
faults: env
	EDM2_FAULTS=long $(RUN) -m pytest -m faults --capture=no --verbose $(PYTEST_ARGS)

gpu: env
	@mkdir -p out
	$(RUN) -m benchmarks.gpu_check --minutes=8 --out=out/gpu.json $(GPU_ARGS)

demo: env
	@rm -rf $(DEMO)
	@echo "1/4 Images from the shipped network, guided by a smaller and less trained one"
	$(RUN) generate_images.py --preset=demo --outdir=$(DEMO)/shipped --grid=$(DEMO)/shipped.png --class=all --seeds=0-79 --steps=18
	@echo "2/4 Training the same network on the shipped data for about two minutes"
	$(RUN) train_edm2.py --preset=fashion --outdir=$(DEMO)/run --batch=16 --duration=8Ki --rampup=0.002 \
		--snapshot=1Ki --status=1Ki --checkpoint=4Ki
	@echo "3/4 Two EMA lengths from the snapshots just written"
	$(RUN) reconstruct_phema.py --indir=$(DEMO)/run --outdir=$(DEMO)/phema --outstd=0.080,0.150
	@echo "4/4 Images from both"
	$(RUN) generate_images.py --net=$(DEMO)/phema/phema-0000008-0.080.pkl --grid=$(DEMO)/trained-0.080.png \
		--class=all --seeds=0-79 --steps=16
	$(RUN) generate_images.py --net=$(DEMO)/phema/phema-0000008-0.150.pkl --grid=$(DEMO)/trained-0.150.png \
		--class=all --seeds=0-79 --steps=16
	@echo "Done. The images, a row for each class:"
	@echo "  $(DEMO)/shipped.png        the shipped network"
	@echo "  $(DEMO)/trained-0.080.png  the network trained just now, EMA length 0.080"
	@echo "  $(DEMO)/trained-0.150.png  the same, EMA length 0.150"
	@echo 'For commands of your own, as in README.md, type first: $(ACTIVATE)'

clean:
	rm -rf .venv out build dist edm2.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
