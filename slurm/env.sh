# shellcheck shell=bash
# What a job's ranks find in their environment. Sourced by slurm/train.sbatch on the job's first node, before anything is
# started; srun hands it to every rank. A site's own file is named by launcher.env_file; what a shell has set already wins.

# --- NCCL, the GPUs' collectives -------------------------------------------------------------------------------------
# a fault on one rank ends the others' collectives with an error within trainer.timeout_minutes, instead of for ever
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
# warnings name the node and the interface that a connection failed on; INFO is a page a rank
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# the last collectives of each rank are kept, so that a time-out says which one a rank was in (PyTorch's flight recorder)
export TORCH_NCCL_TRACE_BUFFER_SIZE=${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}

# --- the GPU ---------------------------------------------------------------------------------------------------------
# one hardware queue: kernels start in the order they were given, which overlapping communication with computation needs
# under tensor and context parallelism (Megatron-LM asks for it; on Blackwell and later it is not needed)
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
# experts are sent another number of tokens at every step: growing segments are not left behind in pieces
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
# fp32 means fp32: NVIDIA's containers turn TF32 on for all matrix products, the router's too
export TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=${TORCH_ALLOW_TF32_CUBLAS_OVERRIDE:-0}

# --- Python ----------------------------------------------------------------------------------------------------------
# a rank's log has its lines when they are printed, not when a buffer is full
export PYTHONUNBUFFERED=1
# tokenizers' threads and the data workers' forks do not go together; its own warning says so on every rank
export TOKENIZERS_PARALLELISM=false
# nothing is fetched in a job: a node without a way out would wait for minutes
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}

# --- what a site knows (take out the mark) ---------------------------------------------------------------------------
# the interface of the first connections, where nodes have several and the first is a slow or a closed one
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0
# the InfiniBand adapters that belong to the GPUs, where others are for storage
# export NCCL_IB_HCA=mlx5_0,mlx5_1
# a shared and fast folder for Triton's compiled kernels, instead of every rank's home
# export TRITON_CACHE_DIR=/scratch/$USER/triton
# software that is not in a container: a module, then the environment that has mixtrain
# module load cuda/13.0
# source /path/to/mixtrain/.venv/bin/activate
