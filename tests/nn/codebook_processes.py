"""Scenarios of two and of three processes that train codebooks together. Run by test_codebook_sync.py, where each is a
test, with a folder to meet in and to report to. It forks itself: importing torch once is enough.

Every scenario is called on every process with its rank and the number of them. torch's generator differs between the
processes throughout, as it may in a user's training.
"""

import copy
import inspect
import json
import os
import sys
import time
import traceback
import warnings
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from pygen.nn._codebook_sync import assert_codebooks_equal, codebook_checksums, packed_codebook_updates
from pygen.nn.product_vq import ProductVQ
from pygen.nn.residual_vq import ResidualVQ
from pygen.nn.vector_quantize import VectorQuantize

DIM = 8
SCENARIOS = {}
# A rank that waits for one that will not come fails after this time; nothing here takes a tenth of it.
LIMIT = timedelta(seconds=20)
COLLECTIVES = [
    name
    for name in ("all_reduce", "broadcast", "reduce", "all_gather", "all_gather_into_tensor", "all_gather_object")
    + ("gather", "scatter", "reduce_scatter", "reduce_scatter_tensor", "all_to_all", "barrier", "send", "recv")
    if hasattr(distributed, name)
]


def scenario(function):
    SCENARIOS[function.__name__] = function
    return function


class Model(torch.nn.Module):
    """Quantisers of all kinds, side by side, with seven codebooks in all."""

    def __init__(self, **options):
        super().__init__()
        self.plain = VectorQuantize(DIM, 12, **options)
        self.cosine = VectorQuantize(DIM, 10, use_cosine_sim=True, **options)
        self.product = ProductVQ(DIM, 2, 9, **options)
        self.residual = ResidualVQ(dim=DIM, num_quantizers=3, codebook_size=7, **options)
        self.shared = ResidualVQ(dim=DIM, num_quantizers=3, codebook_size=6, shared_codebook=True, **options)

    def forward(self, x, mask=None):
        results = [q(x, mask=mask) for q in self.children()]
        return sum(r[0] for r in results), sum(r[2].sum() for r in results)


def seeded(make):
    """The same module on every process, without a change to the generators."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return make()


def batch(step, rank, n, length=5):
    """What a rank trains on in a step: (n, length, DIM), which any process can make."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(n, length, DIM, generator=generator)


def codebooks(model):
    return [child for child in model.modules() if hasattr(child, "cluster_size")]


@contextmanager
def counted():
    """The names of torch.distributed's collectives, as they are called."""
    calls = []

    def recording(name, function):
        def call(*args, **kwargs):
            calls.append(name)
            return function(*args, **kwargs)

        return call

    originals = {name: getattr(distributed, name) for name in COLLECTIVES}
    for name, function in originals.items():
        setattr(distributed, name, recording(name, function))
    try:
        yield calls
    finally:
        for name, function in originals.items():
            setattr(distributed, name, function)


def together(tensor):
    """tensor of every rank."""
    everyones = [torch.empty_like(tensor) for _ in range(distributed.get_world_size())]
    distributed.all_gather(everyones, tensor.contiguous())
    return everyones


def assert_same_everywhere(tensor):
    everyones = together(tensor)
    assert all(torch.equal(other, everyones[0]) for other in everyones), everyones


