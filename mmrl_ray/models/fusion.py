"""The import path that `mmrl_ray.reward_model.fusion` had before."""

from mmrl_ray.reward_model.fusion import (
    AttentionFusion,
    CoupledEncodersFusion,
    Fused,
    Fusion,
    SharedAttentionFusion,
    WeightedSumFusion,
    build_fusion,
)

__all__ = [
    "AttentionFusion",
    "CoupledEncodersFusion",
    "Fused",
    "Fusion",
    "SharedAttentionFusion",
    "WeightedSumFusion",
    "build_fusion",
]
