"""Other people's models: conversion from and to Hugging Face, and generation.

May import: launch, training and everything below.
Does not belong here: what a training run needs.
"""
