"""The codes of a quantiser and what keeps them up to date: moving averages, K-Means start, revival of dead codes.

vector_quantize.py asks it for indices and codes; _codebook_sync.py sums its statistics over processes.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from pygen import ops
from pygen.nn._codebook_kmeans import kmeans, statistics_of_heads, unit
from pygen.nn._codebook_sampling import sample_codes
from pygen.nn._codebook_sync import (
    CodebookStatistics,
    SynchronizedCodebook,
    choose_replacements,
    proposal_slots,
    propose_rows,
    rank_and_size,
)
from pygen.reference._dtypes import widen

# At most so many codes are revived in one step: it bounds what a step has to move and send.
MAX_REVIVED = 4096


class Codebook(SynchronizedCodebook):
    r"""H codebooks of K codes, learned by exponential moving averages of the vectors that chose each code.

    .. math::
        N_k \leftarrow \gamma N_k + (1 - \gamma)\, n_k, \qquad m_k \leftarrow \gamma m_k + (1 - \gamma)\, s_k, \qquad
        c_k = m_k \Big/ \frac{(N_k + \epsilon) \sum_j N_j}{\sum_j N_j + K \epsilon}

    with n and s the counts and sums of a batch (`ops.codebook_statistics`). A training step is `search`, then `learn`:
    `local_statistics`, their sum over processes (`update`), and `apply_statistics`.

    Buffers (names of vector-quantize-pytorch; always float32 or float64, whatever the module is cast to):
        initted: bool scalar. cluster_size: N, (H, K). embed_avg: m, (H, K, D). embed: c, (H, K, D); a parameter where
        `learnable_codebook`.
    """

    initted: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    embed: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        *,
        num_codebooks: int = 1,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        sync_kmeans: bool = True,
        decay: float = 0.8,
        eps: float = 1e-5,
        threshold_ema_dead_code: float = 0,
        sync_codebook: bool | None = None,
        learnable_codebook: bool = False,
        ema_update: bool = True,
        manual_ema_update: bool = False,
        use_cosine_sim: bool = False,
        stochastic_sample_codes: bool = False,
        sample_codebook_temp: float = 1.0,
    ) -> None:
        super().__init__()
        self.codebook_size, self.num_codebooks = codebook_size, num_codebooks
        self.kmeans_iters, self.sync_kmeans, self.sync = kmeans_iters, sync_kmeans, sync_codebook
        self.decay, self.eps, self.threshold_ema_dead_code = decay, eps, threshold_ema_dead_code
        self.ema_update, self.manual_ema_update = ema_update, manual_ema_update
        self.learnable_codebook, self.use_cosine_sim = learnable_codebook, use_cosine_sim
        self.stochastic_sample_codes, self.sample_codebook_temp = stochastic_sample_codes, sample_codebook_temp

        embed = torch.zeros(num_codebooks, codebook_size, dim)
        if not kmeans_init:
            nn.init.kaiming_uniform_(embed)
            embed = unit(embed) if use_cosine_sim else embed
        self.register_buffer("initted", torch.tensor(not kmeans_init))
        self.register_buffer("cluster_size", torch.ones(num_codebooks, codebook_size))
        self.register_buffer("embed_avg", embed.clone())
        if learnable_codebook:
            self.embed = nn.Parameter(embed)
        else:
            self.register_buffer("embed", embed)
        # Mirrors the buffer: to read one breaks a graph and waits for a GPU. False: the buffer must be read.
        self._known_initted = not kmeans_init

    @torch.no_grad()
    def set_codes(self, codes: Tensor) -> None:
        """codes (H, K, D) take the place of what was there, with moving averages that agree with them."""
        codes = codes.to(self.embed)
        self.embed.copy_(unit(codes) if self.use_cosine_sim else codes)
        self.embed_avg.copy_(self.embed)
        self.cluster_size.fill_(1)
        self.initted.fill_(True)
        self._known_initted = True

    def transform_input(self, x: Tensor) -> Tensor:
        """x (..., D) as it is compared with codes: of length 1 for cosine codes, and unchanged for the others."""
        if not self.use_cosine_sim:
            return x
        # The square of a float16 overflows at 256.
        return unit(widen(x))

    @torch.no_grad()
    def search(
        self, x: Tensor, mask: Tensor | None = None, temperature: float | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """x (H, N, D), mask (H, N) -> indices (H, N), and the distances |x - c| (H, N) where the search knows them."""
        x = x.detach()
        temperature = self.sample_codebook_temp if temperature is None else temperature
        if self.training and self.stochastic_sample_codes and temperature > 0:
            return sample_codes(x, self.embed, mask, temperature, cosine=self.use_cosine_sim), None
        if self.use_cosine_sim:
            # Both have length 1, so this is the cosine.
            return ops.nearest_codebook(x, self.embed, metric="dot", mask=mask), None
        distance: Tensor
        indices, distance = ops.nearest_codebook(x, self.embed, mask=mask, return_distance=True)
        return indices, distance

    @property
    def revives(self) -> bool:
        """Whether codes that are hardly used start anew."""
        return self.threshold_ema_dead_code > 0

    @torch.no_grad()
    def learn(self, x: Tensor, indices: Tensor) -> None:
        """A training step from x (H, N, D) and what it chose, indices (H, N); rows of -1 count in nothing."""
        if self.ema_update or self.revives:
            self.update(self.local_statistics(x, indices))

    @torch.no_grad()
    def local_statistics(self, x: Tensor, indices: Tensor) -> CodebookStatistics:
        """What of this process's batch goes into the sum over processes."""
        x = x.detach()
        counts, sums = statistics_of_heads(x, indices, self.codebook_size)
        if self.revives:
            proposals, keys = propose_rows(x, indices >= 0, min(self.codebook_size, MAX_REVIVED))
        else:
            proposals, keys = sums[:, :0], counts[:, :0]
        return CodebookStatistics(counts.new_ones(1), counts, sums, proposals, keys)

    def empty_statistics(self) -> CodebookStatistics | None:
        if not self.training or not (self.ema_update or self.revives):
            return None
        heads, codes, dim = self.embed.shape
        slots = proposal_slots(min(codes, MAX_REVIVED)) if self.revives else 0
        shapes = ((1,), (heads, codes), (heads, codes, dim), (heads, slots, dim), (heads, slots))
        return CodebookStatistics(*(self.cluster_size.new_zeros(shape) for shape in shapes))

    @torch.no_grad()
    def apply_statistics(self, statistics: CodebookStatistics) -> None:
        uses, counts, sums, proposals, keys = statistics
        kept = (self.decay**uses).to(self.cluster_size)
        self.cluster_size.mul_(kept).add_(counts.to(self.cluster_size), alpha=1 - self.decay)
        self.embed_avg.mul_(kept).add_(sums.to(self.embed_avg), alpha=1 - self.decay)
        if self.ema_update and not self.manual_ema_update:
            self.update_ema(uses > 0)
        if self.revives:
            self._revive(proposals, keys)

    @torch.no_grad()
    def update_ema(self, where: Tensor | None = None) -> None:
        """The codes from the moving averages; only if `where`, (1,) bool, should it be given."""
        total = self.cluster_size.sum(-1, keepdim=True)
        smoothed = (self.cluster_size + self.eps) * (total / (total + self.codebook_size * self.eps))
        means = self.embed_avg / smoothed[..., None]
        if self.use_cosine_sim:
            means = unit(means)
        # With no mass at all, as after masked batches with decay 0, there is no mean either.
        known = total > 0 if where is None else (total > 0) & where
        self.embed.copy_(torch.where(known[..., None], means, self.embed))

    def _revive(self, proposals: Tensor, keys: Tensor) -> None:
        """Dead codes start anew, with all of their state, from vectors of the batch."""
        threshold = self.threshold_ema_dead_code
        vectors, revived = choose_replacements(proposals, keys, self.cluster_size < threshold, self.cluster_size)
        vectors = vectors.to(self.embed)
        self.embed.copy_(torch.where(revived[..., None], vectors, self.embed))
        self.embed_avg.copy_(torch.where(revived[..., None], vectors * threshold, self.embed_avg))
        self.cluster_size.masked_fill_(revived, threshold)

    def initialise_once(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Codes by K-Means from x (H, N, D), if they wait for their first batch."""
        # In several processes an evaluation may run on one alone, which must not wait for the others.
        if not self._known_initted and (self.training or rank_and_size()[1] == 1):
            self._initialise(x, mask)

    @torch.compiler.disable  # reads a tensor's value and loops: once, and outside of any graph
    @torch.no_grad()
    def _initialise(self, x: Tensor, mask: Tensor | None) -> None:
        if not self.initted:
            x = x.detach().to(self.embed.dtype)
            valid = x.isfinite().all(-1)
            valid = valid if mask is None else valid & mask
            found = kmeans(
                x,
                valid,
                self.codebook_size,
                self.kmeans_iters,
                cosine=self.use_cosine_sim,
                together=self.sync is not False and self.sync_kmeans and rank_and_size()[1] > 1,
            )
            if found is None:
                return  # an empty batch says nothing; the next one will
            means, counts, vectors = found
            if vectors < self.codebook_size:
                warnings.warn(
                    f"K-Means starts {self.codebook_size} codes from {vectors} vectors: some codes are equal",
                    stacklevel=2,
                )
            self.embed.copy_(means)
            self.embed_avg.copy_(means * counts[..., None])
            self.cluster_size.copy_(counts)
            self.update_ema()
            self.initted.fill_(True)
        self._known_initted = True

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._known_initted = not self.initted.is_meta and bool(self.initted)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Moves as every module does, but `half()` and `bfloat16()` leave the state float32: averages of decay 0.99
        stand still in 16 bits."""

        def moved(tensor: Tensor) -> Tensor:
            new = fn(tensor)
            if tensor.is_floating_point() and new.dtype in (torch.float16, torch.bfloat16):
                return tensor.to(new.device, torch.float32)
            return new

        return super()._apply(moved, recurse)

    def extra_repr(self) -> str:
        heads, codes, dim = self.embed.shape
        return f"{dim}, {codes}" + (f", num_codebooks={heads}" if heads > 1 else "")
