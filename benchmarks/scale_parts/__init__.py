"""The parts of `benchmarks/scale.py`.

`timeline`, `engines`, `partners`, `rollouts` and `simulation` run the real loops on virtual time, `use` and
`nemo` ask them their questions; `driver` and `ray_engines` measure the driver's process on the real clock.
"""
