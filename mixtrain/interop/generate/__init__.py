"""Continuing prompts from a checkpoint, at any layout: what to generate, with which plan, and the loop that does it.

Rule: what a prompt is continued with follows from the weights, the prompt and the seed, and not from the layout or from
the prompts beside it.
"""
