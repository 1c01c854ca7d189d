"""Work with other people's models: conversion to and from Hugging Face, and generation.

May import: launch, training and everything below.
Does not belong here: anything that a training run needs.
"""
