"""`python -m mmrl_ray.cli`."""

from mmrl_ray.cli import main

main()
