"""From files to kernels and back: rings of memory, threads that move bytes, a device's streams.

`ring` reads ahead of the kernels and writes behind them; `upload` and `download` put a device between.
"""
