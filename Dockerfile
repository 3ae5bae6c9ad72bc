# Serves a bundle on a CPU:
#   docker build -t shadowllm .
#   docker run --rm -p 127.0.0.1:8000:8000 -v "$PWD/out/bundle:/bundle:ro" shadowllm
FROM python:3.13-slim AS build
# The compiler is not in the image, so any version of it will do.
# hadolint ignore=DL3008
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN python -m venv /venv
# PyTorch first. Its default build has gigabytes of CUDA; --build-arg PIP_EXTRA_INDEX_URL=... names an index with a CPU build.
ARG TORCH=torch==2.13.0
ARG PIP_EXTRA_INDEX_URL
RUN /venv/bin/pip install --no-cache-dir "$TORCH"
COPY . /source
RUN /venv/bin/pip install --no-cache-dir '/source[onnxruntime,serve]'

FROM python:3.13-slim
RUN useradd --no-create-home --uid 10001 shadowllm
COPY --from=build /venv /venv
# A number, so that a host can check that it is not root.
USER 10001
ENV PATH=/venv/bin:$PATH HF_HUB_OFFLINE=1
EXPOSE 8000
# Inside the container it listens on all addresses; `docker run -p` decides who can reach it.
ENTRYPOINT ["shadowllm", "serve", "/bundle", "--host", "0.0.0.0"]
