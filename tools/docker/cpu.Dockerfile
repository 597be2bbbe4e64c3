# DHEN on CPU. Build and run it in the root of the repository:
#
#     docker build --file tools/docker/cpu.Dockerfile --tag dhen:cpu .
#     docker run --rm --volume "$PWD/runs:/dhen/runs" dhen:cpu \
#         deepspeed -q --num_gpus 2 recipes/train.py --ds_config ds_configs/zero2.json
#
# On x86, pip's torch comes with CUDA's libraries, which this image does not need. To leave them out, add
# --build-arg PIP_EXTRA_INDEX_URL=… with the address of PyTorch's package index for CPU.
FROM python:3.12-slim

# DeepSpeed compiles its extensions when they are first used.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /dhen
COPY pyproject.toml requirements.txt README.md LICENSE ./
COPY dhen dhen
ARG PIP_EXTRA_INDEX_URL
RUN pip install --no-cache-dir --requirement requirements.txt

COPY ds_configs ds_configs
COPY recipes recipes
COPY tools tools
ENV DS_ACCELERATOR=cpu
CMD ["bash"]
