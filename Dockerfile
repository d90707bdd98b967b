# The scripts, ready to run on NVIDIA GPUs:
#   docker build --tag edm2 .
#   docker run --gpus all -it --rm --user $(id -u):$(id -g) -v "$(pwd)":/scratch edm2 \
#       python -m generate_images --preset=edm2-img512-s-guid-dino --outdir=out
# Downloads are cached in /scratch/.cache/dnnlib, and so survive the container.
FROM pytorch/pytorch:2.8.0-cuda12.8-cudnn9-runtime

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
COPY . /opt/edm2
# The image's PyTorch satisfies pyproject.toml's range and stays. /opt/edm2 is readable for any user.
RUN pip install --editable '/opt/edm2[vae]' && chmod -R a+rX /opt/edm2

# Any user id works: HOME and the cache lie in /scratch, which is writable where nothing is mounted over it.
ENV PYTHONPATH=/opt/edm2 HOME=/scratch DNNLIB_CACHE_DIR=/scratch/.cache/dnnlib
RUN mkdir -m 1777 /scratch
WORKDIR /scratch
CMD ["python", "-m", "generate_images", "--help"]
