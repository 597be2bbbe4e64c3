# DHEN on NVIDIA GPUs. Build and run it in the root of the repository; the host needs NVIDIA's container toolkit:
#
#     docker build --file tools/docker/cuda.Dockerfile --tag dhen:cuda .
#     docker run --rm --gpus all --ipc host --volume "$PWD/runs:/dhen/runs" dhen:cuda \
#         deepspeed recipes/train.py --ds_config ds_configs/zero2.json
#
# DeepSpeed compiles its extensions with the image's CUDA, which must be the version that torch was built with: 13.0.
FROM nvidia/cuda:13.0.3-devel-ubuntu24.04

RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /dhen
COPY pyproject.toml requirements-cuda.txt README.md LICENSE ./
COPY dhen dhen
ENV PATH=/venv/bin:$PATH
RUN python3 -m venv /venv \
    && pip install --no-cache-dir --requirement requirements-cuda.txt

COPY ds_configs ds_configs
COPY recipes recipes
COPY tools tools
CMD ["bash"]
