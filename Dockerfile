# syntax=docker/dockerfile:1
# The image of the service, for every node of a cluster: head, CPU workers, GPU workers.
#
#   GPU:  docker build -t viewmesh:0.1.0 .
#   CPU:  docker build -t viewmesh:0.1.0-cpu --build-arg BASE=ubuntu:24.04 \
#             --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu --build-arg EXTRAS=postgres,s3 .
#
# What is not in it: weights (mount them at /weights), API keys (/etc/viewmesh/keys), jobs (/data), compiled kernels (/cache).

# Both bases are Ubuntu 24.04, so that one list of packages and its Python 3.12 serve both images.
ARG BASE=nvidia/cuda:13.0.1-runtime-ubuntu24.04
# nvdiffrast compiles CUDA code: with NVDIFFRAST=1 this must be nvidia/cuda:13.0.1-devel-ubuntu24.04.
ARG BUILD_BASE=ubuntu:24.04

# --- build: a virtual environment with the pinned versions, which the second stage copies ----------------------------
FROM ${BUILD_BASE} AS build
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates=20* git=1:2.43.* g++=4:13.2.* ninja-build=1.11.* \
        python3.12=3.12.3-* python3.12-dev=3.12.3-* python3.12-venv=3.12.3-* \
    && rm -rf /var/lib/apt/lists/*

RUN python3.12 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH

WORKDIR /opt/viewmesh
COPY constraints.txt ./
# torch alone in a layer of its own: it is most of the image and changes least. PyPI's has CUDA in it.
ARG TORCH_INDEX=https://pypi.org/simple
# hadolint ignore=DL3013
RUN pip install --no-cache-dir --index-url "${TORCH_INDEX}" --extra-index-url https://pypi.org/simple \
        "$(grep -i '^torch==' constraints.txt)" -c constraints.txt

# The versions of all that pip installs are in constraints.txt, which hadolint does not read.
# The licence of nvdiffrast is non-commercial: whoever switches it on accepts it. Without it our own rasteriser draws.
ARG NVDIFFRAST=0
ARG NVDIFFRAST_REF=v0.4.0
# The kinds of GPU to compile for; a build has no GPU to ask. 8.0 A100, 8.6 A10, 8.9 L4 and L40S, 9.0 H100 and H200.
ARG TORCH_CUDA_ARCH_LIST="8.0;8.6;8.9;9.0"
# hadolint ignore=DL3013
RUN if [ "${NVDIFFRAST}" = 1 ]; then \
        pip install --no-cache-dir -c constraints.txt setuptools wheel ninja \
        && pip install --no-cache-dir --no-build-isolation -c constraints.txt \
            "git+https://github.com/NVlabs/nvdiffrast@${NVDIFFRAST_REF}"; \
    fi

COPY pyproject.toml README.md LICENSE serve_config.yaml ./
COPY viewmesh viewmesh
COPY deployments deployments
COPY serve_app serve_app
ARG EXTRAS=gpu,postgres,s3
# boto3: `ray up` on AWS starts nodes from the head, which runs this image.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir -c constraints.txt ".[${EXTRAS}]" boto3

# The config that the image serves by default: the repository's, with keys required.
RUN mkdir -p /etc/viewmesh \
    && sed 's#^\( *keys_file:\) null#\1 /etc/viewmesh/keys/keys.yaml#' serve_config.yaml > /etc/viewmesh/serve_config.yaml \
    && grep -q 'keys_file: /etc/viewmesh/keys/keys.yaml' /etc/viewmesh/serve_config.yaml \
    && viewmesh config check /etc/viewmesh/serve_config.yaml

# --- runtime ---------------------------------------------------------------------------------------------------------
FROM ${BASE} AS runtime
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# gcc and the headers: Triton and torch.compile build their launchers when a model warms up.
# openssh-client and rsync: `ray up`; wget: KubeRay's probes.
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
        ca-certificates=20* gcc=4:13.2.* libc6-dev=2.39-* libstdc++6=14* libgomp1=14* \
        openssh-client=1:9.6p1-* python3.12=3.12.3-* python3.12-dev=3.12.3-* rsync=3.2.7-* wget=1.21.4-* \
    && rm -rf /var/lib/apt/lists/*

# A number, so that Kubernetes can check runAsNonRoot. 1000 is taken in Ubuntu's image.
RUN groupadd --gid 10001 viewmesh \
    && useradd --uid 10001 --gid 10001 --create-home --shell /bin/bash viewmesh \
    && install -d -o 10001 -g 10001 /data /cache /weights

COPY --from=build /opt/venv /opt/venv
COPY --from=build /etc/viewmesh /etc/viewmesh
COPY constraints.txt LICENSE /opt/viewmesh/

# Ray: token authentication whatever the version's default is; no usage reports, no package manager in front of workers.
# Kernels compiled by Inductor, Triton and numba are kept in /cache: the next start of a model takes seconds.
# Models never come over the network at run time: `viewmesh weights download` is a step of its own (HF_HUB_OFFLINE=0).
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    VIEWMESH_WEIGHTS=/weights \
    HF_HUB_OFFLINE=1 \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    TRITON_CACHE_DIR=/cache/triton \
    NUMBA_CACHE_DIR=/cache/numba \
    THP_MEM_ALLOC_ENABLE=1 \
    GOMP_SPINCOUNT=2000 \
    PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True \
    RAY_AUTH_MODE=token \
    RAY_USAGE_STATS_ENABLED=0 \
    RAY_ENABLE_UV_RUN_RUNTIME_ENV=0 \
    RAY_SERVE_ENABLE_HA_PROXY=1 \
    RAY_SERVE_HAPROXY_METRICS_ENABLED=0 \
    RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S=1 \
    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve_app.ingress:middlewares \
    RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD=0

VOLUME ["/data", "/cache", "/weights"]
USER 10001:10001
WORKDIR /home/viewmesh
EXPOSE 8000
STOPSIGNAL SIGTERM
# The first start of the graph takes a while; after that three failures in a minute and a half mean that it is gone.
HEALTHCHECK --interval=30s --timeout=6s --start-period=180s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/livez', timeout=5)"]
# No entry point: KubeRay and `ray up` run this image with commands of their own.
ENTRYPOINT []
# A public address without a keys file is refused: mount one, written by `viewmesh config key`.
CMD ["viewmesh", "serve", "--host", "0.0.0.0", "--port", "8000", "--data", "/data", "--config", "/etc/viewmesh/serve_config.yaml"]
