# The image for a cluster: NVIDIA's PyTorch with CUDA, NCCL, Transformer Engine and Apex, and beside it what mixtrain needs.
#
#   docker build -t mixtrain . && docker run --rm --gpus all mixtrain
#   enroot import -o mixtrain.sqsh dockerd://mixtrain:latest
#
# 26.06: Python 3.12, PyTorch 2.13, as constraints.txt has them. By digest, because a tag may be moved.
FROM nvcr.io/nvidia/pytorch:26.06-py3@sha256:43c018d6a12963f1a1bad85ef8574b5c2a978eec2be0ebcacfb87f69e0d210e1

# fp32 means fp32: NVIDIA turns TF32 on for all matrix products, the router's too. Lines of a log come when they are
# printed. Nothing is fetched at run time. A home that any user may write to, whoever the container is run as.
ENV TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=0 \
    PYTHONUNBUFFERED=1 \
    HF_HUB_OFFLINE=1 \
    HOME=/tmp

WORKDIR /opt/mixtrain

# What the image lacks, at the versions of constraints.txt; what it has (PyTorch, NumPy, Transformer Engine ...) is kept by
# the image's own constraints in /etc/pip/constraint.txt. The last five are there, at versions that are NVIDIA's to choose.
# hadolint ignore=DL3013
RUN python -m pip install --no-cache-dir \
        megatron-core==0.19.2 \
        hydra-core==1.3.8 \
        datasets==5.2.0 \
        transformers==5.23.0 \
        tokenizers==0.23.3 \
        safetensors==0.8.0 \
        einops psutil tensorboard rich matplotlib

COPY . .
RUN python -m pip install --no-cache-dir --no-deps --no-build-isolation -e . \
    && chmod -R a+rX /opt/mixtrain

# Nothing here asks for root; under pyxis and enroot it is the user who has submitted the job anyway.
USER 1000:1000

HEALTHCHECK --interval=5m --timeout=30s CMD ["python", "/opt/mixtrain/train.py", "trainer.mode=plan"]
CMD ["python", "train.py", "trainer.mode=plan"]
