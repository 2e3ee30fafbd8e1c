FROM python:3.11-slim-bookworm AS dependencies

# Where packages come from, where it is not the default of pip and uv.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
ARG UV_DEFAULT_INDEX=${PIP_INDEX_URL}
ARG UV_INDEX=${PIP_EXTRA_INDEX_URL}
ARG UV_FIND_LINKS=${PIP_FIND_LINKS}

# The image's user can't write bytecode beside the code, and would compile all of it at every start.
ENV UV_COMPILE_BYTECODE=1 \
    UV_LINK_MODE=copy \
    UV_SYSTEM_CERTS=1 \
    VIRTUAL_ENV=/venv

RUN python3 -m venv /uv \
    && /uv/bin/python -m pip install --no-cache-dir --disable-pip-version-check uv==0.13.9 \
    && python3 -m venv --without-pip /venv

WORKDIR /build
COPY requirements requirements
# As `make setup` does: the lock file holds every package, and torch's CPU build comes from PyTorch's own index
# where the configured one has none.
RUN --mount=type=cache,target=/root/.cache/uv \
    set -- --no-deps --excludes requirements/image-excludes.txt -r requirements/cpu.txt \
    && { /uv/bin/uv pip install "$@" || /uv/bin/uv pip install --torch-backend cpu "$@"; }


FROM dependencies AS build
COPY . .
RUN /uv/bin/uv build --wheel --no-build-isolation --no-cache --out-dir /dist


FROM python:3.11-slim-bookworm

# vLLM's CPU kernels link libnuma1. g++ is for torch.compile: vLLM uses it for logprobs even under `enforce-eager`, and
# without a compiler the first request that asks for them ends the engine.
# Unpinned: Debian keeps only the newest build of each, so that a pinned one is gone after its next fix.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 \
    && rm -rf /var/lib/apt/lists/*

RUN useradd --uid 1000 --create-home --home-dir /var/lib/trimtab trimtab
COPY --from=dependencies /venv /venv
# A layer of its own, so that a change of ours is a small one.
RUN --mount=type=bind,from=dependencies,source=/uv,target=/uv \
    --mount=type=bind,from=build,source=/dist,target=/dist \
    /uv/bin/uv pip install --python /venv --no-cache --no-deps --compile-bytecode /dist/*.whl

ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1
WORKDIR /var/lib/trimtab
# By number: Kubernetes can't tell from a name that it is not root.
USER 1000:1000
EXPOSE 8000
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["trimtab"]
CMD ["serve", "/etc/trimtab/config.yaml"]
