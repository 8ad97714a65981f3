"""The losses with their backends and their oracle (info_nce/), and Llama's layers for the CPU (llama_cpu/)."""

from drama_dist.kernels.info_nce.backends import Backend, select_backend
from drama_dist.kernels.info_nce.loss import InfoNCE, info_nce
from drama_dist.kernels.info_nce.problem import ColumnPart
from drama_dist.kernels.info_nce.soft_targets import SoftTargets, soft_targets
from drama_dist.kernels.info_nce.teacher import SparseLogits, TeacherScores

__all__ = [
    "Backend",
    "ColumnPart",
    "InfoNCE",
    "SoftTargets",
    "SparseLogits",
    "TeacherScores",
    "info_nce",
    "select_backend",
    "soft_targets",
]
