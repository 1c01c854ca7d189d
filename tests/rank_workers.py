"""Real gloo ranks for the tests: mixtrain.forked_ranks, by a short name."""

from mixtrain.forked_ranks import RankFailure, run_ranks

__all__ = ["RankFailure", "run_ranks"]
