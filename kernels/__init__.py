"""The contrastive loss: one public function, its backends and their oracle."""

from drama_dist.kernels.info_nce import InfoNCE, info_nce

__all__ = ["InfoNCE", "info_nce"]
