# The scripts, ready to run on NVIDIA GPUs:
#   docker build --tag edm2 .
#   docker run --gpus all --ipc=host -it --rm --user $(id -u):$(id -g) -v "$(pwd)":/scratch edm2 \
#       python -m generate_images --preset=edm2-img512-s-guid-dino --outdir=out
# --ipc=host: loaders and NCCL share memory through /dev/shm, of which a container has 64 MB otherwise.
# Downloads are cached in /scratch/.cache/dnnlib, and so survive the container. Another PyTorch:
#   docker build --tag edm2 --build-arg BASE=pytorch/pytorch:TAG .
ARG BASE=pytorch/pytorch:2.8.0-cuda12.8-cudnn9-runtime
FROM ${BASE}

# Images without conda have the system's Python, which refuses pip without PIP_BREAK_SYSTEM_PACKAGES.
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_BREAK_SYSTEM_PACKAGES=1 \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1

# torch.compile, the default of training, builds a Python extension at its first step: it needs a C compiler and Python.h.
# Images with the tag -runtime may lack both.
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends gcc libc6-dev && \
    if ! python -c "import os, sysconfig; os.stat(sysconfig.get_path('include') + '/Python.h')"; then \
        DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends python3-dev; \
    fi && \
    rm -rf /var/lib/apt/lists/*

COPY . /opt/edm2
# The image's PyTorch satisfies pyproject.toml's range and stays. /opt/edm2 is readable for any user.
RUN pip install --editable '/opt/edm2[vae]' && chmod -R a+rX /opt/edm2

# Any user id works: HOME and the cache lie in /scratch, which is writable where nothing is mounted over it. The compiler
# of PyTorch before 2.13 asks for the name of the user, and fails for an id without one unless these variables answer.
ENV PYTHONPATH=/opt/edm2 HOME=/scratch DNNLIB_CACHE_DIR=/scratch/.cache/dnnlib USER=edm2 LOGNAME=edm2
RUN mkdir -m 1777 /scratch

# Fails the build, not the first step of a training run.
RUN echo '#include <Python.h>' | gcc -fsyntax-only -x c -I"$(python -c "import sysconfig; print(sysconfig.get_path('include'))")" - && \
    python -c "import torch, triton, torch._inductor.codecache, generate_images, train_edm2; print(torch.__version__)" && \
    rm -rf /tmp/torchinductor_*
WORKDIR /scratch
CMD ["python", "-m", "generate_images", "--help"]
