"""Enumerations: the values of keys that take one of a few names, as the YAML has them. No torch."""

from enum import Enum


class Accelerator(Enum):
    cpu = 1
    gpu = 2


class Mode(Enum):
    train = 1
    plan = 2
    preflight = 3


class Preflight(Enum):
    auto = 1
    always = 2
    never = 3


class LauncherType(Enum):
    auto = 1
    local = 2
    slurm = 3


class Precision(Enum):
    fp32 = 1
    bf16 = 2
    fp8 = 3


class TransformerImpl(Enum):
    torch = 1
    local = 2
    transformer_engine = 3


class QkLayernormOver(Enum):
    head = 1
    projection = 2


class AttnBackend(Enum):
    auto = 1
    flash = 2
    fused = 3
    unfused = 4


class Balancing(Enum):
    aux_loss = 1
    seq_aux_loss = 2
    global_aux_loss = 3
    sinkhorn = 4
    none = 5
    balanced = 6


class ScoreFunction(Enum):
    softmax = 1
    sigmoid = 2


class RouterDtype(Enum):
    fp32 = 1
    fp64 = 2


class Dispatcher(Enum):
    alltoall = 1
    allgather = 2
    flex = 3


class FlexBackend(Enum):
    deepep = 1
    hybridep = 2


class DropPolicy(Enum):
    probs = 1
    position = 2


class OptimizerName(Enum):
    adam = 1
    sgd = 2


class DecayStyle(Enum):
    constant = 1
    linear = 2
    cosine = 3
    locals()["inverse-square-root"] = 4  # not a Python identifier
    WSD = 5


class WsdDecayStyle(Enum):
    linear = 1
    cosine = 2
    exponential = 3
    minus_sqrt = 4


class Sharding(Enum):
    optim = 1
    optim_grads = 2
    optim_grads_params = 3


class Fp8Recipe(Enum):
    delayed = 1
    tensorwise = 2
    blockwise = 3
    mxfp8 = 4


class DataKind(Enum):
    stdlib = 1
    indexed = 2
    mock = 3


class Granularity(Enum):
    full = 1
    selective = 2


class RecomputeMethod(Enum):
    uniform = 1
    block = 2


class BadStep(Enum):
    stop = 1
    skip = 2


class Resume(Enum):
    auto = 1
    must = 2
    never = 3


class Verify(Enum):
    full = 1
    size = 2