def assert_matches_one_process(make, batches, masks=None, packed=True):
    """After training on `batches` (steps of one (n, length, DIM) per rank) the codebooks are those of a process that
    was given each step's batches as one."""
    rank = distributed.get_rank()
    model = seeded(make)
    alone = copy.deepcopy(model)
    for codebook in codebooks(alone):
        codebook.sync = False
    for step, parts in enumerate(batches):
        mask = {} if masks is None else {"mask": masks[step][rank]}
        whole = {} if masks is None else {"mask": torch.cat(masks[step])}
        with packed_codebook_updates(*([model] if packed else [])):
            loss = model(parts[rank], **mask)[-1]
        assert loss.isfinite().all(), loss
        alone(torch.cat(parts), **whole)
        for mine, theirs in zip(codebooks(model), codebooks(alone), strict=True):
            for (name, a), b in zip(mine.state_dict().items(), theirs.state_dict().values(), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    assert_codebooks_equal(model)
    return model


@scenario
def a_model_built_before_the_processes_met_is_synchronised(rank, world):
    model = BUILT_BEFORE
    with counted() as calls, packed_codebook_updates(model):
        model(batch(0, rank, 4))
    assert calls == ["all_reduce"], calls
    assert_codebooks_equal(model)


@scenario
def a_training_step_of_a_model_makes_one_all_reduce(rank, world):
    for options in ({}, {"threshold_ema_dead_code": 2}):
        model = seeded(lambda options=options: Model(**options))
        for step in range(3):
            with counted() as calls, packed_codebook_updates(model):
                model(batch(step, rank, 4))
            assert calls == ["all_reduce"], calls


@scenario
def without_a_block_every_quantiser_makes_one_all_reduce(rank, world):
    model = seeded(Model)
    for child in model.children():
        with counted() as calls:
            child(batch(0, rank, 4))
        assert calls == ["all_reduce"], (child, calls)


@scenario
def evaluation_and_frozen_codebooks_communicate_nothing(rank, world):
    """An evaluation on one rank alone is common; it would hang."""
    model = seeded(Model).eval()
    frozen = seeded(lambda: VectorQuantize(DIM, 12, freeze_codebook=True))
    waiting = seeded(lambda: VectorQuantize(DIM, 12, kmeans_init=True)).eval()
    with counted() as calls:
        if rank == 0:
            waiting(batch(0, rank, 4))
            with packed_codebook_updates(model):
                model(batch(0, rank, 4))
            frozen(batch(0, rank, 4))
    assert calls == [], calls


@scenario
def an_unsynchronised_codebook_communicates_nothing(rank, world):
    model = seeded(lambda: VectorQuantize(DIM, 12, sync_codebook=False))
    with counted() as calls:
        model(batch(0, rank, 4))
        with packed_codebook_updates(model):
            model(batch(1, rank, 4))
    assert calls == [], calls
    assert len({tuple(t.flatten().tolist()) for t in together(model.codebook)}) == world


@scenario
def replicas_stay_bitwise_equal(rank, world):
    model = seeded(lambda: Model(threshold_ema_dead_code=1.5))
    for step in range(6):
        with packed_codebook_updates(model):
            model(batch(step, rank, 1 + rank) * 3)
    assert_codebooks_equal(model)
    (numbers,) = {tuple(t.tolist()) for t in together(torch.tensor(list(codebook_checksums(model).values())))}
    assert len(numbers) == 7  # the shared codebook is one


@scenario
def replicas_stay_bitwise_equal_under_autocast(rank, world):
    model = seeded(lambda: Model(threshold_ema_dead_code=1.5))
    for step in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16), packed_codebook_updates(model):
            quantized, loss = model(batch(step, rank, 4).bfloat16())
        assert loss.isfinite()
    assert_codebooks_equal(model)
    assert all(t.dtype in (torch.float32, torch.bool) for t in model.state_dict().values())


@scenario
def a_codebook_that_differs_in_one_bit_is_named(rank, world):
    model = seeded(Model)
    assert_codebooks_equal(model)
    last = model.residual.layers[1]._codebook.embed_avg.view(torch.int32)
    last[0, -1, -1] ^= int(rank == world - 1)
    try:
        assert_codebooks_equal(model)
    except RuntimeError as error:
        assert str(error).endswith("differ between processes: residual.layers.1._codebook"), error
    else:
        raise AssertionError("every rank must be told")


@scenario
def processes_match_one_process_on_the_joined_batch(rank, world):
    steps = [[batch(step, r, 4) for r in range(world)] for step in range(3)]
    assert_matches_one_process(Model, steps)
    assert_matches_one_process(Model, steps, packed=False)


@scenario
def uneven_batches_match_one_process(rank, world):
    assert_matches_one_process(
        Model, [[batch(s, r, 1 + 3 * ((r + s) % world)) for r in range(world)] for s in range(3)]
    )


@scenario
def an_empty_rank_matches_one_process(rank, world):
    parts = [[batch(s, r, 0 if r == s % world else 4) for r in range(world)] for s in range(3)]
    assert_matches_one_process(Model, parts)


@scenario
def masks_match_one_process(rank, world):
    parts = [[batch(s, r, 4) for r in range(world)] for s in range(3)]
    masks = [[p[..., 0] > 0 for p in step] for step in parts]
    assert_matches_one_process(Model, parts, masks)


@scenario
def a_fully_masked_rank_matches_one_process(rank, world):
    parts = [[batch(s, r, 4) for r in range(world)] for s in range(3)]
    masks = [[torch.full((4, 5), r != s % world) for r in range(world)] for s in range(3)]
    assert_matches_one_process(Model, parts, masks)


