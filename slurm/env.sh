# shellcheck shell=bash
# The environment of a job's ranks. slurm/train.sbatch sources this file on the job's first node before it starts
# anything; srun passes the variables to every rank. Values that the shell has set already take precedence. A site can
# name its own file in launcher.env_file.

# --- NCCL, the GPUs' collectives -------------------------------------------------------------------------------------
# an error on one rank ends the others' collectives within trainer.timeout_minutes, instead of never
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
# warnings name the node and the interface of a failed connection; INFO prints a page per rank
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# PyTorch's flight recorder keeps the last collectives of each rank: a time-out then shows which one a rank was in
export TORCH_NCCL_TRACE_BUFFER_SIZE=${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}

# --- the GPU ---------------------------------------------------------------------------------------------------------
# One hardware queue: kernels start in the order of their launch, which is required to overlap communication with
# computation under tensor and context parallelism (Megatron-LM requires it; not needed on Blackwell and later).
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# experts receive a different number of tokens at every step: expandable segments avoid fragmentation
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
# keep fp32 exact: NVIDIA's containers enable TF32 for all matrix products, including the router's
export TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=${TORCH_ALLOW_TF32_CUBLAS_OVERRIDE:-0}

# --- Python ----------------------------------------------------------------------------------------------------------
# a rank's output reaches its log at once, not when a buffer is full
export PYTHONUNBUFFERED=1
# the threads of the tokenizers library conflict with forked data workers; without this every rank prints a warning
export TOKENIZERS_PARALLELISM=false
# a job downloads nothing: a node without internet access would wait for minutes
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}

# --- settings of a site (uncomment) ----------------------------------------------------------------------------------
# the interface of the first connections, if nodes have several and the first is slow or blocked
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# the InfiniBand adapters of the GPUs, if others are for storage
# export NCCL_IB_HCA=mlx5_0,mlx5_1
# a fast shared folder for Triton's compiled kernels, instead of every rank's home
# export TRITON_CACHE_DIR=/scratch/$USER/triton
# software outside a container: load modules, then the environment with mixtrain
# module load cuda/13.0
# source /path/to/mixtrain/.venv/bin/activate
