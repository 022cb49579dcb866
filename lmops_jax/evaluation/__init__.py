"""Figures of merit: losses, rank correlations, accuracies, learning curves and scaling-law fits.

Every module is plain functions of numbers; only `lm` touches an accelerator.
"""
