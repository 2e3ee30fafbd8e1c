# Two images of one file: `cpu`, which is built where no target is named, and `cuda`.

# The interpreter of the lock files. For `cuda` too: torch's wheels bring CUDA's libraries, another CUDA below them
# would be as big again, and be used by nobody.
FROM python:3.11-slim-bookworm AS tools

# Where packages come from, where it is not the default of pip and uv.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS

# The image's user can't write bytecode beside the code, and would compile all of it at every start.
ENV UV_DEFAULT_INDEX=${PIP_INDEX_URL} \
    UV_INDEX=${PIP_EXTRA_INDEX_URL} \
    UV_FIND_LINKS=${PIP_FIND_LINKS} \
    UV_COMPILE_BYTECODE=1 \
    UV_LINK_MODE=copy \
    UV_SYSTEM_CERTS=1 \
    VIRTUAL_ENV=/venv

RUN python3 -m venv /uv \
    && /uv/bin/python -m pip install --no-cache-dir --disable-pip-version-check uv==0.13.9 \
    && python3 -m venv --without-pip /venv
WORKDIR /build


# Lock files hold every package, so nothing is resolved.
FROM tools AS cpu-packages
COPY requirements/cpu.txt requirements/image-excludes.txt ./
# As `make setup` does: torch's CPU build comes from PyTorch's own index where the configured one has none.
RUN --mount=type=cache,target=/root/.cache/uv \
    set -- --no-deps --excludes image-excludes.txt -r cpu.txt \
    && { /uv/bin/uv pip install "$@" || /uv/bin/uv pip install --torch-backend cpu "$@"; }


FROM tools AS cuda-packages
COPY requirements/cuda.txt ./
# A directory of wheels may hold torch's CPU build, which satisfies the same pin.
RUN --mount=type=cache,target=/root/.cache/uv \
    /uv/bin/uv pip install --no-deps -r cuda.txt \
    && /venv/bin/python -c "import torch; assert torch.version.cuda, torch.__version__"


FROM tools AS wheel
COPY . .
RUN /uv/bin/uv build --wheel --build-constraints requirements/cpu.txt --no-cache --out-dir /dist


FROM python:3.11-slim-bookworm AS runtime

LABEL org.opencontainers.image.title="Trimtab" \
      org.opencontainers.image.description="An inference server in which one tiny control model steers many LLMs" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="0.1.0"

# vLLM's CPU kernels link libnuma1. g++ is for what is compiled at run time: by torch.compile, which vLLM uses for
# logprobs even under `enforce-eager` (without a compiler the first request that asks for them ends the engine), and
# by Triton on GPUs.
# Unpinned: Debian keeps only the newest build of each, so that a pinned one is gone after its next fix.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home --home-dir /var/lib/trimtab trimtab

ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1
WORKDIR /var/lib/trimtab
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["trimtab"]
CMD ["serve", "/etc/trimtab/config.yaml"]


FROM runtime AS cuda
# What vLLM asks of NVIDIA's container runtime: CUDA and NVML. FlashInfer's sampler would be compiled at the first
# request, with the nvcc of the lock file, which does not take the headers of torch's CUDA.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    VLLM_USE_FLASHINFER_SAMPLER=0
COPY --from=cuda-packages /venv /venv
# A layer of its own, so that a change of ours is a small one.
RUN --mount=type=bind,from=tools,source=/uv,target=/uv \
    --mount=type=bind,from=wheel,source=/dist,target=/dist \
    /uv/bin/uv pip install --python /venv --no-cache --no-deps --compile-bytecode /dist/*.whl
# By number: Kubernetes can't tell from a name that it is not root.
USER 1000:1000


FROM runtime AS cpu
COPY --from=cpu-packages /venv /venv
RUN --mount=type=bind,from=tools,source=/uv,target=/uv \
    --mount=type=bind,from=wheel,source=/dist,target=/dist \
    /uv/bin/uv pip install --python /venv --no-cache --no-deps --compile-bytecode /dist/*.whl
USER 1000:1000
