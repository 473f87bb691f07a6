# The image of a generator (vLLM) or learner on NVIDIA GPUs:
#   docker build --build-arg SERVICE=generator --build-arg EXTRA=vllm -f deploy/docker/gpu.Dockerfile -t longshore-generator-gpu .
# The CUDA libraries come with torch's wheels, the driver from the host (NVIDIA container toolkit).
ARG BASE=python:3.11-slim

# A stage of its own: while its result is the same, the libraries' layer below is too, whatever else pyproject.toml says.
FROM ${BASE} AS requirements
ARG SERVICE
# What is installed, by the extras of pyproject.toml.
ARG EXTRA=${SERVICE}
COPY pyproject.toml deploy/docker/requirements.py ./
RUN test -n "${SERVICE}" || { echo "say which service: --build-arg SERVICE=generator"; exit 1; } \
    && python3 requirements.py pyproject.toml "${EXTRA}" > requirements.txt

FROM ${BASE} AS tools
RUN apt-get update -qq \
    && headers="$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" \
    && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends gcc libc6-dev binutils \
        $(test -f "$headers" || echo python3-dev) >/dev/null \
    && rm -rf /var/lib/apt/lists/*

# The same for every service, so it is built once.
FROM tools AS wheel
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
WORKDIR /src
COPY pyproject.toml constraints.txt hatch_build.py README.md LICENSE ./
COPY services services
# hatchling is called by itself: pip would have it build everything twice, once for the metadata.
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --target /hatchling hatchling \
    && PYTHONPATH=/hatchling python3 -m hatchling build --target wheel --directory /wheel

FROM tools AS build
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
WORKDIR /src
COPY deploy/docker/wheels wheels
COPY --from=requirements requirements.txt ./
# Without constraints.txt: vLLM wants other versions of what it shares with the rest.
RUN --mount=type=cache,target=/root/.cache/pip \
    python3 -m venv --without-pip /opt/longshore \
    && python3 -m pip --python /opt/longshore/bin/python install --no-compile --disable-pip-version-check \
        --find-links wheels \
        --requirement requirements.txt
COPY deploy/docker/slim.sh ./
RUN sh slim.sh /opt/longshore
COPY --from=wheel wheel wheel
COPY deploy/docker/compile.sh ./
ARG SERVICE
RUN python3 -m pip --python /opt/longshore/bin/python install --no-compile --disable-pip-version-check --no-deps \
        --no-index wheel/*.whl \
    && test -n "$(find /opt/longshore -name _kernel.so)" \
    && sh compile.sh /opt/longshore "${SERVICE}"

FROM ${BASE}
ARG SERVICE
# Triton compiles a launcher for each kernel on the machine where it runs: this image alone keeps a C compiler.
RUN apt-get update -qq \
    && headers="$(python3 -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" \
    && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends gcc libc6-dev \
        $(test -f "$headers" || echo python3-dev) >/dev/null \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 10001 longshore \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin longshore \
    && install -d -o 10001 -g 10001 -m 0700 /run/longshore /var/lib/longshore /var/lib/longshore/runs \
        /var/lib/longshore/state /var/lib/longshore/weights
COPY --from=build /opt/longshore /opt/longshore
COPY --chmod=0755 deploy/docker/healthcheck.py /opt/longshore/bin/healthcheck
ENV PATH=/opt/longshore/bin:$PATH \
    HOME=/tmp \
    MPLCONFIGDIR=/tmp/matplotlib \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility \
    LONGSHORE_METRICS_LISTEN=0.0.0.0:9100 \
    LONGSHORE_SERVICE=${SERVICE}
USER 10001:10001
WORKDIR /tmp
HEALTHCHECK --interval=20s --timeout=20s --start-period=300s --retries=3 CMD ["healthcheck"]
ENTRYPOINT ["longshore"]
CMD ["serve"]
