# Head, workers and submitter of a cluster, or one machine: docs/kuberay.md.
#   docker build --tag deformable-detr .
# A GPU is not needed to build it; the CUDA operators are compiled by nvcc from PyPI. CUDA's
# libraries come with torch: the host brings the driver and its container toolkit.
FROM python:3.11-slim-bookworm AS base
# g++: DeepSpeed and torch.compile build parts at first use. wget: KubeRay's health checks.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ make wget \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/deformable-detr

FROM base AS environment
ENV UV_NO_CACHE=1 PIP_NO_CACHE_DIR=1
COPY Makefile requirements.lock ./
RUN make PYTHON=python3.11 .venv/.installed
# Compiled apart from the rest of the sources, which change more often.
COPY cuda_ops cuda_ops
RUN make operators

FROM base
RUN useradd --create-home --uid 1000 detr \
    && mkdir --parents /data /runs \
    && chown detr:detr /data /runs
COPY --from=environment /opt/deformable-detr/.venv .venv
COPY --from=environment /opt/deformable-detr/.build .build
COPY Makefile pyproject.toml requirements.lock README.md LICENSE ./
COPY cuda_ops cuda_ops
COPY data_prep data_prep
COPY model model
COPY pipeline pipeline
COPY jobs jobs
# `ray`, `mlflow`, `torchrun` and `python` are the environment's.
ENV PATH=/opt/deformable-detr/.venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER detr
VOLUME ["/data", "/runs"]
CMD ["python", "-m", "pipeline", "recipes"]