@scenario
def a_nan_on_one_rank_does_not_reach_the_codebooks(rank, world):
    model = seeded(lambda: Model(threshold_ema_dead_code=1.5))
    for step in range(2):
        x = batch(step, rank, 4)
        if rank == 0:
            x[0] = torch.nan
        with packed_codebook_updates(model):
            model(x)
    assert all(t.isfinite().all() for t in model.state_dict().values())
    assert_codebooks_equal(model)


@scenario
def a_branch_that_one_rank_does_not_take_hangs_nobody(rank, world):
    model = seeded(lambda: torch.nn.ModuleList(VectorQuantize(DIM, 12, threshold_ema_dead_code=1) for _ in range(3)))
    unused = model[2]._codebook.state_dict()
    x = batch(0, rank, 4)
    unused = {name: t.clone() for name, t in unused.items()}
    with counted() as calls, packed_codebook_updates(model):
        model[0](x)
        if rank == 0:
            model[1](x.double())  # the statistics of the others are float32
    assert calls == ["all_reduce"], calls
    assert_codebooks_equal(model)
    for name, t in model[2]._codebook.state_dict().items():
        assert torch.equal(t, unused[name]), f"nobody used it, but {name} changed"


@scenario
def a_failed_forward_leaves_the_codebooks_usable(rank, world):
    model = seeded(Model)
    before = codebook_checksums(model)
    with counted() as calls:
        try:
            with packed_codebook_updates(model):
                model(batch(0, rank, 4))
                raise KeyError("the rest of the step")
        except KeyError:
            pass
    assert calls == [] and codebook_checksums(model) == before
    with packed_codebook_updates(model):
        model(batch(0, rank, 4))
    assert codebook_checksums(model) != before
    assert_codebooks_equal(model)


@scenario
def quantize_dropout_is_the_same_on_all_ranks(rank, world):
    model = seeded(lambda: ResidualVQ(dim=DIM, num_quantizers=5, codebook_size=6, quantize_dropout=True))
    used = []
    for step in range(12):
        with counted() as calls:
            _, indices, _ = model(batch(step, rank, 2))
        assert calls == ["all_reduce"], "nothing but the update, not even to agree on the number of layers"
        used.append(int((indices[0, 0] >= 0).sum()))
    assert_same_everywhere(torch.tensor(used))
    assert len(set(used)) > 2
    assert_codebooks_equal(model)


@scenario
def ranks_that_drop_different_layers_do_not_hang(rank, world):
    """A seed of one's own for each rank is a mistake, and no reason to wait forever."""
    model = seeded(lambda: ResidualVQ(dim=DIM, num_quantizers=5, codebook_size=6, quantize_dropout=True))
    for step in range(6):
        model(batch(step, rank, 2), rand_quantize_dropout_fixed_seed=10 * step + rank)
    assert_codebooks_equal(model)


def dead(model):
    """Every code far from the data but the first."""
    for codebook in codebooks(model):
        codebook.embed[:, 1:] = 1e3
        codebook.embed[:, 0] = 0
        codebook.embed_avg.copy_(codebook.embed)
        codebook.cluster_size[:, 1:] = 0
    return model


def assert_codes_from(codebook, rows, threshold, changed):
    """The changed codes are different vectors among the rows, with the rest of their state reset to them."""
    embed = codebook.embed[0, changed]
    assert (embed[:, None] == rows).all(-1).any(1).all(), "a revived code is a vector of the batch, as it is"
    assert len(embed.unique(dim=0)) == len(embed)
    assert (codebook.cluster_size[0, changed] == threshold).all()
    torch.testing.assert_close(codebook.embed_avg[0, changed], embed * threshold)


@scenario
def dead_codes_are_revived_with_all_their_state_from_all_ranks(rank, world):
    model = dead(seeded(lambda: VectorQuantize(DIM, 12, threshold_ema_dead_code=0.5)))
    rows = [batch(0, r, 8).flatten(0, 1) for r in range(world)]
    model(rows[rank][None])
    assert_codes_from(model._codebook, torch.cat(rows), 0.5, slice(1, 12))
    origins = [(model.codebook[1:, None] == part).all(-1).any() for part in rows]
    assert all(origins), "a share of the codes from each rank"
    assert_codebooks_equal(model)


