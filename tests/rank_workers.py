"""Real gloo ranks for the tests: mixtrain.engine.forked_ranks, by a short name."""

# what a run imports on its way, imported once, here, and not in every rank
import matplotlib.backends.backend_agg  # noqa: F401
import matplotlib.figure  # noqa: F401
import megatron.core.datasets.gpt_dataset  # noqa: F401

import mixtrain.training.measured_step  # noqa: F401
import mixtrain.training.preflight.check  # noqa: F401
from mixtrain.engine.forked_ranks import RankFailure, run_ranks

__all__ = ["RankFailure", "run_ranks"]
