"""Kernels in Triton, for GPUs without a compiled backend and for stages that a method brings itself.

Installed as `fastmerge.triton_kernels`; imports torch and triton only. docs/numerics.md is the definition
of what they compute; `fastmerge.backends.triton` lowers stages to their arguments. Addresses are plain
integers, cast inside the kernels, so that memory of any owner, and host memory under Triton's interpreter,
is served alike.
"""