@scenario
def revival_is_right_with_an_empty_and_with_a_fully_masked_rank(rank, world):
    for empty in (True, False):
        model = dead(seeded(lambda: VectorQuantize(DIM, 12, threshold_ema_dead_code=0.5)))
        rows = [batch(0, r, 8).flatten(0, 1) for r in range(world)]
        x, mask = rows[rank][None], torch.full((1, 40), rank != 0)
        model(x[:, :0] if empty and rank == 0 else x, mask=None if empty else mask)
        share = -(-12 // world)
        revived = model.codebook.norm(dim=-1) < 100
        assert revived.sum() == 1 + min(11, share * (world - 1)), "what the others could propose"
        revived[0] = False
        assert_codes_from(model._codebook, torch.cat(rows[1:]), 0.5, revived)
        assert_codebooks_equal(model)


@scenario
def no_rank_with_data_means_no_revival(rank, world):
    model = dead(seeded(lambda: VectorQuantize(DIM, 12, threshold_ema_dead_code=0.5)))
    model(torch.zeros(1, 0, DIM))
    assert (model.codebook[1:].isfinite()).all() and (model._codebook.cluster_size[0, 1:] == 0).all()
    assert_codebooks_equal(model)


@scenario
def a_revived_code_is_not_taken_back_by_its_old_average(rank, world):
    model = dead(seeded(lambda: VectorQuantize(DIM, 12, threshold_ema_dead_code=0.5)))
    x = batch(0, rank, 8)
    model(x)
    revived = model.codebook.clone()
    for _ in range(3):
        model(x)
    assert (model.codebook.norm(dim=1) < 10).all() and (revived.norm(dim=1) < 10).all()
    assert model(x)[1].unique().numel() > 4, "revived codes are in use"
    assert_codebooks_equal(model)


@scenario
def kmeans_starts_with_the_same_codes_everywhere(rank, world):
    options = {"kmeans_init": True, "kmeans_iters": 3}
    warnings.simplefilter("ignore")  # that there are fewer vectors than codes; the codes left over must be equal too
    for sizes in ([3] + [2] * (world - 1), [3 + 30 * r for r in range(world)], [0] + [30] * (world - 1)):
        for make in (
            lambda: VectorQuantize(DIM, 12, **options),
            lambda: VectorQuantize(DIM, 12, use_cosine_sim=True, **options),
            lambda: ResidualVQ(dim=DIM, num_quantizers=2, codebook_size=12, **options),
            lambda: ProductVQ(DIM, 2, 12, **options),
        ):
            model = make()  # each rank by itself: k-means makes them equal
            model(batch(0, rank, 1, sizes[rank]))
            assert all(t.isfinite().all() for t in model.state_dict().values())
            assert_codebooks_equal(model)
            assert all(codebook.initted for codebook in codebooks(model))


@scenario
def kmeans_starts_from_the_vectors_of_all_ranks(rank, world):
    """With as many codes as vectors the means are the vectors."""
    sizes = [6, 0, 4] if world == 3 else [9, 1]
    rows = [batch(0, r, 1, n)[0] for r, n in enumerate(sizes)]
    model = VectorQuantize(DIM, 10, kmeans_init=True, kmeans_iters=1, freeze_codebook=True, eps=0.0)
    model(rows[rank][None])
    distance = torch.cdist(torch.cat(rows), model.codebook)
    assert (distance.min(1).values < 1e-3).all() and (distance.min(0).values < 1e-3).all()
    assert_codebooks_equal(model)


class Learned(torch.nn.Module):
    """Gradient codebooks between layers with parameters of their own."""

    def __init__(self, **options):
        super().__init__()
        options = {"learnable_codebook": True, "ema_update": False} | options
        self.encoder = torch.nn.Linear(DIM, DIM)
        self.plain = VectorQuantize(DIM, 12, **options)
        self.product = ProductVQ(DIM, 2, 9, **options)
        self.residual = ResidualVQ(dim=DIM, num_quantizers=4, codebook_size=7, quantize_dropout=True, **options)
        self.decoder = torch.nn.Linear(DIM, DIM)

    def forward(self, x):
        hidden, losses = self.encoder(x), 0
        for quantizer in (self.plain, self.product, self.residual):
            hidden, _, loss = quantizer(hidden)
            losses = losses + loss.sum()
        # No mean over nothing: an empty rank is this loss's own affair.
        return (self.decoder(hidden) - x).square().sum() / 100 + losses


@scenario
def gradient_codebooks_train_under_ddp(rank, world):
    model = seeded(Learned)
    alone = copy.deepcopy(model)
    wrapped = DistributedDataParallel(model)
    for step in range(4):  # quantise dropout leaves layers out, and DDP complains of parameters without a gradient
        for module in (alone, wrapped):
            module.zero_grad()
        parts = [batch(step, r, 4) for r in range(world)]
        wrapped(parts[rank]).backward()
        draws = alone.residual.quantize_dropout_draws
        for part in parts:
            alone.residual.quantize_dropout_draws = draws
            (alone(part) / world).backward()
        for (name, mine), theirs in zip(model.named_parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        with torch.no_grad():
            for module in (alone, model):
                for parameter in module.parameters():
                    parameter -= 0.1 * parameter.grad
    assert_codebooks_equal(model)
    assert_same_everywhere(torch.cat([p.detach().flatten() for p in model.parameters()]))


@scenario
def an_empty_rank_under_ddp_gives_finite_gradients(rank, world):
    for options in ({}, {"learnable_codebook": False, "ema_update": True}):
        model = seeded(lambda options=options: Learned(**options))
        wrapped = DistributedDataParallel(model)
        for step in range(2):
            model.zero_grad()
            with packed_codebook_updates(wrapped):
                wrapped(batch(step, rank, 4 if rank else 0)).backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        assert_codebooks_equal(model)


@scenario
def ema_codebooks_train_under_ddp_with_its_buffer_broadcast(rank, world):
    # The name of the option changed in torch 2.13.
    names = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    for broadcast in (True, False):
        model = seeded(lambda: Learned(learnable_codebook=False, ema_update=True, threshold_ema_dead_code=1))
        wrapped = DistributedDataParallel(model, **{name: broadcast})
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(3):
            optimizer.zero_grad()
            with counted() as calls, packed_codebook_updates(wrapped):
                wrapped(batch(step, rank, 4)).backward()
            assert calls == ["all_reduce"], "DDP's own are not made through torch.distributed's functions"
            optimizer.step()
            assert_codebooks_equal(model)


@scenario
def nothing_waits_for_a_value(rank, world):
    """A step reads no tensor's value: on a GPU each would be a wait. Nor do shapes depend on data."""
    from torch.utils._python_dispatch import TorchDispatchMode

    waits = {"aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::masked_select", "aten::equal"}

    class NoWaiting(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function._schema.name not in waits, f"{function} waits for the device"
            return function(*args, **(kwargs or {}))

    model = seeded(lambda: Model(threshold_ema_dead_code=1.5))
    x, mask = batch(0, rank, 4), torch.rand(4, 5) > 0.3
    with NoWaiting(), packed_codebook_updates(model):
        model(x)
        model(x, mask)


@scenario
def a_compiled_step_has_one_graph_and_one_all_reduce(rank, world):
    if world != 2:
        return

    def make():
        plain = VectorQuantize(DIM, 12, threshold_ema_dead_code=1e-3)
        return torch.nn.ModuleList([plain, ResidualVQ(dim=DIM, num_quantizers=2, codebook_size=6)])

    model, eager = seeded(make), seeded(make)

    def step(model, x):
        with packed_codebook_updates(model):
            first, _, loss = model[0](x)
            second, _, losses = model[1](first)
        return second, loss + losses.sum()

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    for i in range(2):
        x = batch(i, rank, 4)
        for mine, theirs in zip(compiled(model, x), step(eager, x), strict=True):
            torch.testing.assert_close(mine, theirs)
    for mine, theirs in zip(model.state_dict().values(), eager.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert_codebooks_equal(model)


def work(folder, world, rank, chosen):
    """One process: every scenario in turn, each in a group of its own, so that none fails for another; and a report."""
    report = {}
    for name in chosen:
        torch.manual_seed(1000 + rank)
        store, start = f"file://{folder}/{name}-{world}", time.perf_counter()
        try:
            distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=LIMIT)
            SCENARIOS[name](rank, world)
            failure = ""
        except BaseException:
            failure = f"rank {rank} of {world}: {traceback.format_exc()}"
        distributed.destroy_process_group()
        report[name] = {"failure": failure, "seconds": time.perf_counter() - start}
    (folder / f"{world}-{rank}.json").write_text(json.dumps(report))


BUILT_BEFORE = seeded(lambda: Model(threshold_ema_dead_code=1.5))


if __name__ == "__main__":
    for world in (2, 3):
        children = []
        for rank in range(world):
            child = os.fork()
            if not child:
                try:
                    work(Path(sys.argv[1]), world, rank, sys.argv[2:] or SCENARIOS)
                finally:
                    os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
