"""Merge methods, one file per method or tight family: metadata, recipe and float64 oracle.

A recipe says which statistics and stages a method is made of; an oracle computes the same from the
paper with plain torch and shares nothing with the recipe or the kernels. `registry.methods()`
imports every module here.
"""
