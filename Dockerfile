# A GPU machine of your own; README says how to use it. CUDA comes with PyTorch, so the host needs only
# NVIDIA's driver and its container toolkit. Without a GPU the image works on the CPU.
FROM python:3.12-slim

# make and git: for the targets of Makefile. g++: Triton and PyTorch compile small programs at run time.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ git make \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /hsa-mini
COPY . .
ENV PIP_NO_CACHE_DIR=1 PATH=/hsa-mini/.venv/bin:$PATH
RUN make setup

CMD ["hsa-mini", "demo"]
