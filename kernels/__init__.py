"""The contrastive loss: one public function, its backends and their oracle."""

from drama_dist.kernels.info_nce import InfoNCE, info_nce
from drama_dist.kernels.problem import ColumnPart, Distillation, TeacherMargin

__all__ = ["ColumnPart", "Distillation", "InfoNCE", "TeacherMargin", "info_nce"]
