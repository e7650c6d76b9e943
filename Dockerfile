# syntax=docker/dockerfile:1
# spml_fast in a container: `docker build -t spml-fast .`, or for a machine without a GPU
# `docker build --build-arg DEVICE=cpu -t spml-fast:cpu .`; docs/operations.md says how to run it.
ARG DEVICE=cuda
ARG CUDA=13.0.2
ARG UBUNTU=24.04

FROM docker.io/nvidia/cuda:${CUDA}-base-ubuntu${UBUNTU} AS base-cuda
FROM docker.io/library/ubuntu:${UBUNTU} AS base-cpu

# hadolint ignore=DL3006
FROM base-${DEVICE} AS build
ARG DEVICE
# Minor versions that stacks.toml lists and whose tests passed together.
ARG PYTHON=3.11
ARG TORCH=2.14
ARG TORCHVISION=0.29
ARG TRITON=3.8
ARG DALI=2.4
ARG DEEPSPEED=0.19
ARG TIMM=1.0
# Extras of setup.py, separated by commas.
ARG EXTRAS=onnx,hub
COPY --from=ghcr.io/astral-sh/uv:0.13 /uv /bin/uv
# Compiled here, since the user of the image cannot write there and every start would compile PyTorch again; without
# times of files: by those, half of the modules counted as stale in a built image.
ENV UV_COMPILE_BYTECODE=1 \
    PYC_INVALIDATION_MODE=UNCHECKED_HASH \
    UV_LINK_MODE=copy \
    UV_PYTHON_INSTALL_DIR=/opt/python \
    VIRTUAL_ENV=/opt/venv
RUN uv venv --managed-python --python "${PYTHON}" /opt/venv
# Without a GPU: PyTorch's build without the CUDA libraries first, which the next step leaves in place.
RUN --mount=type=cache,target=/root/.cache/uv \
    if [ "${DEVICE}" = cpu ]; then \
        uv pip install --index-url https://download.pytorch.org/whl/cpu "torch==${TORCH}.*" "torchvision==${TORCHVISION}.*"; \
    fi
WORKDIR /src
COPY setup.py stacks.toml MANIFEST.in pyproject.toml README.md LICENSE ./
COPY kernels kernels
COPY spml_fast spml_fast
RUN --mount=type=cache,target=/root/.cache/uv \
    uv pip install ".[${EXTRAS}]" "torch==${TORCH}.*" "torchvision==${TORCHVISION}.*" "triton==${TRITON}.*" \
        "nvidia-dali-cuda130==${DALI}.*" "deepspeed==${DEEPSPEED}.*" "timm==${TIMM}.*"

# hadolint ignore=DL3006
FROM base-${DEVICE}
ARG VERSION=0.2.0
LABEL org.opencontainers.image.title="spml_fast" \
      org.opencontainers.image.description="Multi-label image classifiers from partly labelled images" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="MIT"
# Triton compiles what launches a kernel with the C compiler; DALI and PyTorch use OpenMP.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev libgomp1 ca-certificates \
    && rm -rf /var/lib/apt/lists/*
# The image of Ubuntu has a user of that number already.
RUN (userdel --remove ubuntu 2>/dev/null || true) \
    && useradd --create-home --uid 1000 spml \
    && install --directory --owner spml --group spml /work
COPY --from=build /opt/python /opt/python
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1
USER 1000:1000
# Data, runs and whatever else a command names are looked for here: mount a folder of yours.
WORKDIR /work
ENTRYPOINT ["spml-fast"]
CMD ["--help"]
