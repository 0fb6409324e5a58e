"""The parts of `benchmarks/gpu.py`. Each takes its folder and the size of the model, and returns figures."""
