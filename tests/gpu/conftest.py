from tests.ray.conftest import ray_cluster, tiny_model

__all__ = ["ray_cluster", "tiny_model"]
