"""Autograd-free modules that stand for chains of layers and for whole blocks."""
