"""A teacher's scores of every query and passage, as the soft targets take them: vectors, and sparse logits beside them.

Covers their form, checks, and cutting out rows and columns. How raw scores are scaled is the caller's.
Shapes: B queries, N passages, T components, Z entries of the sparse matrix, R rows of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SparseLogits:
    """A B × N matrix in CSR form, 0 where nothing is stored.

    starts: int64 (B + 1), where each row's entries begin. columns: int32 or int64 (Z), ascending in every row.
    values: float32 (Z).
    """

    starts: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor

    def to(self, device: torch.device) -> SparseLogits:
        """The same on another device."""
        return SparseLogits(self.starts.to(device), self.columns.to(device), self.values.to(device))

    def detached(self) -> SparseLogits:
        """The same without graph."""
        return SparseLogits(self.starts, self.columns, self.values.detach())

    def of_rows(self, rows: slice) -> SparseLogits:
        """The matrix of some rows."""
        starts = self.starts[rows.start : rows.stop + 1]
        entries = slice(*starts[[0, -1]].tolist())
        return SparseLogits(starts - starts[0], self.columns[entries], self.values[entries])

    def of_columns(self, columns: slice) -> SparseLogits:
        """The matrix of some columns, counted from the first of them."""
        kept = (self.columns >= columns.start) & (self.columns < columns.stop)
        before = torch.cat([self.starts.new_zeros(1), kept.cumsum(0)])
        return SparseLogits(before[self.starts], self.columns[kept] - columns.start, self.values[kept])

    def row_of_entries(self) -> torch.Tensor:
        """int64 (Z)."""
        rows = torch.arange(len(self.starts) - 1, device=self.starts.device)
        return rows.repeat_interleave(self.starts.diff(), output_size=len(self.columns))

    def add_to(self, logits_BN: torch.Tensor) -> None:
        """In place, to a dense matrix."""
        at = self.row_of_entries(), self.columns.long()
        logits_BN[at] += self.values.to(logits_BN.dtype)


@dataclass(frozen=True)
class TeacherScores:
    """Logits m_ij = queries_i · passages_j + sparse_ij, of which the soft targets are the softmax over j.

    queries_BT, passages_NT: float32, with all scales folded in; T may be 0. A row's logits may be shifted: a softmax
    does not see it.
    """

    queries_BT: torch.Tensor
    passages_NT: torch.Tensor
    sparse: SparseLogits | None = None

    def to(self, device: torch.device) -> TeacherScores:
        """The same on another device."""
        sparse = None if self.sparse is None else self.sparse.to(device)
        return TeacherScores(self.queries_BT.to(device), self.passages_NT.to(device), sparse)

    def detached(self) -> TeacherScores:
        """The same without graph."""
        sparse = None if self.sparse is None else self.sparse.detached()
        return TeacherScores(self.queries_BT.detach(), self.passages_NT.detach(), sparse)

    def logits(self, rows: slice, precision: torch.dtype) -> torch.Tensor:
        """R × N, of some rows, in a precision."""
        logits_RN = self.queries_BT[rows].to(precision) @ self.passages_NT.to(precision).T
        if self.sparse is not None:
            self.sparse.of_rows(rows).add_to(logits_RN)
        return logits_RN

    def check(self, queries: torch.Tensor, passages: torch.Tensor) -> None:
        """Raise ValueError where these are no scores of such queries and passages."""
        sides = {"queries_BT": (self.queries_BT, queries), "passages_NT": (self.passages_NT, passages)}
        for name, (vectors, student) in sides.items():
            if vectors.ndim != 2 or len(vectors) != len(student) or vectors.dtype != torch.float32:
                raise ValueError(
                    f"teacher.{name}: expected {len(student)} float32 vectors, got {tuple(vectors.shape)} "
                    f"{vectors.dtype}"
                )
            _check_device(f"teacher.{name}", vectors, queries)
        if self.queries_BT.shape[1] != self.passages_NT.shape[1]:
            raise ValueError(
                f"teacher: expected vectors of one length, got {self.queries_BT.shape[1]} for queries and "
                f"{self.passages_NT.shape[1]} for passages"
            )
        if self.sparse is not None:
            _check_sparse(self.sparse, queries, len(passages))


def _check_device(name: str, tensor: torch.Tensor, queries: torch.Tensor) -> None:
    if tensor.device != queries.device:
        raise ValueError(f"{name}: expected it on {queries.device}, where the queries are, got {tensor.device}")


def _check_sparse(sparse: SparseLogits, queries: torch.Tensor, columns: int) -> None:
    if not isinstance(sparse, SparseLogits):
        raise ValueError(f"teacher.sparse: expected SparseLogits, got {type(sparse).__name__}")
    entries = len(sparse.columns)
    expected = {
        "starts": (sparse.starts, len(queries) + 1, (torch.int64,)),
        "columns": (sparse.columns, entries, (torch.int32, torch.int64)),
        "values": (sparse.values, entries, (torch.float32,)),
    }
    for name, (tensor, length, dtypes) in expected.items():
        if tensor.shape != (length,) or tensor.dtype not in dtypes:
            kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise ValueError(
                f"teacher.sparse.{name}: expected {length} of {kinds}, got {tuple(tensor.shape)} {tensor.dtype}"
            )
        _check_device(f"teacher.sparse.{name}", tensor, queries)
    starts = sparse.starts
    if int(starts[0]) != 0 or int(starts[-1]) != entries or bool((starts.diff() < 0).any()):
        raise ValueError(f"teacher.sparse.starts: expected to ascend from 0 to the {entries} entries")
    if not entries:
        return
    first, last = torch.stack(sparse.columns.aminmax()).tolist()
    if first < 0 or last >= columns:
        raise ValueError(f"teacher.sparse.columns: names columns {first}..{last} of {columns}")
    place = sparse.row_of_entries() * columns + sparse.columns
    if bool((place.diff() <= 0).any()):
        raise ValueError("teacher.sparse.columns: expected to ascend in every row, each column once")
