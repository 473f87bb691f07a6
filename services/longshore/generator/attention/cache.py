"""Keys and values in pages, and attention over them: rows of any sequences in one call, a row a token.

A row's position says how much of its sequence it sees. So a decode step, the prefill of many prompts, and the rest of a
prompt whose beginning is cached already are one thing, and nothing is padded. The kernel works row by row, which suits
short runs of rows; long ones go to torch's attention, which works on blocks.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from longshore.generator.attention import native
from longshore.generator.llama_config import LlamaShape
from longshore.generator.pages import PAGE
from longshore.generator.rope import rope_tables, rotate

FLOAT_BYTES = 4
# Rows of one sequence from which torch's attention is faster.
LONG_RUN = 256
# Most entries of one mask: rows that do not begin at their sequence's beginning are taken in blocks.
MOST_MASKED = 1 << 22
# Rows that are worth a second thread.
SHARED_ROWS = 16


@dataclass(frozen=True)
class Rows:
    """The tokens that a forward pass computes.

    Example: two sequences that decode and one with three tokens of its prompt:
    Rows(tensor([4, 7, 2, 2, 2]), tensor([30, 5, 0, 1, 2]), ((2, 5),))
    """

    # [rows] int64: which line of the tables a row's sequence has, and its position there.
    sequence: Tensor
    position: Tensor
    # Rows first..last-1 of a sequence, where there are more than one to it, each one position after the one before.
    runs: tuple[tuple[int, int], ...] = ()


def page_bytes(shape: LlamaShape) -> int:
    """Bytes of one page in all layers."""
    return PAGE * shape.num_layers * 2 * shape.num_kv_heads * shape.head_dim * FLOAT_BYTES


class PagedCache:
    """The cache of all layers, for `sequences` sequences of up to `context` tokens."""

    def __init__(
        self, shape: LlamaShape, pages: int, sequences: int, context: int, kernel: native.Kernel | None
    ) -> None:
        """
        Args:
            kernel: None for plain torch, which also serves head dims that the kernel does not.
        """
        self.shape = shape
        dim = shape.head_dim
        fits = dim % native.DIMS_MULTIPLE == 0 and dim <= native.MOST_DIMS
        self._kernel = kernel if fits else None
        # The system gives the memory of a page when it is first used; pages in use are the lowest numbers.
        self._layers = [torch.zeros(pages, shape.num_kv_heads, 2, PAGE * dim) for _ in range(shape.num_layers)]
        # [sequences, pages of a whole context] which pages a sequence has.
        self.tables = torch.zeros(sequences, -(-context // PAGE), dtype=torch.long)
        self._cos, self._sin = rope_tables(shape, context)
        self._second = ThreadPoolExecutor(1, thread_name_prefix="attend") if torch.get_num_threads() > 1 else None

    def close(self) -> None:
        if self._second is not None:
            self._second.shutdown()

    def store(self, layer: int, qkv: Tensor, rows: Rows) -> None:
        """Writes the rows' keys and values; rotates the queries where they are.

        Args:
            qkv: [rows, heads + 2 * kv_heads, dim], contiguous.
        """
        if self._kernel is not None:
            self._kernel.store(ctypes.byref(self._batch(layer, qkv, qkv, rows)), 0, len(qkv))
            return
        shape, dim = self.shape, self.shape.head_dim
        turned = qkv[:, : shape.num_heads + shape.num_kv_heads]
        cos, sin = self._cos[rows.position].unsqueeze(1), self._sin[rows.position].unsqueeze(1)
        turned.copy_(rotate(turned, cos, sin))
        page, place = self.tables[rows.sequence, rows.position // PAGE], rows.position % PAGE
        cache = self._layers[layer]
        cache[:, :, 0].unflatten(-1, (dim, PAGE))[page, :, :, place] = turned[:, shape.num_heads :]
        cache[:, :, 1].unflatten(-1, (PAGE, dim))[page, :, place] = qkv[:, shape.num_heads + shape.num_kv_heads :]

    def attend(self, layer: int, qkv: Tensor, rows: Rows) -> Tensor:
        """[rows, heads * dim]: what each row gets from its own and all earlier positions; after `store` of all rows."""
        out = torch.empty(len(qkv), self.shape.num_heads, self.shape.head_dim)
        if self._kernel is None:
            singles = set(range(len(qkv))).difference(*(range(first, last) for first, last in rows.runs))
            for first, last in (*rows.runs, *((row, row + 1) for row in singles)):
                self._attend_run(layer, qkv, rows, first, last, out)
            return out.flatten(1)
        batch = self._batch(layer, qkv, out, rows)
        kernel, address = self._kernel, ctypes.byref(batch)
        done = 0
        for first, last in rows.runs:
            if last - first >= LONG_RUN:
                self._split(kernel, address, done, first)
                self._attend_run(layer, qkv, rows, first, last, out)
                done = last
        self._split(kernel, address, done, len(qkv))
        return out.flatten(1)

    def _split(self, kernel: native.Kernel, batch: object, first: int, last: int) -> None:
        """Half of the rows on a thread of their own, where there is one."""
        if self._second is None or last - first < SHARED_ROWS:
            kernel.attend(batch, first, last)
            return
        middle = (first + last) // 2
        half: Future[None] = self._second.submit(kernel.attend, batch, first, middle)
        kernel.attend(batch, middle, last)
        half.result()

    def _attend_run(self, layer: int, qkv: Tensor, rows: Rows, first: int, last: int, out: Tensor) -> None:
        begin, length = int(rows.position[first]), int(rows.position[last - 1]) + 1
        keys, values = self._gather(layer, int(rows.sequence[first]), length)
        queries = qkv[first:last, : self.shape.num_heads].transpose(0, 1)
        if begin == 0:
            out[first:last] = self._mix(queries, keys, values, None)
            return
        block = max(1, MOST_MASKED // length)
        for done in range(0, last - first, block):
            some = queries[:, done : done + block]
            end = begin + done + some.shape[1]
            mask = torch.arange(end) <= torch.arange(begin + done, end).unsqueeze(1)
            out[first + done : first + done + some.shape[1]] = self._mix(some, keys[:, :end], values[:, :end], mask)

    def _mix(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """[rows, heads, dim] torch's attention; without a mask each row sees as many keys as come before it."""
        mixed = functional.scaled_dot_product_attention(
            queries[None],
            keys[None],
            values[None],
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=self.shape.num_heads != self.shape.num_kv_heads,
        )
        return mixed[0].transpose(0, 1)

    def _gather(self, layer: int, sequence: int, length: int) -> tuple[Tensor, Tensor]:
        """[kv_heads, length, dim] keys and values of a sequence."""
        dim = self.shape.head_dim
        pages = self._layers[layer][self.tables[sequence, : -(-length // PAGE)]]
        keys = pages[:, :, 0].unflatten(-1, (dim, PAGE)).permute(1, 0, 3, 2).flatten(1, 2)
        values = pages[:, :, 1].unflatten(-1, (PAGE, dim)).permute(1, 0, 2, 3).flatten(1, 2)
        return keys[:, :length], values[:, :length]

    def copy(self, page: int, source: int) -> None:
        """Makes a page hold what another holds."""
        for cache in self._layers:
            cache[page] = cache[source]

    def _batch(self, layer: int, qkv: Tensor, out: Tensor, rows: Rows) -> native.Batch:
        assert qkv.is_contiguous()
        shape = self.shape
        return native.Batch(
            *(
                tensor.data_ptr()
                for tensor in (
                    qkv,
                    out,
                    self._layers[layer],
                    self.tables,
                    rows.sequence,
                    rows.position,
                    self._cos,
                    self._sin,
                )
            ),
            self.tables.shape[1],
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            shape.head_dim**-0.5,
        )
