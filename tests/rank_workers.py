"""Real gloo ranks for the tests: mixtrain.forked_ranks, by a short name."""

# what a run imports on its way, imported once, here, and not in every rank
import matplotlib.backends.backend_agg  # noqa: F401
import matplotlib.figure  # noqa: F401
import megatron.core.datasets.gpt_dataset  # noqa: F401

import mixtrain.parity.measure  # noqa: F401
import mixtrain.preflight.check  # noqa: F401
from mixtrain.forked_ranks import RankFailure, run_ranks

__all__ = ["RankFailure", "run_ranks"]
