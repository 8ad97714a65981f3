"""The contrastive loss with its backends and their oracle (info_nce/), and Llama's layers for the CPU (llama_cpu/)."""

from drama_dist.kernels.info_nce.backends import Backend, select_backend
from drama_dist.kernels.info_nce.loss import InfoNCE, info_nce
from drama_dist.kernels.info_nce.problem import ColumnPart

__all__ = ["Backend", "ColumnPart", "InfoNCE", "info_nce", "select_backend"]
